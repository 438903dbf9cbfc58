"""The engine: the gradient of the weighted sum, whatever its Gramian is taken of."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import make_weighting, weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def reading(statistic):
    """A weighting that lets a statistic through as its weights (rows of a Gramian)."""

    def update(losses, inner, spec, **seen):
        value = seen[statistic]
        return jnp.diag(value) if value.ndim == 2 else value, value

    shape = lambda spec: (spec.size,) * (2 if statistic == "gramian" else 1)
    return make_weighting(
        lambda spec: jnp.zeros(shape(spec), spec.dtype),
        update,
        needs=(statistic,),
        downstream="c",
    )


W = jax.random.normal(jax.random.key(0), (4, 3))
PARAMS = {"first": W, "last": {"kernel": jnp.linspace(-1, 1, 6).reshape(3, 2)}}
X = jax.random.normal(jax.random.key(1), (8, 4))


def encoder(params, x):
    return jnp.tanh(x @ params["first"])


def heads(params, z, x):
    y = z @ params["last"]["kernel"]
    return {"a": jnp.mean((y - 1) ** 2), "b": jnp.mean(jnp.abs(z)), "c": jnp.mean(y[0])}


def loss_fn(params, x):
    return heads(params, encoder(params, x), x)


def jacobian(f, params):
    """Rows of gradients in float64, each loss on its own."""
    flatten = lambda tree: np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    )
    names = sorted(jax.eval_shape(f, params))
    each = jax.jit(lambda p: [jax.grad(lambda p, n=n: f(p)[n])(p) for n in names])
    return np.stack([flatten(row) for row in each(params)])


J = jacobian(lambda p: loss_fn(p, X), PARAMS)
EXPECTED = {
    "gramian": J @ J.T,
    "norms": np.linalg.norm(J, axis=1),
    "max_abs": np.abs(J).max(1),
    "mean_abs": np.abs(J).mean(1),
    "std": J.std(1),
    "alignment": J @ J[2],
}
MEMORY = {
    "all": {},
    "chunks": {"chunk_size": 2},
    "one at a time": {"chunk_size": 1},
    "none kept": {"keep": False},
    "none kept, chunks": {"keep": False, "chunk_size": 2},
}
OF_Z = yoto.of_representation(encoder)


def call(f, weighting, *args, **options):
    """A compiled step, of a batch, or of a validation batch and a batch."""
    state = weighting.init(dict.fromkeys("abc", 0.0))
    return jax.jit(yoto.value_and_grad(f, weighting, **options))(PARAMS, state, *args)


@pytest.mark.parametrize("mode", MEMORY)
@pytest.mark.parametrize("statistic", EXPECTED)
def test_statistics_and_gradient(statistic, mode):
    source = yoto.of_parameters(**MEMORY[mode])
    losses, grads, state = call(loss_fn, reading(statistic), X, gradients=source)
    np.testing.assert_allclose(state.inner, EXPECTED[statistic], rtol=2e-5)
    chex.assert_trees_all_close(losses, loss_fn(PARAMS, X), rtol=1e-6)
    composite = lambda p: sum(
        state.loss_weights[n] * v for n, v in loss_fn(p, X).items()
    )
    chex.assert_trees_all_close(grads, jax.grad(composite)(PARAMS), rtol=1e-4)


def test_inner_products_of_complex_gradients_one_at_a_time():
    params = {"z": jnp.array([1.0 + 2.0j, -0.5j]), "x": jnp.array([0.3])}

    def f(params):
        z, x = params["z"], params["x"]
        a = jnp.sum(jnp.abs(z - 1) ** 2) * x[0]
        return [a, jnp.real(z[0] * z[1]) + jnp.sum(x**2), jnp.imag(jnp.sum(z**2))]

    weighting = reading("gramian")._replace(downstream=None)
    state = weighting.init([0.0] * 3)
    seen = []
    for options in ({}, {"keep": False, "chunk_size": 2}):
        source = yoto.of_parameters(**options)
        step = yoto.value_and_grad(f, weighting, gradients=source)
        seen.append(step(params, state)[2].inner)
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-6)


def test_many_losses_are_traced_a_few_times_and_weighed_as_few_are():
    """Above a number of losses, sums are products of arrays: of one dtype each."""
    count, calls = 20, []
    targets = jax.random.normal(jax.random.key(2), (count,))
    params = PARAMS | {"bias": jnp.ones((1, 2), jnp.bfloat16)}

    def many(params, z, x):
        calls.append(None)
        y = z @ params["last"]["kernel"] + params["bias"].astype(jnp.float32)
        return [jnp.mean((y[:, 0] - t * y[:, 1] - x[:, 0]) ** 2) for t in targets]

    z = encoder(params, X)
    rows = jax.jacobian(lambda z: jnp.stack(many(params, z, X)))(z)
    rows = np.asarray(rows, np.float64).reshape(count, -1)
    of_all = lambda p: many(p, encoder(p, X), X)
    weights = np.linspace(-1, 1, count).astype(np.float32)

    def update(losses, inner, spec, *, gramian):
        return jnp.asarray(weights), gramian

    shape = lambda spec: jnp.zeros((spec.size, spec.size), spec.dtype)
    weighting = make_weighting(shape, update, needs=("gramian",))
    composite = lambda p: sum(w * x for w, x in zip(weights, of_all(p), strict=True))
    expected = jax.grad(composite)(params)
    state = weighting.init([0.0] * count)
    of_z = yoto.of_representation(encoder, weigh_heads=True)
    for f, source in ((many, of_z), (lambda p, x: of_all(p), None)):
        del calls[:]
        step = jax.jit(yoto.value_and_grad(f, weighting, gradients=source))
        _, grads, seen = step(params, state, X)
        assert len(calls) <= 2
        for got, wanted in zip(
            jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
        ):
            assert got.dtype == wanted.dtype
            rtol = 0.05 if got.dtype == jnp.bfloat16 else 1e-4
            wanted, got = (np.asarray(x, np.float64) for x in (wanted, got))
            atol = rtol * np.abs(wanted).max()
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)
        if source is not None:
            np.testing.assert_allclose(seen.inner, rows @ rows.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scale", "skipped"), [(1e22, 1), (1e-24, 0)])
def test_the_range_of_gradient_norms_that_have_a_square(scale, skipped):
    """Outside of it the batch is skipped, or the gradients count as zero."""
    f = lambda params, x: jax.tree.map(lambda loss: scale * loss, loss_fn(params, x))
    weighting = weightings.imtl_g()
    step = jax.jit(yoto.value_and_grad(f, weighting))
    _, grads, state = step(PARAMS, weighting.init(dict.fromkeys("abc", 0.0)), X)
    assert state.num_skipped == skipped
    share = 1 / 3 if skipped else 0.0
    np.testing.assert_allclose(jax.tree.leaves(state.loss_weights), share, rtol=1e-6)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))

    def in_units(params, x):
        return jax.tree.map(lambda loss: loss / scale, f(params, x))

    _, _, state = jax.jit(yoto.value_and_grad(in_units, weighting))(PARAMS, state, X)
    _, _, plain = call(loss_fn, weighting, X)
    for name, weight in plain.loss_weights.items():
        np.testing.assert_allclose(state.loss_weights[name], weight, rtol=1e-3)


@pytest.mark.parametrize("statistic", EXPECTED)
def test_selected_parameters(statistic):
    def f(params, x):  # All losses depend on what is selected.
        losses = loss_fn(params, x)
        return losses | {"b": losses["b"] + losses["a"]}

    last = lambda p: p["last"]
    rows = jacobian(lambda q: f(PARAMS | {"last": q}, X), PARAMS["last"])
    expected = {
        "gramian": rows @ rows.T,
        "norms": np.linalg.norm(rows, axis=1),
        "max_abs": np.abs(rows).max(1),
        "mean_abs": np.abs(rows).mean(1),
        "std": rows.std(1),
        "alignment": rows @ rows[2],
    }[statistic]
    source = yoto.of_parameters(select=last)
    _, grads, state = call(f, reading(statistic), X, gradients=source)
    np.testing.assert_allclose(state.inner, expected, rtol=2e-5, atol=1e-7)
    weights = np.array([float(state.loss_weights[n]) for n in "abc"])
    np.testing.assert_allclose(
        np.concatenate([g.ravel() for g in jax.tree.leaves(grads)]),
        weights @ jacobian(lambda p: f(p, X), PARAMS),
        rtol=1e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
def test_unweighted_parameters_descend_the_plain_sum(options):
    weighting = reading("norms")
    source = yoto.of_parameters(unweighted=lambda p: p["last"]["kernel"], **options)
    _, grads, state = call(loss_fn, weighting, X, gradients=source)
    first = J[:, : W.size]  # What the heads do not share is all that is looked at.
    np.testing.assert_allclose(state.inner, np.linalg.norm(first, axis=1), rtol=2e-5)
    plain = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)
    chex.assert_trees_all_close(grads["last"], plain["last"], rtol=1e-5)
    weighted = jax.grad(
        lambda p: sum(state.loss_weights[n] * v for n, v in loss_fn(p, X).items())
    )(PARAMS)
    chex.assert_trees_all_close(grads["first"], weighted["first"], rtol=1e-5)


Z = encoder(PARAMS, X)
S = jacobian(lambda z: heads(PARAMS, z, X), Z)
EXPECTED_OF_Z = {
    "gramian": S @ S.T,
    "norms": np.linalg.norm(S, axis=1),
    "max_abs": np.abs(S).max(1),
    "mean_abs": np.abs(S).mean(1),
    "std": S.std(1),
}


@pytest.mark.parametrize("weigh_heads", [False, True])
@pytest.mark.parametrize("statistic", EXPECTED_OF_Z)
def test_gradients_of_the_representation(statistic, weigh_heads):
    source = yoto.of_representation(encoder, weigh_heads=weigh_heads)
    losses, grads, state = call(heads, reading(statistic), X, gradients=source)
    np.testing.assert_allclose(state.inner, EXPECTED_OF_Z[statistic], rtol=2e-5)
    chex.assert_trees_all_close(losses, loss_fn(PARAMS, X), rtol=1e-6)
    weights = state.loss_weights
    through_z = jax.grad(
        lambda p: sum(
            weights[n] * v for n, v in heads(PARAMS, encoder(p, X), X).items()
        )
    )(PARAMS)
    of_heads = dict.fromkeys("abc", 1.0)
    if weigh_heads:  # The downstream loss, "c", trains its own head in any case.
        of_heads |= {"a": weights["a"], "b": weights["b"]}
    own = jax.grad(lambda p: sum(of_heads[n] * v for n, v in heads(p, Z, X).items()))(
        PARAMS
    )
    expected = jax.tree.map(jnp.add, through_z, own)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("statistic", EXPECTED_OF_Z)
def test_with_the_identity_as_encoder_nothing_changes(statistic):
    f = lambda params, z, x: loss_fn(z, x)
    identity = yoto.of_representation(lambda params, x: params)
    _, grads, state = call(f, reading(statistic), X, gradients=identity)
    _, full, expected = call(loss_fn, reading(statistic), X)
    chex.assert_trees_all_close(state, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, full, rtol=1e-4, atol=1e-6)


def test_a_representation_may_be_any_tree_and_carry_integers_and_statistics():
    def encode(params, x):
        return {"z": [encoder(params, x)], "place": jnp.arange(8), "mean": x.mean(0)}

    def decode(params, z, x):
        shifted = z["z"][0] + 0.0 * z["place"][:, None]
        return heads(params, shifted, x), z["mean"]

    weighting = reading("gramian")
    state = weighting.init(dict.fromkeys("abc", 0.0))
    source = yoto.of_representation(encode)
    step = yoto.value_and_grad(decode, weighting, gradients=source, has_aux=True)
    (losses, aux), grads, state = jax.jit(step)(PARAMS, state, X)
    np.testing.assert_allclose(aux, X.mean(0), rtol=1e-6)
    _, expected, reference = call(heads, weighting, X, gradients=OF_Z)
    chex.assert_trees_all_close(grads, expected, rtol=1e-6)
    chex.assert_trees_all_close(state, reference, rtol=1e-6)
    assert set(losses) == set("abc")


@pytest.mark.parametrize("encoded", [False, True])
def test_auxiliary_output_and_keyword_arguments(encoded):
    f = (
        (lambda p, z, x, *, scale: (heads(p, z, scale * x), scale))
        if encoded
        else (lambda p, x, *, scale: (loss_fn(p, scale * x), scale))
    )
    of_z = yoto.of_representation(lambda p, x, *, scale: encoder(p, scale * x))
    weighting = weightings.equal()
    state = weighting.init(dict.fromkeys("abc", 0.0))
    source = of_z if encoded else None
    step = yoto.value_and_grad(f, weighting, has_aux=True, gradients=source)
    (losses, aux), _, _ = step(PARAMS, state, X, scale=2.0)
    assert aux == 2.0
    chex.assert_trees_all_close(losses, loss_fn(PARAMS, 2.0 * X), rtol=1e-6)


# Downstream losses.

X_VALIDATION = X[::-1] * 0.7
ON_VALIDATION = yoto.on_validation()
ALL_ON_VALIDATION = yoto.on_validation(all_losses=True)
V = jacobian(lambda p: loss_fn(p, X_VALIDATION), PARAMS)[2]


def test_alignment_with_a_validation_batch_is_exact():
    _, _, state = call(
        loss_fn, reading("alignment"), (X_VALIDATION,), X, steering=ON_VALIDATION
    )
    np.testing.assert_allclose(state.inner, J @ V, rtol=2e-5)


@pytest.mark.parametrize("statistic", ["alignment", "gramian"])
@pytest.mark.parametrize("batch", ["training", "validation", "validation alone"])
def test_the_downstream_gradient_may_be_taken_ahead(statistic, batch):
    rate = 0.1
    steering, args, seen, own = {
        "training": (yoto.on_training(lookahead=rate), (X,), X, X),
        "validation": (
            yoto.on_validation(lookahead=rate),
            ((X_VALIDATION,), X),
            X_VALIDATION,
            X,
        ),
        "validation alone": (
            yoto.on_validation(lookahead=rate, all_losses=True),
            ((X_VALIDATION,), X),
            X_VALIDATION,
            X_VALIDATION,
        ),
    }[batch]
    _, _, state = call(loss_fn, reading(statistic), *args, steering=steering)
    composite = jax.grad(lambda p: sum(loss_fn(p, X).values()))(PARAMS)  # weights 1
    ahead = jax.tree.map(lambda p, g: p - rate * g, PARAMS, composite)
    v = jacobian(lambda p: loss_fn(p, seen), ahead)[2]
    rows = jacobian(lambda p: loss_fn(p, own), PARAMS)
    expected = rows @ v
    if statistic == "gramian":
        expected = rows @ rows.T
        expected[2, :] = expected[:, 2] = rows @ v
        expected[2, 2] = v @ v
    np.testing.assert_allclose(state.inner, expected, rtol=2e-4)


def test_weights_formed_on_a_validation_batch():
    losses, grads, state = call(
        loss_fn, reading("gramian"), (X_VALIDATION,), X, steering=ALL_ON_VALIDATION
    )
    rows = jacobian(lambda p: loss_fn(p, X_VALIDATION), PARAMS)
    np.testing.assert_allclose(state.inner, rows @ rows.T, rtol=2e-5)
    chex.assert_trees_all_close(losses, loss_fn(PARAMS, X), rtol=1e-6)
    weights = np.array([float(state.loss_weights[n]) for n in "abc"])
    flat = np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
    np.testing.assert_allclose(flat, weights @ J, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("encoded", [False, True])
def test_training_gradients_against_a_validation_gradient(encoded):
    """The downstream row of the Gramian is that of the validation batch."""
    if encoded:
        f, source, rows = heads, OF_Z, S
        # What reaches the parameters through z, and the same of the training losses.
        through = lambda p, x: heads(PARAMS, encoder(p, x), x)
    else:
        f, source, rows = loss_fn, None, J
        through = loss_fn
    v = jax.grad(lambda p: through(p, X_VALIDATION)["c"])(PARAMS)
    flat = np.concatenate([np.asarray(g, float).ravel() for g in jax.tree.leaves(v)])
    derivatives = jacobian(lambda p: through(p, X), PARAMS) @ flat
    options = {"gradients": source, "steering": ON_VALIDATION}
    _, _, state = call(f, reading("gramian"), (X_VALIDATION,), X, **options)
    if encoded:  # The direction of z that the direction of the parameters makes.
        _, tangent = jax.jvp(lambda p: encoder(p, X), (PARAMS,), (v,))
        flat = np.asarray(tangent, float).ravel()
        np.testing.assert_allclose(derivatives, S @ flat, rtol=1e-4, atol=1e-6)
    expected = rows @ rows.T
    expected[2, :] = expected[:, 2] = derivatives
    expected[2, 2] = flat @ flat
    np.testing.assert_allclose(state.inner, expected, rtol=5e-5, atol=1e-7)


PARTS = {
    "all": {},
    "unweighted": {"unweighted": lambda p: p["last"]},
    "select": {"select": lambda p: p["first"]},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_validation_batch_that_is_the_training_batch_changes_nothing(part):
    options = {"gradients": yoto.of_parameters(**PARTS[part])}
    _, _, expected = call(loss_fn, reading("gramian"), X, **options)
    mixed = options | {"steering": ON_VALIDATION}
    _, _, got = call(loss_fn, reading("gramian"), (X,), X, **mixed)
    np.testing.assert_allclose(got.inner, expected.inner, rtol=2e-5, atol=1e-7)
    _, _, got = call(loss_fn, reading("alignment"), X, **options)
    np.testing.assert_allclose(got.inner, expected.inner[2], rtol=2e-5)


def test_cosines_with_a_validation_gradient_are_cosines():
    options = {"gradients": OF_Z, "steering": ON_VALIDATION}
    _, _, state = call(heads, reading("gramian"), (X_VALIDATION,), X, **options)
    assert np.linalg.eigvalsh(np.asarray(state.inner, float)).min() > -1e-7


def test_alignment_on_a_validation_batch_alone():
    options = {"steering": ALL_ON_VALIDATION}
    weighting = reading("alignment")
    _, _, state = call(loss_fn, weighting, (X_VALIDATION,), X, **options)
    rows = jacobian(lambda p: loss_fn(p, X_VALIDATION), PARAMS)
    np.testing.assert_allclose(state.inner, rows @ rows[2], rtol=2e-5)


def test_integers_among_the_parameters_and_nothing_in_the_representation():
    params = PARAMS | {"places": jnp.arange(3)}
    nothing = lambda p, x: {"z": encoder(p, x), "nothing": None}
    with_z = lambda p, z, x: heads(p, z["z"], x)
    ahead = {"steering": yoto.on_training(lookahead=0.1)}
    for needs in ("gramian", "alignment", "norms"):
        state = reading(needs).init(dict.fromkeys("abc", 0.0))
        for f, options in (
            (loss_fn, {}),
            (with_z, {"gradients": yoto.of_representation(nothing)}),
            (loss_fn, ahead if needs == "alignment" else {}),
        ):
            step = yoto.value_and_grad(f, reading(needs), **options)
            _, grads, new = jax.jit(lambda s, step=step: step(params, s, X))(state)
            chex.assert_tree_all_finite(new)
            assert grads["places"].dtype == jax.dtypes.float0


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_parameters(kind):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
    place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))
    params = {"w": jnp.linspace(-1, 1, 64).reshape(4, 16)}
    f = lambda p, x: {
        "a": jnp.mean((x @ p["w"] - 1) ** 2),
        "b": jnp.mean(jnp.abs(x @ p["w"])),
        "c": jnp.sum(p["w"] ** 2),
    }
    for needs in EXPECTED:
        state = reading(needs).init(dict.fromkeys("abc", 0.0))
        step = jax.jit(yoto.value_and_grad(f, reading(needs)))
        expected = step(params, state, X)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(params, place(None, "d"))
            got = step(
                sharded, jax.device_put(state, place()), jax.device_put(X, place())
            )
        chex.assert_trees_all_close(
            jax.device_get(got), jax.device_get(expected), rtol=1e-4, atol=1e-6
        )


def test_directional_derivatives_agree_with_finite_differences():
    _, _, state = call(
        loss_fn, reading("alignment"), (X_VALIDATION,), X, steering=ON_VALIDATION
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), "float64"), PARAMS)
        x, x_validation = (
            jnp.asarray(np.asarray(a), "float64") for a in (X, X_VALIDATION)
        )
        v = jax.grad(lambda p: loss_fn(p, x_validation)["c"])(wide)
        at = lambda h: jax.tree.map(lambda p, d: p + h * d, wide, v)
        plus, minus = loss_fn(at(1e-6), x), loss_fn(at(-1e-6), x)
        expected = [float((plus[n] - minus[n]) / 2e-6) for n in "abc"]
    np.testing.assert_allclose(state.inner, expected, rtol=1e-4)


# When statistics are due.


def test_statistics_are_computed_only_when_due():
    calls = []

    def costly(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.ones(3)

    def update(losses, inner, spec, *, norms, costly):
        return norms * costly, inner

    weighting = weightings.every(
        make_weighting(lambda spec: (), update, needs=("norms", "costly")), 3
    )
    state = weighting.init(dict.fromkeys("abc", 0.0))
    step = yoto.value_and_grad(loss_fn, weighting, statistics={"costly": costly})
    step = jax.jit(step)
    for _ in range(7):
        _, grads, state = step(PARAMS, state, X)
    jax.effects_barrier()
    assert len(calls) == 3
    assert int(state.step) == 7
    flat = np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
    np.testing.assert_allclose(flat, EXPECTED["norms"] @ J, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
def test_lanes_compute_statistics_when_any_of_them_is_due(steps):
    """Lane i of three is i steps ahead."""
    calls = []

    def costly(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.ones(3)

    update = lambda losses, inner, spec, *, costly: (inner + costly, inner + costly)
    summing = make_weighting(lambda spec: jnp.zeros(3), update, needs=("costly",))
    weighting = weightings.every(summing, 4)
    first = weighting.init(dict.fromkeys("abc", 0.0))
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), first)
    states = states._replace(step=states.step + jnp.arange(3))
    one = yoto.value_and_grad(loss_fn, weighting, statistics={"costly": costly})
    step = jax.jit(jax.vmap(one, in_axes=(None, 0, None)))
    for _ in range(steps):
        _, _, states = step(PARAMS, states, X)
    jax.effects_barrier()
    # Lane 0 is due at the first step, lanes 2 and 1 at the third and fourth.
    due = {1: [1, 0, 0], 3: [1, 0, 1]}[steps]
    assert len(calls) in (sum(due), 3 * sum(due))  # once, or once for each lane
    np.testing.assert_array_equal(states.inner.inner[:, 0], due)


# Precision.


def test_inner_products_of_low_precision_are_taken_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    f = lambda p: jax.tree.map(
        lambda v: v.astype(jnp.bfloat16), loss_fn(p, X.astype(jnp.bfloat16))
    )
    weighting = reading("gramian")
    state = weighting.init(dict.fromkeys("abc", 0.0))
    _, rows = yoto.value_and_jacobian(f)(params)
    _, grads, state = yoto.value_and_grad(f, weighting)(params, state)
    flat = np.concatenate(
        [np.asarray(r, np.float64).reshape(3, -1) for r in jax.tree.leaves(rows)], 1
    )
    np.testing.assert_allclose(state.inner, flat @ flat.T, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(grads, params)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 40])
def test_a_gramian_of_low_precision_is_summed_in_float32(count):
    rows = jax.random.normal(jax.random.key(0), (count, 300), jnp.bfloat16)
    tx = yoto.aggregate(reading("gramian")._replace(downstream=None), count)
    _, state = jax.jit(tx.update)({"w": rows}, tx.init(None))
    exact = np.asarray(rows, np.float64)
    np.testing.assert_allclose(state.inner, exact @ exact.T, rtol=1e-5, atol=1e-4)


def test_value_and_jacobian_with_auxiliary_output_and_chunks():
    f = lambda p, x: (loss_fn(p, x), 3)
    for chunk in (None, 1, 2):
        step = yoto.value_and_jacobian(f, has_aux=True, chunk_size=chunk)
        (losses, aux), rows = jax.jit(step)(PARAMS, X)
        flat = np.concatenate([r.reshape(3, -1) for r in jax.tree.leaves(rows)], 1)
        np.testing.assert_allclose(flat, J, rtol=1e-5, atol=1e-7)
        assert aux == 3
        assert set(losses) == set("abc")


# Devices.

SOURCES = {
    "losses alone": (loss_fn, "losses", None),
    "all": (loss_fn, "gramian", None),
    "chunks": (loss_fn, "gramian", yoto.of_parameters(chunk_size=2)),
    "none kept": (loss_fn, "norms", yoto.of_parameters(keep=False)),
    "selected": (loss_fn, "gramian", yoto.of_parameters(select=lambda p: p["first"])),
    "a part unweighted": (
        loss_fn,
        "max_abs",
        yoto.of_parameters(unweighted=lambda p: p["last"]),
    ),
    "encoder": (heads, "gramian", OF_Z),
    "encoder, heads": (
        heads,
        "mean_abs",
        yoto.of_representation(encoder, weigh_heads=True),
    ),
    "encoder, maximum": (heads, "max_abs", OF_Z),
    "encoder, deviation": (heads, "std", OF_Z),
    "downstream": (loss_fn, "alignment", None),
    "downstream, encoder": (heads, "alignment", OF_Z),
    "every": (loss_fn, "every", None),
}


@functools.cache
def on_devices(source):
    """A batch, the step over an axis of devices, and what one device makes of it."""
    f, needs, gradients = SOURCES[source]
    g = lambda *args: f(*args) | {"c": jnp.mean(encoder(args[0], args[-1])[:, 0])}
    if f is heads:
        g = lambda p, z, x: f(p, z, x) | {"c": jnp.mean(z[:, 0])}
    weighting = {
        "losses": lambda: weightings.static({"a": 1.0, "b": 0.3, "c": 2.0}),
        "every": lambda: weightings.every(reading("norms"), 2),
    }.get(needs, lambda: reading(needs))()
    state = weighting.init(dict.fromkeys("abc", 0.0))
    x = jax.random.normal(jax.random.key(2), (64, 4))
    one = yoto.value_and_grad(g, weighting, gradients=gradients)
    expected = jax.jit(one)(PARAMS, state, x)
    many = yoto.value_and_grad(g, weighting, gradients=gradients, axis_name="d")
    return state, x, many, expected


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", ["shard_map", "unchecked", "pmap"])
def test_eight_devices_equal_one(source, way):
    state, x, many, expected = on_devices(source)
    if way == "pmap":
        replicated = jax.pmap(many, axis_name="d", in_axes=(None, None, 0))
        out = jax.device_get(replicated(PARAMS, state, x.reshape(8, 8, 4)))
        got = jax.tree.map(lambda y: y[3], out)
    else:
        sharded = jax.shard_map(
            many,
            mesh=jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,)),
            in_specs=(jax.P(), jax.P(), jax.P("d")),
            out_specs=jax.P(),
            check_vma=way == "shard_map",
        )
        got = jax.jit(sharded)(PARAMS, state, x)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


# Errors.


def test_errors_name_what_is_wrong():
    upgrad, plain = reading("gramian"), weightings.equal()
    make = yoto.value_and_grad
    with pytest.raises(TypeError, match="weighting must be a LossWeighting.*str"):
        make(loss_fn, "upgrad")
    with pytest.raises(TypeError, match="gradients must be .* got a function"):
        make(heads, upgrad, gradients=encoder)
    with pytest.raises(TypeError, match="steering must be .* got a str"):
        make(loss_fn, upgrad, steering="validation")
    with pytest.raises(TypeError, match="encoder must be a function.* got a dict"):
        yoto.of_representation(PARAMS)
    for steering in (ON_VALIDATION, yoto.on_training(lookahead=0.1)):
        with pytest.raises(ValueError, match="follow a downstream loss"):
            make(loss_fn, plain, steering=steering)
        with pytest.raises(ValueError, match="never sees: it needs .*norms"):
            make(loss_fn, reading("norms"), steering=steering)
    for lookahead in (-1.0, np.nan):
        with pytest.raises(ValueError, match="lookahead must not be negative"):
            yoto.on_training(lookahead=lookahead)
        with pytest.raises(ValueError, match="lookahead must not be negative"):
            yoto.on_validation(lookahead=lookahead)
    with pytest.raises(TypeError, match="keep must be True or False"):
        yoto.of_parameters(keep="no")
    with pytest.raises(TypeError, match="weigh_heads must be True or False"):
        yoto.of_representation(encoder, weigh_heads="no")
    with pytest.raises(ValueError, match="needs 'curvature'.*statistics="):
        make(loss_fn, upgrad._replace(needs=("curvature",)))
    with pytest.raises(TypeError, match="arguments of the validation batch after"):
        call(loss_fn, upgrad, steering=ON_VALIDATION)
    with pytest.raises(TypeError, match="must be a tuple of arguments.* got"):
        call(loss_fn, upgrad, X, X, steering=ON_VALIDATION)
    of_nothing = yoto.of_parameters(select=lambda p: ())
    with pytest.raises(ValueError, match="select and unweighted must return a part"):
        call(loss_fn, upgrad, X, gradients=of_nothing)
    both = {"select": lambda p: p["last"], "unweighted": lambda p: p["last"]}
    with pytest.raises(ValueError, match="name the same parameters"):
        call(loss_fn, upgrad, X, gradients=yoto.of_parameters(**both))
    count = PARAMS | {"count": jnp.arange(2)}
    of_count = yoto.of_parameters(select=lambda p: p["count"])
    step = yoto.value_and_grad(loss_fn, upgrad, gradients=of_count)
    with pytest.raises(ValueError, match="looks at is a floating-point array"):
        step(count, upgrad.init(dict.fromkeys("abc", 0.0)), X)
    for_nothing = yoto.of_parameters(unweighted=lambda p: (p, p))
    with pytest.raises(ValueError, match="none are left to be weighed"):
        call(loss_fn, upgrad, X, gradients=for_nothing)
    with pytest.raises(ValueError, match="downstream 'd' is unknown.*'a', 'b', 'c'"):
        call(loss_fn, reading("alignment")._replace(downstream="d"), X)
    with pytest.raises(ValueError, match="loss 'a' must be a scalar.*jnp.unstack"):
        call(lambda p, x: {"a": jnp.ones(2) * p["first"][0, 0]}, plain, X)
    with pytest.raises(ValueError, match="missing: 'c'; unexpected: 'd'"):
        call(lambda p, x: {n: p["first"][0, 0] for n in "abd"}, plain, X)
    with pytest.raises(TypeError, match="loss 'a' must be a floating-point number"):
        call(lambda p, x: dict.fromkeys("abc", jnp.int32(1)), plain, X)


def test_a_gramian_weighting_without_gradients_says_so():
    weighting = reading("gramian")
    state = weighting.init((0.0, 0.0))
    with pytest.raises(ValueError, match="needs gramian=.*value_and_grad"):
        weighting.update((1.0, 2.0), state)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for the 2 losses"):
        weighting.update((1.0, 2.0), state, gramian=jnp.eye(3))


# Memory, read off the compiled programs.


def test_what_each_mode_keeps_in_memory():
    """Arrays of 1 MiB, eight losses: 6 MiB of parameters, 48 MiB of gradients."""
    count, width = 8, 512
    params = [jnp.eye(width) for _ in range(6)]
    x = jnp.ones((4, width))

    def many(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return [jnp.mean((x[:, k::count] - k) ** 2) for k in range(count)]

    def mebibytes(weighting, f=many, gradients=None):
        state = weighting.init([0.0] * count)
        step = yoto.value_and_grad(f, weighting, gradients=gradients)
        lowered = jax.jit(lambda *args: step(*args)[1:]).lower(params, state, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20

    needs = lambda name: reading(name)._replace(downstream=None)
    plain = mebibytes(weightings.equal())
    assert mebibytes(needs("gramian")) > 40  # all gradients
    none_kept = yoto.of_parameters(keep=False)
    a_few_arrays = mebibytes(needs("gramian"), gradients=none_kept)
    assert a_few_arrays < 26
    one_at_a_time = yoto.of_parameters(keep=False, chunk_size=1)
    assert mebibytes(needs("gramian"), gradients=one_at_a_time) < plain + 3
    assert mebibytes(needs("norms"), gradients=none_kept) < plain + 3

    def encode(params, x):
        return functools.reduce(lambda x, kernel: jnp.tanh(x @ kernel), params, x)

    def last(params, z, x):
        return [jnp.mean((z[:, k::count] - k) ** 2) for k in range(count)]

    of_z = yoto.of_representation(encode)
    assert mebibytes(needs("gramian"), last, of_z) < plain + 1


def test_training_with_sgd_goes_down():
    weighting = weightings.static({"a": 1.0, "b": 0.1, "c": 0.0})
    state = weighting.init(dict.fromkeys("abc", 0.0))
    tx = optax.sgd(0.1)
    step = yoto.value_and_grad(loss_fn, weighting)

    def body(carry, _):
        params, state, opt_state = carry
        losses, grads, state = step(params, state, X)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    _, losses = jax.lax.scan(body, (PARAMS, state, tx.init(PARAMS)), length=50)
    assert losses["a"][-1] < 0.5 * losses["a"][0]


@pytest.mark.parametrize("name", ["upgrad", "gradnorm", "famo"])
def test_one_loss_may_be_a_bare_scalar(name):
    weighting = getattr(weightings, name)()
    f = lambda w: jnp.sum(w**2)
    step = yoto.value_and_grad(f, weighting)
    loss, grads, _ = jax.jit(step)(jnp.arange(3.0), weighting.init(0.0))
    assert loss == 5.0
    assert jnp.all(jnp.isfinite(grads))


def test_complex_parameters_keep_both_their_parts():
    def losses(params):
        z = params["z"]
        return {
            "a": jnp.sum(jnp.abs(z) ** 2),
            "b": jnp.sum(z.real * z.imag) + jnp.sum(z.imag),
        }

    params = {"z": jnp.array([1.0 + 2.0j, 3.0 - 1.0j])}
    seen = {}

    def update(values, state, *, gramian):
        seen["gramian"] = gramian
        weights = jax.tree.map(jnp.ones_like, values)
        return weights, {"loss_weights": weights}

    init = lambda values: {"loss_weights": jax.tree.map(jnp.ones_like, values)}
    weighting = yoto.LossWeighting(init, update, needs=("gramian",))
    state = weighting.init({"a": jnp.zeros(()), "b": jnp.zeros(())})
    _, grads, _ = yoto.value_and_grad(losses, weighting)(params, state)
    total = jax.grad(lambda p: sum(losses(p).values()))(params)
    np.testing.assert_allclose(grads["z"], total["z"], rtol=1e-6)
    rows = [jax.grad(lambda p, k=k: losses(p)[k])(params)["z"] for k in "ab"]
    expected = [[jnp.sum((x * y.conj()).real) for y in rows] for x in rows]
    np.testing.assert_allclose(seen["gramian"], np.array(expected), rtol=1e-6)


def test_a_part_of_the_parameters_may_be_named_twice():
    upgrad = weightings.upgrad()
    f = lambda p: {"a": jnp.sum(p["w"] ** 2), "b": jnp.sum((p["w"] - p["v"]) ** 2)}
    params = {"w": jnp.ones(3), "v": jnp.zeros(3)}
    state = upgrad.init({"a": 0.0, "b": 0.0})
    step = lambda part: jax.jit(
        yoto.value_and_grad(f, upgrad, gradients=yoto.of_parameters(select=part))
    )
    twice, once = step(lambda p: (p["w"], p["w"])), step(lambda p: p["w"])
    chex.assert_trees_all_equal(twice(params, state), once(params, state))


def test_all_keyword_arguments_are_those_of_the_losses():
    names = ("validation", "direction", "present", "params", "state", "weighting")
    given = {name: float(k) for k, name in enumerate(names)}
    f = lambda w, **kwargs: {k: w * v for k, v in kwargs.items()}
    weighting = weightings.equal()
    state = weighting.init(given)
    losses, _, _ = yoto.value_and_grad(f, weighting)(2.0, state, **given)
    assert losses == {k: 2 * v for k, v in given.items()}


@pytest.mark.parametrize("source", [None, yoto.of_parameters(keep=False)])
def test_a_loss_may_be_a_number_and_parameters_too(source):
    f = lambda w: {"a": w**2, "b": (w - 1.0) ** 2, "c": 0.0}
    weighting = weightings.equal()
    state = weighting.init(f(2.0))
    step = yoto.value_and_grad(f, weighting, gradients=source)
    losses, grad, _ = step(2.0, state)
    assert losses["c"] == 0
    np.testing.assert_allclose(grad, (4.0 + 2.0) / 3, rtol=1e-6)
    weighting = reading("gramian")
    step = yoto.value_and_grad(f, weighting, gradients=source)
    _, _, state = jax.jit(step)(2.0, weighting.init(f(2.0)))
    np.testing.assert_allclose(state.inner[:2, :2], [[16.0, 8.0], [8.0, 4.0]])
    assert not jnp.any(state.inner[2])
