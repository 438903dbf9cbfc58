"""Gradients looked at now and then: what is seen, what it costs, what is said of it."""

import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import monitoring, racing, weightings
from yoto_jax.checkpoints import Checkpoints
from yoto_jax.testing import Trial, checks

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES = 8
STEPS = 12
SPEC = jax.sharding.PartitionSpec
needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs eight (virtual) devices"
)
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


def loss_fn(w, x):
    y = jnp.tanh(x @ w)
    return {
        "a": jnp.mean((y - 0.5) ** 2),
        "b": jnp.mean((y + 0.5) ** 2),
        "c": jnp.mean(w**2),
    }


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    w = 0.5 * rng.normal(size=(5, 2))
    x = 1 + rng.normal(size=(STEPS, 8 * DEVICES, 5))
    return w.astype(np.float32), x.astype(np.float32)


def run(weighting, scale=1.0, **options):
    """All states of a run, and its gradients, by scan."""
    w, batches = problem()
    step = yoto.value_and_grad(loss_fn, weighting, **options)

    def body(carry, x):
        w, state = carry
        _, grads, state = step(w, state, scale * x)
        return (w - 0.1 * grads, state), grads

    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    (w, state), grads = jax.lax.scan(
        body, (jnp.asarray(w), state), jnp.asarray(batches)
    )
    return state, grads


def from_gradients(gradients, weights=None):
    """Conflicts of gradients (n, K, size), without any of the library."""
    n, count, _ = gradients.shape
    weights = np.ones(count) if weights is None else np.asarray(weights)
    names = [f"l{k:02}" for k in range(count)]
    return monitoring.Conflicts(
        np.arange(n),
        np.einsum("nij,nkj->nik", gradients, gradients),
        {name: np.full(n, w) for name, w in zip(names, weights, strict=True)},
    )


@functools.cache
def oracle():
    """Per-loss gradients (STEPS, K, 10) along the run with fixed weights."""
    w, batches = problem()
    w, seen = jnp.asarray(w), []
    jacobian = jax.jit(jax.jacrev(loss_fn))
    for x in batches:
        rows = [np.ravel(row) for row in jax.tree.leaves(jacobian(w, x))]
        seen.append(np.stack(rows).astype(np.float64))
        update = sum(k * row for k, row in zip(WEIGHTS.values(), rows, strict=True))
        w = w - 0.1 * update.reshape(w.shape)
    return np.stack(seen)


def assert_seen(seen, steps):
    gradients = oracle()[steps]
    np.testing.assert_array_equal(seen.steps, steps)
    expected = np.einsum("nij,nkj->nik", gradients, gradients)
    np.testing.assert_allclose(seen.gramian, expected, rtol=2e-4, atol=1e-6)
    assert {name: set(x) for name, x in seen.loss_weights.items()} == {
        name: {weight} for name, weight in WEIGHTS.items()
    }


# What is made of a Gramian.


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_numbers_are_those_of_the_gradients(count):
    rng = np.random.default_rng(count)
    g, w = rng.normal(size=(5, count, 50)), rng.uniform(0.1, 2, size=count)
    seen = from_gradients(g, w)
    unit = g / np.linalg.norm(g, axis=2, keepdims=True)
    d = np.einsum("k,nkj->nj", w, g)
    names = list(seen.loss_weights)
    for k, name in enumerate(names):
        np.testing.assert_allclose(seen.norms[name], np.linalg.norm(g[:, k], axis=1))
        along = np.sum(g[:, k] * d, axis=1)
        np.testing.assert_allclose(seen.shares[name], w[k] * along / np.sum(d * d, 1))
        lengths = w * np.linalg.norm(g, axis=2)
        np.testing.assert_allclose(seen.sizes[name], lengths[:, k] / lengths.sum(1))
        descent = np.sum(unit[:, k] * d, axis=1) / np.linalg.norm(d, axis=1)
        np.testing.assert_allclose(seen.descents[name], descent, atol=1e-12)
    pairs = list(itertools.combinations(range(count), 2))
    cosines = [np.sum(unit[:, i] * unit[:, j], axis=1) for i, j in pairs]
    assert list(seen.cosines) == [(names[i], names[j]) for i, j in pairs]
    for (i, j), expected in zip(pairs, cosines, strict=True):
        got = seen.cosines[names[i], names[j]]
        np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(sum(seen.shares.values()), 1)
    mean = np.linalg.norm(unit.mean(axis=1), axis=1)
    np.testing.assert_allclose(seen.alignment, 2 * mean**2 - 1, atol=1e-12)
    negative = np.sum([x < 0 for x in cosines], axis=0) if pairs else np.zeros(5)
    np.testing.assert_array_equal(seen.num_conflicts, negative)
    against = np.einsum("nkj,nj->nk", g, d) < 0
    np.testing.assert_array_equal(seen.num_overruled, against.sum(axis=1))


