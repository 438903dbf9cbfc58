"""What every loss weighting of this package promises; a new one is a new row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import yoto_jax as yoto
from yoto_jax import weightings
from yoto_jax._outliers import count_skipped


@dataclasses.dataclass(frozen=True)
class Row:
    """A weighting for losses of which the first is called ``first``."""

    make: Callable[[Any], yoto.LossWeighting]
    at_least: int = 1  # losses that it takes


def trace_of_ntk(params, x, count=3):
    """A stand-in for the NTK's diagonal: positive, and zero where the gradients are."""
    return (jnp.arange(1.0, count + 1) + jnp.mean(jnp.abs(x))) * jnp.any(params["w"])


def simple(factory, **kwargs):
    return lambda first: factory(**kwargs)


pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = {
    "static": Row(simple(weightings.static, weights=0.5)),
    "equal": Row(simple(weightings.equal)),
    "random": Row(simple(weightings.random)),
    "scale_invariant": Row(simple(weightings.scale_invariant)),
    "geometric": Row(simple(weightings.geometric)),
    "uncertainty": Row(simple(weightings.uncertainty)),
    "imtl_l": Row(simple(weightings.imtl_l)),
    "dwa": Row(simple(weightings.dwa)),
    "softadapt": Row(simple(weightings.softadapt)),
    "relobralo": Row(simple(weightings.relobralo)),
    "famo": Row(simple(weightings.famo)),
    "stch": Row(simple(weightings.stch)),
    "causal": Row(simple(weightings.causal)),
    "yoto": Row(lambda first: weightings.yoto(first)),
    "gradnorm": Row(simple(weightings.gradnorm)),
    "grad_norm_balance": Row(simple(weightings.grad_norm_balance)),
    "lr_annealing": Row(lambda first: weightings.lr_annealing(first)),
    "ntk": Row(simple(weightings.ntk)),
    "ntk_surrogate": Row(simple(weightings.ntk_surrogate)),
    "mgda": Row(simple(weightings.mgda)),
    "pcgrad": Row(simple(weightings.pcgrad)),
    "gradvac": Row(simple(weightings.gradvac)),
    "cagrad": Row(simple(weightings.cagrad)),
    "imtl_g": Row(simple(weightings.imtl_g)),
    "nash_mtl": Row(simple(weightings.nash_mtl)),
    "fair_grad": Row(simple(weightings.fair_grad)),
    "aligned_mtl": Row(simple(weightings.aligned_mtl)),
    "upgrad": Row(simple(weightings.upgrad)),
    "dual_proj": Row(simple(weightings.dual_proj)),
    "config": Row(simple(weightings.config)),
    "grap": Row(lambda first: weightings.grap(first), at_least=2),
    "grap_closed_form": Row(
        lambda first: weightings.grap_closed_form(first), at_least=2
    ),
    "softmax_alignment": Row(
        lambda first: weightings.softmax_alignment(first), at_least=2
    ),
    "auto_lambda": Row(lambda first: weightings.auto_lambda(first), at_least=2),
    "every": Row(lambda first: weightings.every(weightings.imtl_g(), 2)),
    "smooth": Row(lambda first: weightings.smooth(weightings.imtl_g(), decay=0.5)),
    "normalize": Row(lambda first: weightings.normalize(weightings.famo())),
    "skip_outliers": Row(lambda first: weightings.skip_outliers(weightings.imtl_g())),
    "all wrapped": Row(
        lambda first: weightings.normalize(
            weightings.smooth(weightings.every(weightings.imtl_g(), 2), decay=0.5)
        )
    ),
}


@pytest.fixture(scope="module", params=ROWS.values(), ids=list(ROWS))
def row(request):
    """Of module scope, so that a row's tests follow each other and share programs."""
    yield request.param
    parts.cache_clear()


PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (4, 3)) / 2,
    "b": jnp.linspace(-1, 1, 3),
    "none": None,
}
BATCHES = jax.random.normal(jax.random.key(1), (6, 16, 4))


def encoder(params, x):
    return jnp.tanh(x @ params["w"])


def head(count, params, z, x):
    shifts = jnp.arange(count, dtype=z.dtype)
    waves = jnp.sin((z @ params["b"])[:, None] + shifts[None])
    sizes = jnp.mean(z**2, axis=0)[jnp.arange(count) % 3]
    losses = jnp.mean((waves - 0.5) ** 2, axis=0) + 0.05 * sizes + 0.05
    losses = [losses[k] for k in range(count)]
    return dict(zip("abc", losses, strict=False)) if count <= 3 else losses


def loss_fn(params, x, count=3):
    return head(count, params, encoder(params, x), x)


@functools.cache
def parts(row, count=3):
    """The weighting of a row, its first state and the engine's function, compiled."""
    weighting = row.make("a" if count <= 3 else 0)
    f = functools.partial(loss_fn, count=count)
    state = weighting.init(jax.eval_shape(f, PARAMS, BATCHES[0]))
    statistics = extra(weighting, functools.partial(trace_of_ntk, count=count))
    step = yoto.value_and_grad(f, weighting, statistics=statistics)
    return weighting, state, jax.jit(step)


