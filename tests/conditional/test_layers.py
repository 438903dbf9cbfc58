"""Layers that are conditioned on loss weights: plain functions, Linen, and NNX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from yoto_jax import conditional

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx, serialization
from flax.training import train_state

from yoto_jax import linen as yoto_linen
from yoto_jax import nnx as yoto_nnx

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# One layer in three ways: its parameters as the plain functions have them, copied.


def film_layers(params, hidden):
    """Functions (x, encoding) that compute with these parameters."""
    layers = params["film"]
    inputs, outputs = layers[0]["kernel"].shape[0], layers[-1]["bias"].size
    flat = {f"film_{i}": layer for i, layer in enumerate(layers)}
    linen = yoto_linen.FiLM(hidden)
    module = yoto_nnx.FiLM(inputs, outputs // 2, hidden=hidden, rngs=nnx.Rngs(0))
    for layer, linear in zip(layers, module.layers, strict=True):
        linear.kernel[...] = layer["kernel"]
        linear.bias[...] = layer["bias"]
    return {
        "plain": functools.partial(conditional.film, params),
        "linen": functools.partial(linen.apply, {"params": flat}),
        "nnx": module,
    }


def gate_layers(params):
    module = yoto_nnx.Gate(*params["kernel"].shape, rngs=nnx.Rngs(0))
    module.linear.kernel[...] = params["kernel"]
    module.linear.bias[...] = params["bias"]
    variables = {"params": {"gate": params}}
    return {
        "plain": functools.partial(conditional.gate, params),
        "linen": functools.partial(yoto_linen.Gate().apply, variables),
        "nnx": module,
    }


def fresh_layers(encoding, x):
    """FiLM and gates of all kinds, as they are at the start."""
    size, features = encoding.shape[-1], x.shape[-1]
    for hidden in ((), (5,), (5, 3)):
        params = conditional.init_film(KEY, size, features, hidden=hidden)
        yield functools.partial(conditional.film, params)
        linen = yoto_linen.FiLM(hidden)
        yield functools.partial(linen.apply, linen.init(KEY, x, encoding))
        yield yoto_nnx.FiLM(size, features, hidden=hidden, rngs=nnx.Rngs(0))
    params = conditional.init_gate(size, features)
    yield functools.partial(conditional.gate, params)
    linen = yoto_linen.Gate()
    yield functools.partial(linen.apply, linen.init(KEY, x, encoding))
    yield yoto_nnx.Gate(size, features, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_changes_at_the_start(dtype):
    x, encoding = normal(0, 4, 3, 6, dtype=dtype), normal(1, 4, 2)

    @jax.jit
    def outputs(x, encoding):
        return [layer(x, encoding) for layer in fresh_layers(encoding, x)]

    made = outputs(x, encoding)
    assert len(made) == 12
    for y in made:
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.astype(jnp.float32), x.astype(jnp.float32))


def film_oracle(params, x, c):
    def network(layers, c):
        for i, layer in enumerate(layers):
            c = np.where(c > 0, c, 0.2 * c) if i else c
            c = c @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        return c

    scale, shift = np.split(network(params["film"], c), 2, axis=-1)
    axes = tuple(range(1, x.ndim - 1))
    return (1 + np.expand_dims(scale, axes)) * x + np.expand_dims(shift, axes)


def scramble(params, seed=3):
    """Other parameters, biases and last layers too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)


SHAPES = {"dense": (4, 6), "tokens": (4, 3, 6), "image": (4, 3, 2, 6)}


@pytest.mark.parametrize("hidden", [(), (5, 3)], ids=str)
def test_film_is_one_function_in_three_ways(hidden):
    features, encoding = [normal(0, *s) for s in SHAPES.values()], normal(1, 4, 2)
    params = scramble(conditional.init_film(KEY, 2, 6, hidden=hidden))

    @jax.jit
    def outputs(features, encoding):
        layers = film_layers(params, hidden)
        return [[layer(x, encoding) for x in features] for layer in layers.values()]

    for ways in outputs(features, encoding):
        for x, y in zip(features, ways, strict=True):
            expected = film_oracle(params, np.float64(x), np.float64(encoding))
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # Trees of parameters have the same shapes in all of them.
    linen = yoto_linen.FiLM(hidden)
    made = jax.eval_shape(linen.init, KEY, features[0], encoding)["params"]
    assert sorted(p.shape for p in jax.tree.leaves(made)) == sorted(
        p.shape for p in jax.tree.leaves(params)
    )