def test_closed_forms():
    g = np.array([[[3.0, 0.0], [-4.0, 3.0], [0.0, 1.0]]])
    seen = from_gradients(g, [1.0, 0.5, 2.0])  # d = (1, 3.5)
    assert seen.cosines["l00", "l01"] == pytest.approx(-0.8)
    assert seen.cosines["l00", "l02"] == 0
    assert seen.cosines["l01", "l02"] == pytest.approx(0.6)
    shares = [x.item() for x in seen.shares.values()]
    np.testing.assert_allclose(shares, np.array([3, 3.25, 7]) / 13.25)
    assert (seen.num_conflicts.item(), seen.num_overruled.item()) == (1, 0)
    overruled = from_gradients(g[:, :2], [1.0, 0.1])  # d = (2.6, 0.3)
    assert overruled.num_overruled.item() == 1
    assert overruled.descents["l01"].item() < 0 > overruled.shares["l01"].item()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_alignment_score_at_its_ends(count):
    alike = from_gradients(np.ones((1, count, 4)) * np.arange(1, count + 1)[:, None])
    np.testing.assert_allclose(alike.alignment, 1)
    orthogonal = from_gradients(np.diag(np.arange(1.0, count + 1))[None])
    np.testing.assert_allclose(orthogonal.alignment, 2 / count - 1, atol=1e-12)


def test_of_two_losses_the_alignment_score_is_their_cosine():
    seen = from_gradients(np.random.default_rng(0).normal(size=(9, 2, 3)))
    np.testing.assert_allclose(seen.alignment, seen.cosines["l00", "l01"])


def test_a_gradient_of_zero_is_not_known_and_has_no_share():
    g = np.random.default_rng(0).normal(size=(20, 3, 30)) + 1
    g[:, 1] = 0
    seen = from_gradients(g)
    assert np.isnan(seen.cosines["l00", "l01"]).all()
    assert np.isnan(seen.descents["l01"]).all()
    np.testing.assert_array_equal(seen.shares["l01"], 0)
    np.testing.assert_allclose(sum(seen.shares.values()), 1)
    others = from_gradients(g[:, [0, 2]])
    np.testing.assert_allclose(seen.alignment, others.alignment)
    (share,) = monitoring.diagnose(seen)
    assert (share.kind, share.losses) == ("share", ("l01",))
    assert "'l01' is 0 of the update (weight 1, gradient of norm 0)" in share.message
    nothing = from_gradients(np.zeros((20, 3, 4)))
    assert np.isnan(nothing.alignment).all()
    assert np.isnan(nothing.shares["l00"]).all()
    assert monitoring.diagnose(nothing) == []


def test_an_update_that_cancels_is_not_divided_by():
    seen = from_gradients(np.array([[[1.0, 2.0], [-1.0, -2.0]]] * 20))
    assert np.isnan([*seen.shares.values(), *seen.descents.values()]).all()
    np.testing.assert_array_equal(seen.num_conflicts, 1)
    np.testing.assert_array_equal(seen.num_overruled, 0)
    assert [x.kind for x in monitoring.diagnose(seen)] == ["conflict"]
    rounded = seen._replace(gramian=seen.gramian * [[1, 1], [1, 1 + 1e-7]])
    assert np.isnan([*rounded.shares.values(), *rounded.descents.values()]).all()
    larger = seen._replace(gramian=seen.gramian * [[1, 1], [1, 1 + 1e-4]])
    np.testing.assert_allclose(sum(larger.shares.values()), 1)


# Looking in the state of a weighting.


@pytest.mark.parametrize(("every", "length"), [(1, 20), (3, 20), (5, 2)])
def test_what_is_seen_under_scan_is_that_of_the_gradients(every, length):
    weighting = monitoring.watched(
        weightings.static(WEIGHTS), every=every, length=length
    )
    state, _ = jax.jit(lambda: run(weighting))()
    assert_seen(monitoring.conflicts(state), np.arange(0, STEPS, every)[-length:])


def test_eagerly_and_compiled_with_one_trace_and_a_state_of_one_size():
    weighting = monitoring.watched(weightings.static(WEIGHTS), every=4, length=3)
    w, batches = problem()
    traces = []

    def step(w, state, x):
        traces.append(None)
        _, grads, state = yoto.value_and_grad(loss_fn, weighting)(w, state, x)
        return w - 0.1 * grads, state

    state = eager = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    kinds = [jax.typeof(x) for x in jax.tree.leaves(state)]
    compiled = jax.jit(step, donate_argnums=1)
    v = w = jnp.asarray(w)
    for x in batches[:6]:
        v, eager = step(v, eager, x)
    del traces[:]
    for x in batches[:6]:
        w, state = compiled(w, state, x)
    assert len(traces) == 1
    assert [jax.typeof(x) for x in jax.tree.leaves(state)] == kinds
    assert_seen(monitoring.conflicts(state), [0, 4])
    assert_seen(monitoring.conflicts(eager), [0, 4])


