"""Weighted gradients of NNX modules: those of ``nnx.grad``, state and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

pytest.importorskip("flax")

from flax import nnx
from flax.errors import TraceContextError

from yoto_jax import nnx as yoto_nnx

pytestmark = pytest.mark.usefixtures("quick_compilation", "any_rank")

BATCHES = jax.random.normal(jax.random.key(0), (3, 8, 4))
NAMES = ("fit", "size", "flat")
LOSSES = dict.fromkeys(NAMES, 0.0)
UPGRAD = yoto.weightings.upgrad()


class Model(nnx.Module):
    """Batch statistics and dropout on both sides of z, and an array that counts."""

    def __init__(self, param_dtype=jnp.float32):
        rngs = nnx.Rngs(0, dropout=1)
        width = functools.partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, param_dtype=param_dtype, rngs=rngs)
        self.hidden, self.norm = width(4, 6), norm(6)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out, self.out_norm = width(6, 2), norm(2)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def encode(self, x):
        self.calls[...] += 1
        return self.dropout(jnp.tanh(self.norm(self.hidden(x))))

    def decode(self, z):
        return self.out_norm(self.out(self.dropout(z)))

    def __call__(self, x):
        return self.decode(self.encode(x))


def losses_of(y):
    values = jnp.mean((y - 1) ** 2), jnp.mean(y**2), jnp.mean(jnp.abs(y - 0.5))
    return dict(zip(NAMES, values, strict=True))


def loss_fn(model, x):
    return losses_of(model(x))


def heads_fn(model, z, x):
    return losses_of(model.decode(z))


def encoder(model, x):
    return model.encode(x)


def reference(model, weights, x, f=loss_fn):
    """The same by Flax: the gradient of a sum with fixed weights, of a copy."""
    model = nnx.clone(model)
    return weighted_grad(f, model, weights, x), model


@functools.partial(nnx.jit, static_argnums=0)
def weighted_grad(f, model, weights, x):
    def weighted(model):
        losses = f(model, x)
        return sum(weights[name] * losses[name] for name in losses)

    return nnx.grad(weighted)(model)


def state_of(model):
    kinds = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))
    return nnx.to_pure_dict(nnx.state(model, kinds))


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other
    )


HEADS = {"out", "out_norm"}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OF_Z = yoto.of_representation(encoder)
OF_OUT = yoto.of_parameters(select=lambda params: params.out.kernel)
APART = yoto.of_parameters(unweighted=lambda params: (params.out, params["out_norm"]))
WAYS = {
    "losses": (yoto.weightings.scale_invariant(), None),
    "gramian": (UPGRAD, None),
    "chunks": (UPGRAD, yoto.of_parameters(chunk_size=2)),
    "none kept": (UPGRAD, yoto.of_parameters(keep=False)),
    "norms": slow(
        yoto.weightings.grad_norm_balance(),
        yoto.of_parameters(keep=False, chunk_size=1),
    ),
    "select": (UPGRAD, OF_OUT),
    "unweighted": slow(UPGRAD, APART),
    "encoder": (UPGRAD, OF_Z),
    "weigh_heads": slow(UPGRAD, yoto.of_representation(encoder, weigh_heads=True)),
    "due": (yoto.weightings.every(UPGRAD, 2), None),
    "due_encoder": slow(yoto.weightings.every(UPGRAD, 2), OF_Z),
}


@pytest.mark.parametrize(("weighting", "source"), WAYS.values(), ids=WAYS)
def test_gradients_and_state_are_those_of_nnx_grad(weighting, source):
    model = Model()
    f = heads_fn if hasattr(source, "encoder") else loss_fn
    fn = yoto_nnx.value_and_grad(f, weighting, gradients=source)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    state, traces = weighting.init(LOSSES), []

    @nnx.jit
    def step(model, optimizer, state, x):
        traces.append(None)
        losses, grads, state = fn(model, state, x)
        optimizer.update(model, grads)
        return losses, grads, state

    for n, x in enumerate(BATCHES):
        before = nnx.clone(model)
        losses, grads, state = step(model, optimizer, state, x)
        expected, copy = reference(before, optax.tree.get(state, "loss_weights"), x)
        if source in (APART, OF_Z):
            plain, _ = reference(before, dict.fromkeys(NAMES, 1.0), x)
            for part in HEADS:
                expected[part] = plain[part]
        assert_close(grads, expected)
        assert_close(state_of(model), state_of(copy))
        assert_close(losses, loss_fn(before, x))
        assert model.calls[...] == n + 1
        assert model.dropout.rngs.count[...] == 2 * (n + 1)
    assert len(traces) == 1
    assert optax.tree.get(state, "num_skipped") == 0


GRAP, AUTO = yoto.weightings.grap("flat"), yoto.weightings.auto_lambda("flat")
STEERED = {
    "all on validation": (GRAP, {"steering": yoto.on_validation(all_losses=True)}),
    "validation": (GRAP, {"steering": yoto.on_validation()}),
    "encoder": (GRAP, {"steering": yoto.on_validation(), "gradients": OF_Z}),
    "lookahead": (AUTO, {"steering": yoto.on_validation(lookahead=0.1)}),
}


@pytest.mark.parametrize(("weighting", "options"), STEERED.values(), ids=STEERED)
def test_what_steers_leaves_no_trace_in_the_module(weighting, options):
    model = Model()
    f = heads_fn if "gradients" in options else loss_fn
    fn = nnx.jit(yoto_nnx.value_and_grad(f, weighting, **options))
    x, other = BATCHES[0], (BATCHES[1] + 5,)
    _, _, state = fn(model, weighting.init(LOSSES), other, x)
    _, copy = reference(Model(), LOSSES, x)
    assert_close(state_of(model), state_of(copy))
    assert state.num_updates == 1


def test_split_and_merge_under_jit():
    graphdef, params, rest = nnx.split(Model(), nnx.Param, ...)
    fn = yoto_nnx.value_and_grad(loss_fn, UPGRAD)

    @jax.jit
    def step(params, rest, state, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        losses, grads, state = fn(model, state, x)
        return losses, grads, state, nnx.split(model, nnx.Param, ...)[2]

    _, grads, state, rest = step(params, rest, UPGRAD.init(LOSSES), BATCHES[0])
    expected, copy = reference(Model(), state.loss_weights, BATCHES[0])
    assert_close(grads, expected)
    assert_close(state_of(nnx.merge(graphdef, params, rest)), state_of(copy))


@pytest.mark.parametrize("way", ["direct", "encoder"])
def test_aux_and_keywords(way):
    def aux_fn(model, x, *, shift):
        y = model(x) + shift
        return losses_of(y), {"y": y}

    def heads_aux_fn(model, z, x, *, shift):
        y = model.decode(z) + shift
        return losses_of(y), {"y": y}

    model = Model()
    of_z = yoto.of_representation(lambda model, x, shift: model.encode(x))
    fn = yoto_nnx.value_and_grad(
        aux_fn if way == "direct" else heads_aux_fn,
        UPGRAD,
        gradients=None if way == "direct" else of_z,
        has_aux=True,
    )
    fn = nnx.jit(fn)
    (losses, aux), _, _ = fn(model, UPGRAD.init(LOSSES), BATCHES[0], shift=2.0)
    assert_close(aux["y"], Model()(BATCHES[0]) + 2)
    assert_close(losses, losses_of(aux["y"]))


def test_parameters_in_low_precision():
    model = Model(jnp.bfloat16)
    weighting = yoto.weightings.equal(reduction="sum")
    fn = nnx.jit(yoto_nnx.value_and_grad(loss_fn, weighting))
    _, grads, _ = fn(model, weighting.init(LOSSES), BATCHES[0].astype(jnp.bfloat16))
    ones = dict.fromkeys(NAMES, 1.0)
    expected, copy = reference(
        Model(jnp.bfloat16), ones, BATCHES[0].astype(jnp.bfloat16)
    )
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    assert_close(widen(grads), widen(expected), rtol=2**-7, atol=2**-7)
    assert_close(state_of(model), state_of(copy))


def test_a_filter_of_what_is_trained():
    class Adapted(nnx.Module):
        def __init__(self):
            self.dense = nnx.LoRALinear(4, 2, lora_rank=2, rngs=nnx.Rngs(0))
            self.dense.lora.lora_b[...] += 1.0

        def __call__(self, x):
            return self.dense(x)

    model, before = Adapted(), Adapted()
    fn = yoto_nnx.value_and_grad(loss_fn, UPGRAD, wrt=nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    _, grads, state = nnx.jit(fn)(model, UPGRAD.init(LOSSES), BATCHES[0])
    weights = state.loss_weights
    weighted = lambda model: sum(
        weights[name] * loss for name, loss in loss_fn(model, BATCHES[0]).items()
    )
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    assert_close(grads, nnx.grad(weighted, argnums=wrt)(before))
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.dense.kernel[...], before.dense.kernel[...])
    assert (model.dense.lora.lora_b[...] != before.dense.lora.lora_b[...]).any()
    with pytest.raises(ValueError, match=r"wrt=.*LoRAParam.* finds no variable in Mod"):
        fn(Model(), state, BATCHES[0])


def test_loss_logits_among_the_parameters():
    class Composite(nnx.Module):
        def __init__(self):
            self.model = Model()
            self.composite = yoto_nnx.CompositeLoss(LOSSES, "fit")

        def __call__(self, x):
            return self.model(x)

    def two_losses(model, x):
        losses = losses_of(model(x))
        return {"learned": model.composite(losses), "fit": losses["fit"]}

    model, before = Composite(), Composite()
    fn = yoto_nnx.value_and_grad(two_losses, UPGRAD)
    optimizer = nnx.Optimizer(model, yoto.adamw(0.1), wrt=nnx.Param)
    state = UPGRAD.init({"learned": 0.0, "fit": 0.0})
    _, grads, state = nnx.jit(fn)(model, state, BATCHES[0])
    expected, _ = reference(before, state.loss_weights, BATCHES[0], two_losses)
    assert_close(grads, expected)
    optimizer.update(model, grads)
    old, new = before.composite.loss_weights, model.composite.loss_weights
    assert old["size"] != new["size"]


def test_shardings_of_flax_know_the_logits():
    """They ask variables for a shape, and leave out what has none."""
    loss = yoto_nnx.CompositeLoss(LOSSES, "fit")
    choice = nnx.Param(yoto.init_choice_logits(("relu", "tanh")))
    model = nnx.Dict(loss=loss, choice=choice, out=nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, yoto.adamw(1e-2), wrt=nnx.Param)
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    for state in (nnx.state(model), nnx.state(optimizer)):
        is_spec = lambda x: x is None or isinstance(x, jax.P)
        specs = jax.tree.leaves(nnx.get_partition_spec(state), is_leaf=is_spec)
        assert set(specs) == {jax.P()}
        placed = jax.device_put(state, nnx.get_named_sharding(state, mesh))
        assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(placed))
    assert loss.loss_logits.get_value().shape == (2,)
    assert choice.get_value().shape == (2,)


def test_a_statistic_sees_the_module_and_leaves_it_as_it_is():
    seen = []

    def scales(model, x):
        seen.append(type(model))
        return jnp.abs(jnp.mean(model(x))) * jnp.arange(1.0, 4.0)

    weighting = yoto.weightings.ntk_surrogate()
    (name,) = set(weighting.needs) - {"losses"}
    model = Model()
    fn = yoto_nnx.value_and_grad(loss_fn, weighting, statistics={name: scales})
    nnx.jit(fn)(model, weighting.init(LOSSES), BATCHES[0])
    assert seen == [Model]
    assert model.calls[...] == 1


def test_batch_statistics_are_no_part_of_the_representation():
    """The mean over the entries of z is that of z alone; without jit, too."""
    weighting, model = yoto.weightings.lr_annealing("fit"), Model()
    _, _, state = yoto_nnx.value_and_grad(heads_fn, weighting, gradients=OF_Z)(
        model, weighting.init(LOSSES), BATCHES[0]
    )
    _, copy = reference(Model(), LOSSES, BATCHES[0])
    assert_close(state_of(model), state_of(copy))
    graphdef, params, rest = nnx.split(Model(), nnx.Param, ...)
    merged = lambda params: nnx.merge(graphdef, params, rest, copy=True)

    def heads(params, z, x):
        model = merged(params)
        model.dropout.rngs.count[...] += 1  # as the encoder does
        return losses_of(model.decode(z))

    # Behind the norm the gradient of "size" is rounding alone, and its weight differs
    # between a program and its operations one by one: like is compared with like.
    of_z = yoto.of_representation(lambda params, x: merged(params).encode(x))
    plain = yoto.value_and_grad(heads, weighting, gradients=of_z)
    _, _, expected = plain(params, weighting.init(LOSSES), BATCHES[0])
    assert_close(state.loss_weights, expected.loss_weights)
    fn = yoto_nnx.value_and_grad(heads_fn, weighting, gradients=OF_Z)
    _, _, state = nnx.jit(fn)(Model(), weighting.init(LOSSES), BATCHES[0])
    _, _, expected = jax.jit(plain)(params, weighting.init(LOSSES), BATCHES[0])
    assert_close(state.loss_weights, expected.loss_weights)


def test_gradients_flow_through_what_the_encoder_leaves_in_the_module():
    class Skipping(nnx.Module):
        def __init__(self):
            self.hidden = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(6, 2, rngs=nnx.Rngs(1))

        def encode(self, x):
            self.skip = nnx.Cache(self.hidden(x))  # a new variable
            return jnp.tanh(self.skip[...])

        def decode(self, z):
            return self.out(jnp.concatenate([z, self.skip[...]], axis=-1))

        def __call__(self, x):
            return self.decode(self.encode(x))

    model, before = Skipping(), Skipping()
    of_z = yoto.of_representation(encoder, weigh_heads=True)
    fn = yoto_nnx.value_and_grad(heads_fn, UPGRAD, gradients=of_z)
    _, grads, state = fn(model, UPGRAD.init(LOSSES), BATCHES[0])
    expected, copy = reference(before, state.loss_weights, BATCHES[0])
    assert_close(grads, expected)
    assert_close(model.skip[...], copy.skip[...])


def test_shared_variables_have_one_gradient():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.again = self.first
            self.same_norm = self.norm

        def __call__(self, x):
            return self.same_norm(self.again(self.norm(self.first(x))))

    model, before = Tied(), Tied()
    fn = nnx.jit(yoto_nnx.value_and_grad(loss_fn, UPGRAD))
    _, grads, state = fn(model, UPGRAD.init(LOSSES), BATCHES[0])
    expected, copy = reference(before, state.loss_weights, BATCHES[0])
    assert_close(grads, expected)
    assert_close(state_of(model), state_of(copy))
    assert model.again is model.first


def test_devices_that_average_their_batch_statistics():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    class Averaged(nnx.Module):
        def __init__(self, axis_name=None):
            self.norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=nnx.Rngs(0))
            self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.out(self.norm(x))

    graphdef, params, rest = nnx.split(Averaged("data"), nnx.Param, ...)
    fn = yoto_nnx.value_and_grad(loss_fn, UPGRAD, axis_name="data")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P(), jax.P("data")),
        out_specs=jax.P(),
    )
    def step(params, rest, state, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        _, grads, state = fn(model, state, x)
        return grads, state, nnx.split(model, nnx.Param, ...)[2]

    grads, state, rest = jax.jit(step)(params, rest, UPGRAD.init(LOSSES), BATCHES[0])
    expected, copy = reference(Averaged(), state.loss_weights, BATCHES[0])
    assert_close(grads, expected)
    assert_close(state_of(nnx.merge(graphdef, params, rest)), state_of(copy))


def test_what_cannot_be_kept_is_an_error():
    def counts(model, x):
        model.steps = getattr(model, "steps", 0) + 1
        return loss_fn(model, x)

    state = UPGRAD.init(LOSSES)
    with pytest.raises(ValueError, match="changes Model in more than .* nnx.Variable"):
        yoto_nnx.value_and_grad(counts, UPGRAD)(Model(), state, BATCHES[0])

    model = Model()
    fn = yoto_nnx.value_and_grad(loss_fn, UPGRAD)
    with pytest.raises(TraceContextError, match=r"(?s)Cannot mutate .* to nnx.jit"):
        jax.jit(lambda x: fn(model, state, x))(BATCHES[0])
    assert model.calls[...] == 0

    def noisy(model, x, rngs):
        return loss_fn(model, x + rngs.normal(x.shape))

    with pytest.raises(TraceContextError, match=r"(?s)Cannot mutate .*nnx.Dict\("):
        yoto_nnx.value_and_grad(noisy, UPGRAD)(model, state, BATCHES[0], nnx.Rngs(0))

    steered = yoto_nnx.value_and_grad(loss_fn, GRAP, steering=yoto.on_validation())
    with pytest.raises(TypeError, match="follows the state must be a tuple"):
        steered(model, state, BATCHES[0], BATCHES[0])


@pytest.mark.parametrize("where", [lambda m: m, lambda m: {"net": [nnx.List([m])]}])
def test_the_plain_functions_refuse_modules(where):
    params = where(Model())
    remedy = "params holds an NNX module .*yoto_jax.nnx.value_and_grad"
    with pytest.raises(TypeError, match=remedy):
        yoto.value_and_grad(loss_fn, UPGRAD)(params, UPGRAD.init(LOSSES), BATCHES[0])
    with pytest.raises(TypeError, match=remedy):
        yoto.value_and_jacobian(loss_fn)(params, BATCHES[0])