def test_a_gate_is_one_function_in_three_ways():
    features, encoding = [normal(0, *s) for s in SHAPES.values()], normal(1, 4, 2)
    params = scramble(conditional.init_gate(2, 6))

    @jax.jit
    def outputs(features, encoding):
        layers = gate_layers(params)
        return [[layer(x, encoding) for x in features] for layer in layers.values()]

    kernel, bias = np.float64(params["kernel"]), np.float64(params["bias"])
    opened = 2 / (1 + np.exp(-np.float64(encoding) @ kernel - bias))
    for ways in outputs(features, encoding):
        for x, y in zip(features, ways, strict=True):
            axes = tuple(range(1, x.ndim - 1))
            expected = np.expand_dims(opened, axes) * np.float64(x)
            np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_encoding_is_concatenated_everywhere(shape):
    x, encoding = normal(0, *shape, dtype=jnp.bfloat16), normal(1, 4, 2)
    y = conditional.concatenate(x, encoding)
    assert y.dtype == jnp.bfloat16
    assert y.shape == (*shape[:-1], 8)
    np.testing.assert_array_equal(y[..., :6], x)
    rows = y.reshape(4, -1, 8)[..., 6:]
    for k in range(rows.shape[1]):
        np.testing.assert_array_equal(rows[:, k], encoding.astype(jnp.bfloat16))
    one = conditional.concatenate(x, encoding[0])
    np.testing.assert_array_equal(one[-1], conditional.concatenate(x, encoding[:1])[-1])
    np.testing.assert_array_equal(one[0], y[0])


def both_layers():
    film = scramble(conditional.init_film(KEY, 2, 6, hidden=(5,)))
    gate = scramble(conditional.init_gate(2, 6))
    layers = film_layers(film, (5,)) | {
        f"gate {name}": layer for name, layer in gate_layers(gate).items()
    }
    return layers | {"concatenate": conditional.concatenate}


def test_one_weighting_for_all_examples():
    @jax.jit
    def outputs(x, encoding):
        ways = (jnp.broadcast_to(encoding, (4, 2)), encoding, encoding[None])
        return {
            name: [layer(x, c) for c in ways] for name, layer in both_layers().items()
        }

    for name, made in outputs(normal(0, 4, 3, 6), normal(1, 2)).items():
        for y in made[1:]:
            np.testing.assert_allclose(y, made[0], rtol=1e-5, atol=1e-6, err_msg=name)


def test_vmap_over_examples_and_over_weightings():
    @jax.jit
    def outputs(x, encoding):
        made = {}
        for name, layer in both_layers().items():
            full = layer(x, encoding)
            by_example = jax.vmap(layer)  # One example is (t, C), or (C,) alone.
            by_weighting = jax.vmap(layer, in_axes=(None, 0))(x, encoding)
            rows = jnp.arange(4)
            made[name] = (
                (full, by_example(x, encoding)),
                (full[:, 0], by_example(x[:, 0], encoding)),
                (full, by_weighting[rows, rows]),
            )
        return made

    for name, pairs in outputs(normal(0, 4, 3, 6), normal(1, 4, 2)).items():
        for expected, y in pairs:
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_layers_in_a_scan_compile_once():
    params = scramble(conditional.init_film(KEY, 1, 4, hidden=(3,)))
    stacked = jax.tree.map(lambda p: jnp.stack([p, 0.1 * p]), params)
    traces = []

    @jax.jit
    def deep(x, weights, support):
        traces.append(1)
        encoding = conditional.encode(weights, support)
        layer = lambda x, p: (jnp.tanh(conditional.film(p, x, encoding)), None)
        return jax.lax.scan(layer, x, stacked)[0]

    for high in (2.0, 4.0):
        support = conditional.LogUniform({"a": 0.5}, {"a": high})
        x, weights = normal(0, 3, 4), {"a": jnp.array([0.5, 1.0, high])}
        y = np.float64(x)
        for k in range(2):
            layer = jax.tree.map(lambda p: p[k], stacked)
            encoding = np.log([[0.5], [1], [high]]) - np.log(0.5)
            encoding = 2 * encoding / np.log(high / 0.5) - 1
            y = np.tanh(film_oracle(layer, y, encoding))
        np.testing.assert_allclose(deep(x, weights, support), y, atol=1e-5)
    assert len(traces) == 1