INNER = {
    "fixed": lambda: weightings.static(WEIGHTS),
    "losses": weightings.famo,
    "gramian": weightings.upgrad,
    "norms": lambda: weightings.gradnorm(alpha=1.0),
    "max_abs": lambda: weightings.lr_annealing("a"),
    "random": lambda: weightings.random(key=3),
    "every": lambda: weightings.every(weightings.upgrad(), 4),
    "hold": lambda: weightings.hold(weightings.upgrad(), 2),
    "wrapped": lambda: weightings.normalize(
        weightings.smooth(weightings.skip_outliers(weightings.imtl_g()))
    ),
    "steered": lambda: weightings.auto_lambda("a"),
}


@pytest.mark.parametrize("name", INNER)
def test_around_any_weighting_the_run_is_the_same(name):
    plain, expected = jax.jit(lambda: run(INNER[name]()))()
    state, grads = jax.jit(lambda: run(monitoring.watched(INNER[name](), every=5)))()
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(state.inner) == jax.tree.structure(plain)
    seen = monitoring.conflicts(state)
    np.testing.assert_array_equal(seen.steps, [0, 5, 10])
    np.testing.assert_allclose(
        seen.gramian[0], np.einsum("ij,kj->ik", oracle()[0], oracle()[0]), rtol=1e-4
    )
    if seen.downstream is None:
        np.testing.assert_allclose(sum(seen.shares.values()), 1, rtol=1e-5)


def test_the_steered_loss_is_told_of():
    weighting = monitoring.watched(INNER["steered"]())
    state, _ = jax.jit(lambda: run(weighting))()
    assert monitoring.conflicts(state).downstream == "a"


def test_the_contract():
    trial = Trial(monitoring.watched(INNER["every"](), every=2))
    counts_steps = {
        "bad batches",
        "bad numbers",
        "absent losses",
    }  # As `recorded` does.
    for what, check in checks().items():
        if what not in counts_steps:
            check(trial)


def test_with_a_record_of_the_weights_in_either_order():
    for wrap in (
        lambda w: monitoring.recorded(monitoring.watched(w, every=3)),
        lambda w: monitoring.watched(monitoring.recorded(w), every=3),
    ):
        state, _ = jax.jit(lambda wrap=wrap: run(wrap(weightings.static(WEIGHTS))))()
        assert_seen(monitoring.conflicts(state), [0, 3, 6, 9])
        assert len(monitoring.history(state).steps) == STEPS


def test_inside_another_wrapper_is_warned_of():
    weighting = weightings.every(monitoring.watched(weightings.equal(), every=1), 2)
    state = weighting.init({"a": 1.0, "b": 2.0})
    with pytest.warns(UserWarning, match="was watched inside .*Every.*watched around"):
        monitoring.conflicts(state)


@pytest.mark.parametrize("wrap", [weightings.normalize, weightings.log])
def test_inside_a_wrapper_that_changes_losses_is_warned_of(wrap):
    weighting = wrap(monitoring.watched(weightings.equal(), every=1))
    state = weighting.init({"a": 1.0, "b": 2.0})
    with pytest.warns(UserWarning, match="watched inside another wrapper"):
        monitoring.conflicts(state)


def test_vmap_over_runs():
    weighting = monitoring.watched(weightings.static(WEIGHTS), every=3)
    scales = jnp.array([1.0, 2.0])
    states, _ = jax.jit(jax.vmap(lambda scale: run(weighting, scale)))(scales)
    assert_seen(monitoring.conflicts(states, index=0), [0, 3, 6, 9])
    for index, scale in enumerate(scales):
        alone, _ = jax.jit(lambda scale=scale: run(weighting, scale))()
        got = monitoring.conflicts(states, index=index)
        np.testing.assert_allclose(
            got.gramian, monitoring.conflicts(alone).gramian, rtol=1e-3, atol=1e-6
        )
    with pytest.raises(ValueError, match="give index= with 1"):
        monitoring.conflicts(states)


def test_lanes_with_weightings_of_their_own():
    arms = racing.one_of({"equal": INNER["fixed"](), "upgrad": weightings.upgrad()})
    weighting = monitoring.watched(arms, every=5)
    w, batches = problem()
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    inner = racing.start(state.inner, 2)
    states = jax.tree.map(lambda x: jnp.stack([x] * 2), state)._replace(inner=inner)
    step = yoto.value_and_grad(loss_fn, weighting)
    step = jax.jit(jax.vmap(step, in_axes=(None, 0, None)))
    for x in batches[:6]:
        _, _, states = step(jnp.asarray(w), states, x)
    for index in range(2):
        seen = monitoring.conflicts(states, index=index)
        np.testing.assert_array_equal(seen.steps, [0, 5])
    assert seen.loss_weights["a"][0] != WEIGHTS["a"]