def extra(weighting, statistic=trace_of_ntk):
    return {"ntk_diagonal": statistic} if "ntk_diagonal" in weighting.needs else None


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [
        (x.shape, x.dtype, getattr(x, "weak_type", None)) for x in leaves
    ]


def unkeyed(tree):
    """Typed keys as numbers, which chex can compare."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_close(tree, reference, rtol=1e-5):
    chex.assert_trees_all_close(unkeyed(tree), unkeyed(reference), rtol=rtol, atol=1e-6)


RATE = 0.05


def loop(row, batches, scale=1.0):
    """What training comes to, and the weights on the way."""
    _, state, value_and_grad = parts(row)
    params = jax.tree.map(lambda p: p * scale, PARAMS)
    history = []
    for x in batches:
        _, grads, state = value_and_grad(params, state, x)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        history.append(optax.tree.get(state, "loss_weights"))
    return params, state, history


def test_one_trace_and_the_same_types_ever_after(row):
    _, start, step = parts(row)
    params, state, history = loop(row, BATCHES)
    assert step._cache_size() == 1
    assert types(state) == types(start)
    assert all(weights.keys() == set("abc") for weights in history)
    chex.assert_tree_all_finite(unkeyed((params, state)))
    updates = int(optax.tree.get(state, "num_updates"))
    assert updates == (3 if optax.tree.get(state, "step") is not None else 6)
    assert count_skipped(state) == 0


def test_scan_under_vmap_equals_a_loop(row):
    _, state, value_and_grad = parts(row)

    def run(scale):
        def step(carry, x):
            params, state = carry
            _, grads, state = value_and_grad(params, state, x)
            new = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
            return (new, state), optax.tree.get(state, "loss_weights")

        params = jax.tree.map(lambda p: p * scale, PARAMS)
        return jax.lax.scan(step, (params, state), BATCHES[:3])

    (params, state), weights = jax.jit(jax.vmap(run))(jnp.array([0.5, 1.0]))
    for place, scale in enumerate((0.5, 1.0)):
        *expected, history = loop(row, BATCHES[:3], scale)
        got = jax.tree.map(lambda x: x[place], (params, state))
        assert_close(got, tuple(expected), rtol=1e-4)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *history)
        assert_close(jax.tree.map(lambda x: x[place], weights), stacked, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["random", "relobralo", "pcgrad", "grap", "all wrapped"]
)
def test_donation(name):
    weighting, _, _ = parts(ROWS[name])
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting), donate_argnums=1)
    state = weighting.init(jax.eval_shape(loss_fn, PARAMS, BATCHES[0]))
    for x in BATCHES[:3]:
        _, grads, state = step(PARAMS, state, x)
    chex.assert_tree_all_finite(unkeyed((grads, state)))


@pytest.mark.parametrize("name", ["equal", "famo", "lr_annealing", "upgrad", "grap"])
def test_eager_equals_jit(name):
    weighting, state, step = parts(ROWS[name])
    eager = yoto.value_and_grad(loss_fn, weighting)
    expected = step(PARAMS, state, BATCHES[0])
    assert_close(eager(PARAMS, state, BATCHES[0]), expected)


def test_the_gradient_is_the_weighted_sum(row):
    _, state, step = parts(row)
    for x in BATCHES[:2]:
        losses, grads, state = step(PARAMS, state, x)
    weights = optax.tree.get(state, "loss_weights")
    composite = lambda p: sum(
        weights[name] * loss for name, loss in loss_fn(p, BATCHES[1]).items()
    )
    assert_close(grads, jax.grad(composite)(PARAMS))
    assert_close(losses, loss_fn(PARAMS, BATCHES[1]))


@pytest.mark.parametrize("count", [1, 40])
def test_one_loss_and_forty(row, count):
    count = max(count, row.at_least)
    _, state, step = parts(row, count)
    for x in BATCHES[:2]:
        _, grads, state = step(PARAMS, state, x)
    chex.assert_tree_all_finite(unkeyed((grads, state)))
    assert count_skipped(state) == 0
    assert len(jax.tree.leaves(optax.tree.get(state, "loss_weights"))) == count


def test_low_precision_and_double(row):
    for dtype, wide in (("bfloat16", "float32"), ("float64", "float64")):
        with jax.enable_x64(dtype == "float64"):
            cast = lambda x: jnp.asarray(np.asarray(x), dtype)
            params = jax.tree.map(cast, PARAMS)
            weighting = row.make("a")
            state = weighting.init(jax.eval_shape(loss_fn, params, cast(BATCHES[0])))
            step = yoto.value_and_grad(loss_fn, weighting, statistics=extra(weighting))
            step = jax.jit(step)
            for x in BATCHES[:2]:
                losses, grads, new = step(params, state, cast(x))
                assert types(new) == types(state)
                state = new
            chex.assert_trees_all_equal_dtypes(grads, params)
            assert losses["a"].dtype == dtype
            assert optax.tree.get(state, "loss_weights")["a"].dtype == wide
            chex.assert_tree_all_finite(unkeyed((grads, state)))


def test_zero_gradients_give_finite_weights(row):
    _, state, step = parts(row)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)  # No loss has a slope there.
    for x in BATCHES[:3]:
        _, grads, state = step(nothing, state, x)
        assert not any(jnp.any(g) for g in jax.tree.leaves(grads))
    chex.assert_tree_all_finite(unkeyed((grads, state)))
    assert count_skipped(state) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_changes_nothing_but_a_counter(row, bad):
    _, state, step = parts(row)
    for x in BATCHES[:2]:
        _, _, state = step(PARAMS, state, x)
    spoilt = BATCHES[2].at[3, 1].set(bad)
    spoilt = spoilt.at[4, 1].set(-bad)  # tanh turns infinities into numbers
    poison = jax.tree.map(lambda p: p * bad, PARAMS)
    _, _, after = step(poison, state, spoilt)
    assert count_skipped(after) == 1
    if isinstance(state, yoto.SkipOutliersState):  # what became of the last batch
        expected = state._replace(num_skipped=jnp.int32(1), accepted=jnp.asarray(False))
    else:
        expected = optax.tree.set(state, num_skipped=jnp.int32(1))
    chex.assert_trees_all_equal(unkeyed(after), unkeyed(expected))
    _, grads, state = step(PARAMS, after, BATCHES[3])
    chex.assert_tree_all_finite(unkeyed((grads, state)))


def test_a_checkpoint_continues_bit_for_bit(row, tmp_path):
    weighting, state, step = parts(row)
    for x in BATCHES[:3]:
        _, _, state = step(PARAMS, state, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(weighting.init, jax.eval_shape(loss_fn, PARAMS, x))
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x in BATCHES[3:5]:
        _, grads, state = step(PARAMS, state, x)
        _, again, restored = step(PARAMS, restored, x)
    chex.assert_trees_all_equal(again, grads)
    chex.assert_trees_all_equal(unkeyed(restored), unkeyed(state))


# One row for each way through the engine: pmap takes the same steps as shard_map.
PMAPPED = [
    ROWS[name]
    for name in ("equal", "famo", "gradnorm", "lr_annealing", "ntk", "pcgrad", "grap")
]
AUTO = (jax.sharding.AxisType.Auto,)
MESH = jax.make_mesh((8,), ("d",), axis_types=AUTO) if jax.device_count() >= 8 else None


@pytest.mark.skipif(MESH is None, reason="needs eight (virtual) devices")
def test_eight_devices_equal_one(row):
    weighting, state, one = parts(row)
    f: Any = loss_fn
    options: dict[str, Any] = {"statistics": extra(weighting)}
    if not set(weighting.needs) <= {"losses", "ntk_diagonal"}:
        f, options = functools.partial(head, 3), {"encoder": encoder}
        one = jax.jit(yoto.value_and_grad(f, weighting, **options))
    many = yoto.value_and_grad(f, weighting, axis_name="d", **options)
    ways: dict[str, Any] = {"shard_map": on_shards(many)}
    if row in PMAPPED:
        ways["pmap"] = on_replicas(many)
    # Placed as they come out: otherwise the second step is another program.
    everywhere = jax.sharding.NamedSharding(MESH, jax.P())
    params, first = jax.device_put((PARAMS, state), everywhere)
    expected, got = state, dict.fromkeys(ways, first)
    for x in BATCHES[:2]:
        losses, grads, expected = one(PARAMS, expected, x)
        for name, way in ways.items():
            out = way(params, got[name], x)
            got[name] = jax.device_put(out[2], everywhere)
            assert_close(out, (losses, grads, expected), rtol=1e-4)


def on_replicas(step):
    replicated = jax.pmap(step, axis_name="d", in_axes=(None, None, 0))
    return lambda params, state, x: jax.tree.map(
        lambda y: y[5], replicated(params, state, x.reshape(8, 2, 4))
    )


def on_shards(step):
    in_specs = jax.P(), jax.P(), jax.P("d")
    return jax.jit(jax.shard_map(step, mesh=MESH, in_specs=in_specs, out_specs=jax.P()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nothing_is_promoted_in_silence(row, dtype):
    weighting = row.make("a")
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)

    def run(losses, gramian, numbers, norm):
        given = {
            name: gramian if name == "gramian" else numbers
            for name in weighting.needs
            if name != "losses"
        }
        first = weighting.init(losses)
        weights, state = weighting.update(losses, first, **given)
        if weighting.due:
            weighting.due(state)
        if weighting.observe:
            norms = {"cotangent_norm": norm, "gradient_norm": norm}
            state = weighting.observe(state, **norms)
        if weighting.observe_step:
            state = weighting.observe_step(losses, state)
        return weights, first, state

    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        losses = {name: shape() for name in "abc"}
        traced = (losses, shape(3, 3), shape(3), shape())
        weights, first, state = jax.eval_shape(run, *traced)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert all(weight.dtype == wide for weight in weights.values())
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(first) == dtypes(state)