def test_without_free_weights_layers_do_nothing():
    fixed = conditional.Fixed({"a": 1.0, "b": 2.0})
    encoding = conditional.encode(fixed.grid(2), fixed)
    assert encoding.shape == (1, 0)

    def check(x, encoding):
        layers = list(fresh_layers(encoding, x))
        for layer in layers:
            assert layer(x, encoding) is x
            if isinstance(layer, nnx.Module):
                assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
        assert yoto_linen.FiLM().init(KEY, x, encoding) == {}
        return conditional.concatenate(x, encoding)

    assert jax.eval_shape(check, normal(0, 4, 6), encoding).shape == (4, 6)


def test_wrong_shapes_are_reported():
    x = jnp.ones((4, 3, 6))
    for name, layer in both_layers().items():
        with pytest.raises(ValueError, match=r"cannot condition features of shape"):
            layer(x, jnp.ones((3, 2)))
        if name == "concatenate":
            continue
        with pytest.raises(ValueError, match=r"must have shape \(n, .*got \(4, 1, 2"):
            layer(x, jnp.ones((4, 1, 2)))
        with pytest.raises(ValueError, match=r"must have shape .* got \(\)"):
            layer(x, jnp.ones(()))
        if "linen" in name:
            continue  # Flax has its own words for parameters of another shape.
        with pytest.raises(ValueError, match=r"shape \(n, 2\).* got \(4, 3\)"):
            layer(x, jnp.ones((4, 3)))
        with pytest.raises(ValueError, match=r"shape \(n, 2\).* got \(4,\)"):
            layer(x, jnp.ones(4))  # A vector of raw weights.
        with pytest.raises(ValueError, match="cannot condition features of shape"):
            layer(jnp.ones((4, 5)), jnp.ones((4, 2)))


def test_features_are_floating_point():
    for layer in both_layers().values():
        with pytest.raises(TypeError, match="floating-point features .* got int32"):
            layer(jnp.ones((4, 6), jnp.int32), jnp.ones((4, 2)))


def test_distributions_survive_the_serialization_of_flax():
    saved = {
        "support": conditional.LogUniform({"a": 0.1, "b": 1.0}, {"a": 3.0, "b": 1.0}),
        "preferences": conditional.Dirichlet((1.0, 2.0)),
        "fixed": conditional.Fixed({"a": 2.0}),
    }
    blank = jax.tree.map(jnp.zeros_like, saved)
    restored = serialization.from_bytes(blank, serialization.to_bytes(saved))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for name, distribution in saved.items():
        assert repr(restored[name]) == repr(distribution)

    class Model(nnx.Module):
        def __init__(self):
            self.support = nnx.data(saved["support"])

    merged = nnx.merge(*nnx.split(Model()))
    assert repr(merged.support) == repr(saved["support"])


def test_dtypes_of_parameters_and_computation():
    x, encoding = normal(0, 4, 6, dtype=jnp.bfloat16), normal(1, 4, 2)
    dtypes: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    for layer in (yoto_linen.FiLM((3,), **dtypes), yoto_linen.Gate(**dtypes)):
        variables = jax.eval_shape(layer.init, KEY, x, encoding)
        assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
        for inputs in (x, x.astype(jnp.float32)):
            out = jax.eval_shape(layer.apply, variables, inputs, encoding)
            assert out.dtype == inputs.dtype
    for module in (
        yoto_nnx.FiLM(2, 6, hidden=(3,), rngs=nnx.Rngs(0), **dtypes),
        yoto_nnx.Gate(2, 6, rngs=nnx.Rngs(0), **dtypes),
    ):
        leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
        assert {p.dtype for p in leaves} == {jnp.dtype("bfloat16")}
        assert module(x.astype(jnp.float32), encoding).dtype == jnp.float32