@needs_devices
@pytest.mark.parametrize("name", ["fixed", "gramian"])
def test_eight_devices_equal_one(name):
    weighting = monitoring.watched(INNER[name](), every=3)
    one, _ = jax.jit(lambda: run(weighting))()
    step = yoto.value_and_grad(loss_fn, weighting, axis_name="devices")
    w, batches = problem()
    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(SPEC(), SPEC(), SPEC("devices")),
        out_specs=(SPEC(), SPEC()),
    )
    def sharded(w, state, x):
        _, grads, state = step(w, state, x)
        return w - 0.1 * grads, state

    mapped = jax.pmap(
        lambda w, state, x: step(w, state, x)[1:],
        axis_name="devices",
        in_axes=(None, 0, 0),
    )
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    replicas = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    for x in batches:
        grads, replicas = mapped(w, replicas, x.reshape(DEVICES, -1, *x.shape[1:]))
        w, state = sharded(w, state, x)
        np.testing.assert_allclose(grads[0], grads[-1], rtol=1e-6)
    expected = monitoring.conflicts(one)
    for got in (
        monitoring.conflicts(state),
        monitoring.conflicts(replicas, index=0),
        monitoring.conflicts(replicas, index=DEVICES - 1),
    ):
        np.testing.assert_array_equal(got.steps, expected.steps)
        np.testing.assert_allclose(got.gramian, expected.gramian, rtol=1e-3, atol=1e-6)


def counting(calls):
    """``loss_fn`` that counts its backward passes."""

    @jax.custom_vjp
    def mark(x):
        return x

    def backward(_, cotangent):
        jax.debug.callback(lambda _: calls.append(None), cotangent)
        return (cotangent,)

    mark.defvjp(lambda x: (x, None), backward)
    return lambda w, x: loss_fn(mark(w), x)


def backward_passes(weighting):
    """Of each step."""
    calls, counts = [], []
    w, batches = problem()
    step = jax.jit(yoto.value_and_grad(counting(calls), weighting))
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    for x in batches[:7]:
        _, _, state = step(w, state, x)
        jax.effects_barrier()
        counts.append(len(calls))
    return np.diff([0, *counts]).tolist()


def test_between_looks_nothing_is_computed():
    assert backward_passes(weightings.static(WEIGHTS)) == [1] * 7
    plain = monitoring.watched(weightings.static(WEIGHTS), every=3)
    assert backward_passes(plain) == [4, 1, 1, 4, 1, 1, 4]
    own = monitoring.watched(weightings.every(weightings.upgrad(), 4), every=3)
    assert backward_passes(own) == [4, 1, 1, 4, 4, 1, 4]
    # One that keeps the gradients for the update costs nothing more.
    always = monitoring.watched(weightings.upgrad(), every=3)
    assert always.due is None
    assert backward_passes(always) == backward_passes(weightings.upgrad()) == [3] * 7


def test_the_compiled_step_between_looks_is_that_of_the_weighting_inside():
    w, batches = problem()
    inner = weightings.static(WEIGHTS)

    def products(weighting):
        state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
        step = yoto.value_and_grad(loss_fn, weighting)
        equations = jax.make_jaxpr(step)(w, state, batches[0]).jaxpr.eqns
        names = [equation.primitive.name for equation in equations]
        return names.count("dot_general"), names.count("cond")

    outside, conditions = products(inner)
    assert conditions == 0
    assert products(monitoring.watched(inner)) == (outside, 1)


def test_a_bad_batch_leaves_no_row_and_the_next_ones_do():
    weighting = monitoring.watched(weightings.static(WEIGHTS), every=2)
    w, batches = problem()
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    for k, x in enumerate(batches[:7]):
        _, _, state = step(w, state, x * (np.nan if k in (2, 3) else 1))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    seen = monitoring.conflicts(state)
    np.testing.assert_array_equal(seen.steps, [0, 4, 6])
    assert np.isfinite(seen.gramian).all()
    assert int(state.num_skipped) == 2


@pytest.mark.parametrize("inner", ["fixed", "gramian"])
def test_absent_losses_are_not_known(inner):
    def masked(w, x):
        losses = loss_fn(w, x)
        # What stands in for an absent loss is of no consequence.
        there = {"a": x[0, 0] > 0, "b": x[0, 0] <= 0, "c": jnp.array(True)}
        return yoto.MaskedLosses(losses, there)

    w, batches = problem()
    batches = batches.copy()
    batches[:, 0, 0] = [1, 1, -1, 1, -1, -1, 1, -1, 1, -1, 1, 1]
    weighting = monitoring.watched(INNER[inner](), every=1)
    step = jax.jit(yoto.value_and_grad(masked, weighting))
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    for x in batches:
        _, _, state = step(w, state, x)
    seen = monitoring.conflicts(state)
    there = batches[:, 0, 0] > 0
    assert len(seen.steps) == STEPS
    assert np.isnan(seen.cosines["a", "b"]).all()
    for name, known in (("a", there), ("b", ~there), ("c", np.ones(STEPS, bool))):
        for values in (seen.norms, seen.shares, seen.loss_weights, seen.descents):
            np.testing.assert_array_equal(np.isfinite(values[name]), known)
    np.testing.assert_allclose(np.nansum([*seen.shares.values()], axis=0), 1, rtol=1e-5)
    assert "no conflict" not in {x.kind for x in monitoring.diagnose(seen)}