class Block(nn.Module):
    """An attention block with FiLM behind its normalisations."""

    film: bool = True

    @nn.compact
    def __call__(self, tokens, encoding):
        modulate = lambda x, name: (
            yoto_linen.FiLM((4,), name=name)(x, encoding) if self.film else x
        )
        x = modulate(nn.LayerNorm(name="norm1")(tokens), "film1")
        x = tokens + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        y = modulate(nn.LayerNorm(name="norm2")(x), "film2")
        return x + nn.Dense(8, name="mlp")(y)


@pytest.mark.usefixtures("any_rank")
def test_in_an_attention_block():
    tokens, encoding = normal(0, 2, 5, 8), normal(1, 2, 1)
    params = jax.jit(Block().init)(KEY, tokens, encoding)["params"]
    plain = {name: p for name, p in params.items() if "film" not in name}
    assert set(params) - set(plain) == {"film1", "film2"}
    conditioned = jax.jit(Block().apply)({"params": params}, tokens, encoding)
    expected = jax.jit(Block(film=False).apply)({"params": plain}, tokens, encoding)
    np.testing.assert_array_equal(conditioned, expected)


def test_gradients_reach_all_parameters_after_one_step():
    """Of a zero last layer at first; through it once it has moved."""
    x, encoding = normal(0, 4, 6), normal(1, 4, 2)
    params = conditional.init_film(KEY, 2, 6, hidden=(5, 3))
    loss = lambda p: jnp.mean(conditional.film(p, x, encoding) ** 2)
    first = jax.jit(jax.grad(loss))(params)
    assert all((abs(g) > 0).all() for g in jax.tree.leaves(first["film"][-1]))
    assert not any(g.any() for g in jax.tree.leaves(first["film"][:-1]))
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
    second = jax.jit(jax.grad(loss))(params)
    assert all(g.any() for g in jax.tree.leaves(second))
    gate = conditional.init_gate(2, 6)
    loss = lambda p: jnp.mean(conditional.gate(p, x, encoding) ** 2)
    assert all((abs(g) > 0).all() for g in jax.tree.leaves(jax.grad(loss)(gate)))


# Training. The losses |x|^2 and w |x - 1|^2 are least in sum at x = w / (1 + w).

SUPPORT = conditional.LogUniform({"a": 1.0, "b": 0.1}, {"a": 1.0, "b": 10.0})


def losses_of(x):
    return {"a": jnp.mean(x**2, axis=-1), "b": jnp.mean((x - 1) ** 2, axis=-1)}


def objective_of(model, key):
    """Conditional loss of a model: a function of an encoding to (n, 2)."""
    weights = SUPPORT.sample(key, 32, method="stratified")
    x = model(conditional.encode(weights, SUPPORT))
    return conditional.conditional_loss(losses_of(x), weights, normalize="sum")


def check_trained(model):
    weights = SUPPORT.grid(11)
    x = jax.jit(model)(conditional.encode(weights, SUPPORT))
    exact = weights["b"] / (1 + weights["b"])
    np.testing.assert_allclose(x, jnp.stack([exact, exact], axis=-1), atol=0.06)
    losses = losses_of(x)
    assert (np.diff(losses["b"]) < 0).all()  # More weight on b, less of it,
    assert (np.diff(losses["a"]) > 0).all()  # and more of a.


def features(encoding):
    return jnp.full((encoding.shape[0], 2), 0.5)


@pytest.mark.parametrize("kind", ["film", "gate"])
def test_training_plain_functions(kind):
    if kind == "gate":
        params, layer = conditional.init_gate(1, 2), conditional.gate
    else:
        params = conditional.init_film(KEY, 1, 2, hidden=(16,))
        layer = conditional.film
    tx = optax.adam(optax.cosine_decay_schedule(0.03, 400))

    def step(carry, key):
        params, state = carry
        model = lambda p: lambda c: layer(p, features(c), c)
        loss, grads = jax.value_and_grad(lambda p: objective_of(model(p), key))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(KEY, 400)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    (params, _), losses = train((params, tx.init(params)))
    assert np.isfinite(losses).all()
    check_trained(lambda c: layer(params, features(c), c))


def test_training_a_linen_train_state():
    layer = yoto_linen.FiLM((16,))
    c = jnp.zeros((1, 1))
    state = train_state.TrainState.create(
        apply_fn=layer.apply,
        params=layer.init(KEY, features(c), c)["params"],
        tx=optax.adam(optax.cosine_decay_schedule(0.03, 400)),
    )
    traces = []

    @jax.jit
    def step(state, key, support):
        traces.append(1)

        def objective(params):
            weights = support.sample(key, 32)
            c = conditional.encode(weights, SUPPORT)
            x = state.apply_fn({"params": params}, features(c), c)
            return conditional.conditional_loss(losses_of(x), weights, normalize="sum")

        return state.apply_gradients(grads=jax.grad(objective)(state.params))

    support = SUPPORT
    for key in jax.random.split(KEY, 400):
        state = step(state, key, support)
    # Bounds are data: a narrower support does not compile again.
    narrower = jax.tree.map(lambda x: x, SUPPORT)
    narrower.low = jnp.array([1.0, 1.0])
    step(state, KEY, narrower)
    assert len(traces) == 1
    check_trained(lambda c: layer.apply({"params": state.params}, features(c), c))