def test_what_stands_for_an_absent_loss_does_not_matter():
    weighting = monitoring.watched(weightings.equal(), every=1)
    losses = {"a": 1.0, "b": 2.0}
    present = {"a": jnp.array(True), "b": jnp.array(False)}
    gramian = jnp.array([[4.0, jnp.nan], [jnp.nan, jnp.inf]])
    _, state = weighting.update(
        losses, weighting.init(losses), gramian=gramian, present=present
    )
    seen = monitoring.conflicts(state)
    assert seen.norms["a"] == 2
    assert np.isnan(seen.norms["b"]).all()
    assert (seen.shares["a"], seen.num_conflicts) == (1, 0)


def test_one_loss_and_forty():
    def many(w, count):
        return {f"l{k:02}": jnp.sum((w - k) ** 2) for k in range(count)}

    w = jnp.linspace(-1.0, 1.0, 7)
    for count in (1, 40):
        weighting = monitoring.watched(weightings.equal(), every=2)
        step = jax.jit(
            yoto.value_and_grad(lambda w, count=count: many(w, count), weighting)
        )
        state = weighting.init(jax.eval_shape(lambda count=count: many(w, count)))
        for _ in range(3):
            _, _, state = step(w, state)
        seen = monitoring.conflicts(state)
        assert len(seen.cosines) == count * (count - 1) // 2
        g = np.stack([2 * (w - k) for k in range(count)])
        np.testing.assert_allclose(seen.gramian[1], g @ g.T, rtol=1e-5)
        np.testing.assert_allclose(sum(seen.shares.values()), 1, rtol=1e-5)
        assert monitoring.diagnose(seen) == []  # Two looks tell nothing.


def test_bfloat16_is_added_up_in_float32():
    w, batches = problem()
    weighting = monitoring.watched(weightings.static(WEIGHTS), every=1)
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (w, batches[0]))
    state = weighting.init(jax.eval_shape(loss_fn, *low))
    _, grads, state = jax.jit(yoto.value_and_grad(loss_fn, weighting))(
        low[0], state, low[1]
    )
    assert grads.dtype == jnp.bfloat16
    assert state.rows.dtype == jnp.float32
    seen = monitoring.conflicts(state)
    exact = from_gradients(oracle()[:1], list(WEIGHTS.values()))
    for got, expected in zip(
        seen.cosines.values(), exact.cosines.values(), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=0.03)


def test_float64_losses_and_a_traced_every():
    with jax.enable_x64(True):
        weighting = monitoring.watched(weightings.static(WEIGHTS), every=jnp.int32(3))
        w, batches = jax.tree.map(lambda x: jnp.asarray(x, float), problem())
        step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
        state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
        for x in batches:
            _, grads, state = step(w, state, x)
            w = w - 0.1 * grads
        assert_seen(monitoring.conflicts(state), [0, 3, 6, 9])


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    weighting = monitoring.watched(weightings.every(weightings.upgrad(), 2), every=3)
    w, batches = problem()
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
    state = weighting.init(jax.eval_shape(loss_fn, w, batches[0]))
    for x in batches[:5]:
        _, _, state = step(w, state, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
        restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
    for x in batches[5:]:
        _, _, state = step(w, state, x)
        _, _, restored = step(w, restored, x)
    before, after = monitoring.conflicts(state), monitoring.conflicts(restored)
    np.testing.assert_array_equal(before.gramian, after.gramian)
    np.testing.assert_array_equal(after.steps, [0, 3, 6, 9])
    assert list(after.loss_weights) == ["a", "b", "c"]


def test_in_aggregate():
    weighting = monitoring.watched(weightings.static(WEIGHTS), every=2)
    w, batches = problem()
    jacobian = yoto.value_and_jacobian(loss_fn)
    losses, _ = jax.eval_shape(jacobian, w, batches[0])
    tx = optax.chain(yoto.aggregate(weighting, losses), optax.sgd(0.1))
    w, state = jnp.asarray(w), tx.init(w)
    for x in batches:
        losses, rows = jacobian(w, x)
        updates, state = tx.update(rows, state, w, losses=losses)
        w = optax.apply_updates(w, updates)
    assert_seen(monitoring.conflicts(state), np.arange(0, STEPS, 2))


# Before any training.


def batches_of_problem():
    return ((x,) for x in problem()[1])


def test_measured_conflicts_are_those_of_the_gradients():
    w, batches = problem()
    seen = monitoring.measure_conflicts(
        loss_fn, w, batches_of_problem(), loss_weights=WEIGHTS
    )
    rows = [jax.tree.leaves(jax.jacrev(loss_fn)(w, x)) for x in batches[:3]]
    g = np.stack([[np.ravel(row) for row in each] for each in rows])
    assert len(seen.steps) == STEPS
    np.testing.assert_allclose(
        seen.gramian[:3], np.einsum("nij,nkj->nik", g, g), rtol=1e-4, atol=1e-6
    )
    assert {name: x[0] for name, x in seen.loss_weights.items()} == WEIGHTS
    equal = monitoring.measure_conflicts(loss_fn, w, batches_of_problem())
    assert {x[0] for x in equal.loss_weights.values()} == {1.0}
    part = monitoring.measure_conflicts(
        lambda p, x: (loss_fn(p["w"], x), x),
        {"w": w, "unused": jnp.zeros(3)},
        batches_of_problem(),
        has_aux=True,
        gradients=yoto.of_parameters(select=lambda p: p["w"]),
    )
    np.testing.assert_allclose(part.gramian, equal.gramian, rtol=1e-5)


def test_measured_conflicts_of_masked_losses_and_of_a_bad_batch():
    def masked(w, x):
        there = {"a": x[0, 0] > 0, "b": jnp.array(True), "c": jnp.array(True)}
        return yoto.MaskedLosses(loss_fn(w, x), there)

    w, batches = problem()
    batches = batches[:4].copy()
    batches[:, 0, 0] = [1, -1, np.nan, 1]
    seen = monitoring.measure_conflicts(masked, w, [(x,) for x in batches])
    np.testing.assert_array_equal(seen.steps, [0, 1, 3])
    np.testing.assert_array_equal(np.isnan(seen.norms["a"]), [False, True, False])


def test_measured_conflicts_of_the_representation():
    encode = lambda params, x: x @ params["w"]
    heads = lambda params, z, x: {
        "a": jnp.sum(z @ params["a"]),
        "b": -jnp.sum(z @ params["a"]),
    }
    params = {"w": problem()[0], "a": jnp.array([1.0, 2.0])}
    seen = monitoring.measure_conflicts(
        heads,
        params,
        batches_of_problem(),
        gradients=yoto.of_representation(encode),
    )
    np.testing.assert_allclose(seen.cosines["a", "b"], -1, rtol=1e-6)
    rows = 8 * DEVICES
    np.testing.assert_allclose(seen.norms["a"], np.sqrt(5 * rows), rtol=1e-6)


# What is said of it.


def kinds(*args, **kwargs):
    return {x.kind: x.losses for x in monitoring.diagnose(*args, **kwargs)}


def noisy(directions, looks, noise=0.3, size=100, seed=0):
    """Gradients around fixed directions; noise is relative to their length."""
    rng = np.random.default_rng(seed)
    g = np.zeros((looks, len(directions), size))
    g += rng.normal(size=g.shape) * noise / np.sqrt(size)
    g[:, :, : len(directions[0])] += np.asarray(directions)
    return g


AGREEING = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]
OPPOSED = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -0.6, 0.8]]