@pytest.mark.parametrize("kind", ["film", "gate"])
def test_training_with_an_nnx_optimizer(kind, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    if kind == "film":
        make = lambda seed: yoto_nnx.FiLM(1, 2, hidden=(16,), rngs=nnx.Rngs(seed))
    else:
        make = lambda seed: yoto_nnx.Gate(1, 2, rngs=nnx.Rngs(seed))
    model = make(0)
    tx = optax.adam(optax.cosine_decay_schedule(0.03, 400))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        loss = lambda m: objective_of(lambda c: m(features(c), c), key)
        optimizer.update(model, nnx.grad(loss)(model))

    for key in jax.random.split(KEY, 400):
        step(model, optimizer, key)
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    check_trained(lambda c: merged(features(c), c))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        fresh_graph, fresh = nnx.split(make(1))
        restored = checkpointer.restore(tmp_path / "model", fresh)
    again = nnx.merge(fresh_graph, restored)
    c = jnp.array([[0.3], [-0.9]])
    np.testing.assert_array_equal(again(features(c), c), model(features(c), c))


def init_network(key, support, width):
    """A small network on one input, with FiLM before its nonlinearities."""
    keys = jax.random.split(key, 5)
    size = conditional.encoding_size(support)
    dense = lambda key, a, b: jax.random.normal(key, (a, b)) / np.sqrt(a)
    return {
        "in": dense(keys[0], 1, width),
        "films": [
            conditional.init_film(k, size, width, hidden=(16,)) for k in keys[1:3]
        ],
        "mid": dense(keys[3], width, width),
        "out": dense(keys[4], width, 1),
    }


def network(params, x, encoding):
    for kernel, film in zip(("in", "mid"), params["films"], strict=True):
        x = jnp.tanh(conditional.film(film, x @ params[kernel], encoding))
    return (x @ params["out"])[:, 0]


def test_one_model_of_all_quantiles():
    """y = x + (0.5 + x) z has the quantiles x + (0.5 + x) z_q."""
    stats = pytest.importorskip("scipy.stats")
    levels = conditional.Uniform({"quantile": 0.05}, {"quantile": 0.95})
    uniform = conditional.Uniform((0.0, 1e-4), (1.0, 1 - 1e-4))
    steps, n = 2000, 256
    tx = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    params = init_network(KEY, levels, width=16)

    def step(carry, key):
        keys = jax.random.split(key)
        x, noise = uniform.sample(keys[0], n, method="sobol")
        y = x + (0.5 + x) * jax.scipy.stats.norm.ppf(noise)
        level = levels.sample(keys[1], n, method="stratified")

        def objective(params):
            encoding = conditional.encode(level, levels)
            predictions = network(params, x[:, None] - 0.5, encoding)
            return conditional.pinball_loss(predictions, y, level["quantile"]).mean()

        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(KEY, steps)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, _ = train((params, tx.init(params)))
    x = jnp.linspace(0.1, 0.9, 7)[:, None]
    at = lambda q: network(params, x - 0.5, conditional.encode({"quantile": q}, levels))
    grid = levels.grid(19)["quantile"]
    learned = jax.jit(jax.vmap(at))(grid)
    assert (np.diff(learned, axis=0) > 0).all()  # They do not cross.
    for q in (0.1, 0.5, 0.9):
        k = int(np.argmin(abs(grid - q)))
        exact = x[:, 0] + (0.5 + x[:, 0]) * stats.norm.ppf(q)
        error = np.asarray(learned[k] - exact) / (0.5 + x[:, 0])
        assert abs(error).max() < 0.1  # in standard deviations of y
        assert abs(error.mean()) < 0.04


def regression(params, key, x, y, support):
    weights = support.sample(key, len(x))
    predictions = network(params, x, conditional.encode(weights, support))
    losses = {"a": (predictions - y) ** 2, "b": abs(predictions)}
    return conditional.conditional_loss(losses, weights)


def test_a_sharded_batch_trains_as_on_one_device():
    support = conditional.LogUniform({"a": 1.0, "b": 0.01}, {"a": 1.0, "b": 1.0})
    params = scramble(init_network(KEY, support, width=8))
    x, y = normal(0, 64, 1), normal(1, 64)
    both = jax.jit(jax.value_and_grad(regression))
    loss, gradients = both(params, KEY, x, y, support)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = jax.device_put((params, support), everywhere)
    sharded, sharded_gradients = both(
        shared[0], KEY, *jax.device_put((x, y), rows), shared[1]
    )
    assert len(jax.device_put(x, rows).sharding.device_set) == 8
    np.testing.assert_allclose(sharded, loss, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(sharded_gradients), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_shard_map_draws_on_every_device():
    support = conditional.LogUniform({"a": 1.0, "b": 0.01}, {"a": 1.0, "b": 1.0})
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    draw = lambda keys: support.sample(keys[0], 4)["b"]
    spec = PartitionSpec("batch")
    drawn = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=spec, out_specs=spec))
    keys = jax.random.split(KEY, 8)
    weights = np.asarray(drawn(keys)).reshape(8, 4)
    for key, row in zip(keys, weights, strict=True):
        np.testing.assert_allclose(row, support.sample(key, 4)["b"], rtol=1e-5)
    assert len(np.unique(weights)) == 32


def test_training_in_bfloat16():
    low = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    params = low(init_network(KEY, SUPPORT, width=8))
    x = jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16)[:, None]
    y = jnp.sin(3 * x[:, 0])
    tx = optax.adam(0.01)

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(regression)(params, key, x, y, SUPPORT)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(KEY, 200)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    (params, _), losses = train((params, tx.init(params)))
    assert losses.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert np.isfinite(losses).all()
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()


@pytest.mark.parametrize("kind", ["film", "gate"])
def test_no_encoding_for_a_layer_that_has_learned_from_one_is_refused(kind):
    x, none = jnp.ones((2, 3)), jnp.ones((2, 0))
    if kind == "gate":
        layers = gate_layers(conditional.init_gate(1, 3))
    else:
        layers = film_layers(conditional.init_film(KEY, 1, 3, hidden=()), ())
    for name, layer in layers.items():
        message = "and got none" if name == "linen" else r"must have shape \(n, 1\)"
        with pytest.raises(ValueError, match=message):
            layer(x, none)