def test_no_conflict_is_said_with_its_numbers():
    seen = from_gradients(noisy(AGREEING, 40))
    (finding,) = monitoring.diagnose(seen)
    assert finding.kind == "no conflict"
    assert finding.losses == ("l00", "l01", "l02")
    assert "The losses do not conflict" in finding.message
    assert "to 0.7" in finding.message
    assert "('l00' and 'l01')" in finding.message
    assert "last 40 looks (steps 0 to 39)" in finding.message
    pair = from_gradients(noisy(AGREEING[:2], 40))
    assert "gradients are 0.7" in monitoring.diagnose(pair)[0].message


def test_a_conflict_names_its_pair_alone():
    seen = from_gradients(noisy(OPPOSED, 40))
    assert kinds(seen) == {"conflict": ("l01", "l02")}
    (finding,) = monitoring.diagnose(seen)
    assert "'l01' and 'l02' in 100% of the looks" in finding.message
    assert "(mean cosine -0.5" in finding.message


def test_a_conflict_in_most_of_the_looks_is_counted():
    g = noisy(OPPOSED, 50, noise=0.1)
    g[::5, 2] = g[::5, 2] * [1, -1, *[1] * 98]  # Every fifth look agrees.
    (finding,) = monitoring.diagnose(from_gradients(g))
    assert "'l01' and 'l02' in 80% of the looks" in finding.message
    there = np.arange(50) % 2 == 0
    seen = from_gradients(g)
    gramian = seen.gramian.copy()
    gramian[~there, 2] = gramian[~there, :, 2] = np.nan
    halved = seen._replace(gramian=gramian)
    assert kinds(halved)["conflict"] == ("l01", "l02")


@pytest.mark.parametrize(("looks", "fewest"), [(10, 10), (20, 16), (100, 63)])
def test_a_pair_is_judged_as_a_coin_is(looks, fewest):
    """Of a fair coin, so many tails or more have a probability below 0.01."""
    for negative in (fewest - 1, fewest):
        g = np.zeros((looks, 2, 2))
        g[:, 0, 0] = 1
        g[:, 1] = [0.6, 0.8]
        g[:negative, 1, 0] = -0.6
        tail = sum(math.comb(looks, k) for k in range(negative, looks + 1))
        assert (tail / 2**looks < 0.01) == (negative == fewest)
        assert ("conflict" in kinds(from_gradients(g))) == (negative == fewest)


def test_a_cosine_that_is_hardly_negative_is_no_conflict():
    g = np.zeros((50, 2, 2))
    g[:, 0, 0], g[:, 1] = 1, [-0.09, 1]
    assert set(kinds(from_gradients(g))) == {"no conflict"}
    g[:, 1] = [-0.12, 1]
    assert set(kinds(from_gradients(g))) == {"conflict"}


@pytest.mark.parametrize("looks", [1, 2, 9])
def test_of_few_looks_nothing_is_said(looks):
    for directions in (AGREEING, OPPOSED):
        assert kinds(from_gradients(noisy(directions, looks), [1, 1, 1e-9])) == {}
    assert kinds(from_gradients(np.zeros((0, 2, 2)))) == {}


def test_the_last_looks_count():
    g = np.concatenate([noisy(OPPOSED, 30), noisy(AGREEING, 20)])
    seen = from_gradients(g)
    assert set(kinds(seen, last=20)) == {"no conflict"}
    assert "conflict" in kinds(seen._replace(gramian=seen.gramian[::-1]), last=30)
    with pytest.raises(ValueError, match="last must be 10 or more, got 9"):
        kinds(seen, last=9)


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("looks", [10, 30])
def test_orthogonal_gradients_are_no_conflict(count, looks):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(looks, 60, count)))[0].swapaxes(1, 2)
    assert set(kinds(from_gradients(q))) == {"no conflict"}


@pytest.mark.parametrize("size", [2, 10, 300])
@pytest.mark.parametrize("looks", [10, 20, 60])
def test_noise_alarms_nobody(size, looks):
    rng = np.random.default_rng(1)
    problems = {"conflict", "overruled", "share", "representation"}
    alarms = 0
    for _ in range(60):
        count = rng.integers(2, 6)
        seen = from_gradients(rng.normal(size=(looks, count, size)))
        other = from_gradients(rng.normal(size=(looks, count, size)))
        alarms += bool(problems & set(kinds(seen, representation=other)))
    assert alarms <= 3  # At most 0.01 for pairs, and for the update, are promised.


def test_of_noise_alone_no_agreement_is_said_either():
    rng = np.random.default_rng(2)
    said = [kinds(from_gradients(rng.normal(size=(20, 3, 4)))) for _ in range(60)]
    assert sum("no conflict" in x for x in said) <= 1


def test_an_overruled_loss():
    directions = [[3.0, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]
    seen = from_gradients(noisy(directions, 40, noise=0.1))
    assert kinds(seen) == {"conflict": ("l00", "l01"), "overruled": ("l01",)}
    message = monitoring.diagnose(seen)[1].message
    assert "makes losses worse: 'l01' in 100% of the looks" in message
    fairer = from_gradients(noisy(directions, 40, noise=0.1), [0.2, 1.0, 1.0])
    assert set(kinds(fairer)) == {"conflict"}


def test_a_small_share():
    g = noisy(AGREEING, 40, noise=0.1)
    seen = from_gradients(g, [1.0, 1.0, 1e-3])
    assert kinds(seen)["share"] == ("l02",)
    message = next(x for x in monitoring.diagnose(seen) if x.kind == "share").message
    assert "of the update (weight 0.001, gradient of norm 1)" in message
    assert "share" not in kinds(seen._replace(downstream="l02"))
    assert "share" not in kinds(from_gradients(g, [1.0, 1.0, 0.5]))
    # At a right angle to the update, and not small.
    g = np.array([[[1.0, 0.0], [-1.0, 1.0]]] * 20)
    assert "share" not in kinds(from_gradients(g, [2.0, 1.0]))


def test_forty_even_losses_have_their_shares():
    g = np.repeat(np.eye(40)[None], 20, axis=0)
    assert set(kinds(from_gradients(g))) == {"no conflict"}


def test_where_losses_conflict():
    agree, oppose = (from_gradients(noisy(x, 40)) for x in (AGREEING, OPPOSED))
    here = monitoring.diagnose(agree, representation=oppose)
    assert [x.kind for x in here] == ["no conflict", "representation"]
    assert here[1].losses == ("l01", "l02")
    assert "conflict at the representation, and not over the param" in here[1].message
    there = monitoring.diagnose(oppose, representation=agree)
    assert [x.kind for x in there] == ["conflict", "representation"]
    assert "conflict over the parameters, and not at the repr" in there[1].message
    for same in (agree, oppose):
        assert "representation" not in kinds(same, representation=same)
    few = from_gradients(noisy(OPPOSED, 9))
    assert "representation" not in kinds(agree, representation=few)


def test_one_loss_has_nobody_to_conflict_with():
    assert kinds(from_gradients(noisy([[1.0]], 40))) == {}


def test_a_real_run_of_opposed_losses():
    def opposed(w, x):
        y = x @ w
        return {"up": jnp.mean((y - 1) ** 2), "down": jnp.mean((y + 1) ** 2)}

    weighting = monitoring.watched(weightings.equal(), every=1)
    w, batches = jnp.zeros(5), 1 + jax.random.normal(jax.random.key(3), (20, 32, 5))
    step = jax.jit(yoto.value_and_grad(opposed, weighting))
    state = weighting.init(jax.eval_shape(opposed, w, batches[0]))
    for x in batches:
        _, grads, state = step(w, state, x)
        w = w - 0.01 * grads
    assert kinds(monitoring.conflicts(state))["conflict"] == ("down", "up")


# What is refused.


def test_errors_name_what_is_wrong():
    equal = weightings.equal()
    with pytest.raises(TypeError, match="weighting must be a LossWeighting"):
        monitoring.watched(optax.sgd(0.1))
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        monitoring.watched(equal, every=0)
    with pytest.raises(TypeError, match="length must be an integer"):
        monitoring.watched(equal, length=2.0)
    weighting = monitoring.watched(equal)
    losses = {"a": 1.0, "b": 2.0}
    state = weighting.init(losses)
    with pytest.raises(ValueError, match="watched needs gramian=: use it in value_"):
        weighting.update(losses, state)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) .* 'a', 'b', got \(3, 3\)"):
        weighting.update(losses, state, gramian=jnp.eye(3))
    with pytest.raises(TypeError, match="state must be the WatchedState"):
        weighting.update(losses, equal.init(losses), gramian=jnp.eye(2))
    with pytest.raises(ValueError, match="no watched weighting in this state: put"):
        monitoring.conflicts(equal.init(losses))
    with pytest.raises(ValueError, match="2 watched weightings in this state, at '0'"):
        monitoring.conflicts((state, state))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(monitoring.conflicts)(state)
    for wrong in (state, None):
        with pytest.raises(TypeError, match="conflicts must be Conflicts, what"):
            monitoring.diagnose(wrong)
        with pytest.raises(TypeError, match="conflicts must be Conflicts, what"):
            monitoring.plot_conflicts(wrong)
    seen, others = (from_gradients(noisy(AGREEING[:n], 20)) for n in (3, 2))
    with pytest.raises(TypeError, match="last must be an integer, got 2.5"):
        monitoring.diagnose(seen, last=2.5)
    with pytest.raises(ValueError, match="last must be positive"):
        monitoring.diagnose(seen, last=0)
    with pytest.raises(ValueError, match="representation must be of the same losses"):
        monitoring.diagnose(seen, representation=others)


def test_what_cannot_be_measured():
    w, batches = problem()
    measure = functools.partial(monitoring.measure_conflicts, loss_fn, w)
    with pytest.raises(ValueError, match="batches is empty"):
        measure([])
    with pytest.raises(TypeError, match="must be a tuple of the arguments"):
        measure(batches)
    with pytest.raises(ValueError, match="loss_weights"):
        measure([(batches[0],)], loss_weights={"a": 1.0})


# Figures.


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot

    yield matplotlib.pyplot
    matplotlib.pyplot.close("all")


def texts(ax):
    return [x.get_text() for x in ax.texts]


def test_a_figure_has_the_numbers_and_the_names(plt):
    seen = from_gradients(noisy(OPPOSED, 30))
    matrix, cosines, shares = monitoring.plot_conflicts(seen)
    mean = f"{seen.cosines['l01', 'l02'].mean():.2f}"
    assert texts(matrix).count(mean) == 2
    assert len(texts(matrix)) == 6
    assert {*texts(cosines)} == {"l00, l01", "l00, l02", "l01, l02"}
    assert {*texts(shares)} == {"l00", "l01", "l02"}
    drawn = {line.get_label(): line.get_ydata() for line in shares.get_lines()}
    np.testing.assert_array_equal(drawn["l01"], seen.shares["l01"])
    _, axes = plt.subplots(3)
    again = monitoring.plot_conflicts(seen._replace(downstream="l01"), axes=axes)
    assert again is axes
    assert {*texts(axes[2])} == {"l00", "l02"}


def test_a_figure_of_many_losses_leaves_out_most(plt):
    seen = from_gradients(np.random.default_rng(0).normal(size=(5, 20, 30)))
    matrix, cosines, shares = monitoring.plot_conflicts(seen)
    assert texts(matrix) == []
    assert len(texts(cosines)) == len(texts(shares)) == 8
    lowest = min(seen.cosines, key=lambda pair: seen.cosines[pair].mean())
    assert ", ".join(lowest) in texts(cosines)
    assert cosines.get_title() == "cosine: the 8 lowest of 190"


def test_a_figure_of_one_look_of_one_loss_and_of_what_is_not_known(plt):
    monitoring.plot_conflicts(from_gradients(noisy(AGREEING, 1)))
    _, cosines, _ = monitoring.plot_conflicts(from_gradients(noisy([[1.0]], 3)))
    assert texts(cosines) == []
    nothing = from_gradients(np.zeros((3, 2, 4)))
    _, _, shares = monitoring.plot_conflicts(nothing)
    shares.figure.canvas.draw()
    with pytest.raises(ValueError, match="no gradients have been looked at yet"):
        monitoring.plot_conflicts(from_gradients(np.zeros((0, 2, 4))))
    with pytest.raises(ValueError, match=r"axes must be three.*got \(2,\)"):
        monitoring.plot_conflicts(nothing, axes=plt.subplots(2)[1])


def test_a_figure_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"yoto_jax\[monitoring\]"):
        monitoring.plot_conflicts(from_gradients(noisy(AGREEING, 3)))
