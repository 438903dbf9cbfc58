"""Weightings made of other weightings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import make_weighting, monitoring, weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 1.0}]


def inverse(needs=("losses",), **options):
    """Weights 1 / loss, or the square root of the inverse diagonal of a Gramian."""

    def update(losses, inner, spec, **seen):
        gramian = seen.get("gramian")
        weights = 1 / losses if gramian is None else jnp.diagonal(gramian) ** -0.5
        return weights, inner + 1.0

    return make_weighting(
        lambda spec: jnp.zeros((), spec.dtype), update, needs=needs, **options
    )


def run(weighting, steps=STEPS, **statistics):
    state = weighting.init(steps[0])
    history = []
    for losses in steps:
        weights, state = weighting.update(losses, state, **statistics)
        chex.assert_trees_all_equal(weights, optax.tree.get(state, "loss_weights"))
        history.append([float(weights[name]) for name in sorted(weights)])
    return np.array(history), state


def test_every_updates_at_the_first_step_and_then_so_often():
    history, state = run(weightings.every(inverse(), 2))
    np.testing.assert_allclose(history, [[1, 0.25], [1, 0.25], [0.25, 1]])
    assert int(state.inner.num_updates) == 2
    assert float(state.inner.inner) == 2.0


def test_hold_updates_in_the_first_steps_alone():
    history, state = run(weightings.hold(inverse(), 2))
    np.testing.assert_allclose(history, [[1, 0.25], [0.5, 0.5], [0.5, 0.5]])
    assert int(state.inner.num_updates) == 2
    assert float(state.inner.inner) == 2.0


def test_hold_looks_for_so_many_batches_that_are_not_skipped():
    weighting = weightings.hold(weightings.skip_outliers(inverse()), 2)
    state = weighting.init(STEPS[0])
    due = []
    for losses in (STEPS[0], {"a": jnp.nan, "b": 1.0}, STEPS[1], STEPS[2]):
        due.append(bool(weighting.due(state)))
        _, state = weighting.update(losses, state)
    assert due == [True, True, True, False]


def test_every_of_every_is_due_when_both_are():
    weighting = weightings.every(weightings.every(inverse(), 2), 3)
    state = weighting.init(STEPS[0])
    due = []
    for k in range(12):
        due.append(bool(weighting.due(state)))
        _, state = weighting.update(STEPS[k % 3], state)
    # The inner one counts the calls that reach it, which are those of the outer one.
    assert [k for k, now in enumerate(due) if now] == [0, 6]


def test_smooth_is_an_average_that_starts_at_the_first_weights():
    history, _ = run(weightings.smooth(inverse(), decay=0.75))
    first = np.array([1, 0.25])
    second = 0.75 * first + 0.25 * np.array([0.5, 0.5])
    third = 0.75 * second + 0.25 * np.array([0.25, 1.0])
    np.testing.assert_allclose(history, [first, second, third])


def test_smooth_moves_only_when_the_weights_inside_do():
    history, _ = run(weightings.smooth(weightings.every(inverse(), 2), decay=0.5))
    np.testing.assert_allclose(history, [[1, 0.25], [1, 0.25], [0.625, 0.625]])


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_normalize_divides_by_a_running_mean(decay):
    history, state = run(
        weightings.normalize(weightings.equal(reduction="sum"), decay=decay)
    )
    values = np.array([[s["a"], s["b"]] for s in STEPS])
    scale, expected = values[0], []
    for value in values:
        scale = scale if not expected else decay * scale + (1 - decay) * value
        expected.append(1 / scale)
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    np.testing.assert_allclose([state.loss_scales[n] for n in "ab"], scale)


@pytest.mark.parametrize("name", ["famo", "uncertainty", "dwa", "relobralo", "yoto"])
def test_normalized_weightings_do_not_see_the_unit_of_a_loss(name):
    make = {"yoto": lambda: weightings.yoto("a")}.get(name) or getattr(weightings, name)
    units = {"a": 1000.0, "b": 0.01}
    plain, _ = run(weightings.normalize(make()))
    scaled_steps = [{n: units[n] * s[n] for n in s} for s in STEPS]
    scaled, _ = run(weightings.normalize(make()), scaled_steps)
    np.testing.assert_allclose(scaled * [1000.0, 0.01], plain, rtol=1e-4)


def test_normalize_scales_gradient_statistics():
    gramian = jnp.array([[4.0, 1.0], [1.0, 9.0]])
    weighting = weightings.normalize(inverse(needs=("gramian",)), decay=1.0)
    history, _ = run(weighting, gramian=gramian)
    # Gradients of the scaled losses have norms 2 / 1 and 3 / 4.
    np.testing.assert_allclose(history[-1], [1 / 2, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.smooth(w, decay=0.5),
        lambda w: weightings.normalize(w, decay=0.5),
        lambda w: weightings.every(w, 1),
        lambda w: weightings.smooth(weightings.normalize(w), decay=0.5),
    ],
)
def test_a_bad_batch_is_held_through_wrappers(wrap):
    weighting = wrap(inverse())
    state = weighting.init(STEPS[0])
    for losses in STEPS:
        weights, state = weighting.update(losses, state)
    held, after = weighting.update({"a": jnp.nan, "b": 1.0}, state)
    chex.assert_trees_all_equal(held, weights)
    assert int(optax.tree.get(after, "num_skipped")) == 1
    resumed, _ = weighting.update(STEPS[0], after)
    expected, _ = weighting.update(STEPS[0], state)
    chex.assert_trees_all_equal(resumed, expected)


def test_observers_reach_the_weighting_inside():
    inner = inverse(
        observe=lambda inner, spec, *, cotangent_norm, gradient_norm: (
            inner + cotangent_norm / gradient_norm
        ),
        observe_step=lambda losses, inner, spec: inner + 100 * jnp.sum(losses),
    )
    for wrap in (
        lambda w: weightings.smooth(w),
        lambda w: weightings.every(w, 2),
        lambda w: weightings.normalize(w),
    ):
        weighting = wrap(inner)
        state = weighting.init(STEPS[0])
        state = weighting.observe(state, cotangent_norm=6.0, gradient_norm=2.0)
        assert float(state.inner.inner) == 3.0
        state = weighting.observe_step(STEPS[0], state)
        assert float(state.inner.inner) == 503.0


def test_wrappers_pass_on_what_is_needed():
    inner = inverse(needs=("gramian", "losses"), downstream="a")
    for wrap in (weightings.smooth, lambda w: weightings.every(w, 3)):
        assert wrap(inner).needs == inner.needs
        assert wrap(inner).downstream == "a"
        assert wrap(inner).observe is None
    needs = weightings.normalize(inverse(needs=("gramian",))).needs
    assert needs == ("losses", "gramian")


@pytest.mark.parametrize(
    "wrap",
    [
        weightings.smooth,
        weightings.normalize,
        weightings.skip_outliers,
        monitoring.recorded,
        lambda w: weightings.every(w, 2),
        lambda w: weightings.hold(weightings.every(w, 2), 2),
    ],
)
def test_the_state_of_a_wrapper_tells_what_that_of_a_weighting_does(wrap):
    _, state = run(wrap(inverse()), STEPS[:2])
    assert state.loss_weights is optax.tree.get(state, "loss_weights")
    assert int(state.num_updates) == int(optax.tree.get(state, "num_updates")) > 0
    assert int(state.num_skipped) == 0


def test_a_state_without_weights_says_so():
    state = yoto.skip_outliers(optax.sgd(0.1), losses=1).init(jnp.zeros(2))
    assert not hasattr(state, "loss_weights")
    with pytest.raises(AttributeError, match="no loss_weights in what this Skip"):
        _ = state.loss_weights


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        weightings.every(inverse(), 0)
    with pytest.raises(ValueError, match="after must be positive"):
        weightings.hold(inverse(), 0)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        weightings.smooth(inverse(), decay=1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -1"):
        weightings.normalize(inverse(), decay=-1)
    for wrap in (weightings.smooth, weightings.normalize):
        weighting = wrap(inverse())
        with pytest.raises(ValueError, match="missing: 'b'; unexpected: 'c'"):
            weighting.update({"a": 1.0, "c": 1.0}, weighting.init(STEPS[0]))


def test_wrappers_under_scan_and_vmap():
    weighting = weightings.normalize(weightings.smooth(weightings.every(inverse(), 2)))
    losses = jax.tree.map(lambda *x: jnp.array(x), *STEPS)

    def run_all(losses):
        state = weighting.init(STEPS[0])
        step = lambda state, losses: weighting.update(losses, state)[::-1]
        return jax.lax.scan(step, state, losses)[1]

    expected, _ = run(weighting)
    got = run_all(losses)
    np.testing.assert_allclose(np.stack([got["a"], got["b"]], 1), expected, rtol=1e-6)
    batched = jax.vmap(run_all)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), losses))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), got, rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.normalize(weightings.smooth(w, decay=0.5)),
        lambda w: weightings.smooth(weightings.normalize(w), decay=0.5),
        lambda w: weightings.normalize(weightings.every(weightings.smooth(w), 2)),
    ],
)
def test_nested_wrappers_keep_their_units_apart(wrap):
    losses = {"a": 1e-3, "b": 2e-3}
    history, _ = run(wrap(weightings.equal(reduction="sum")), [losses] * 6)
    np.testing.assert_allclose(history, [[1000, 500]] * 6, rtol=1e-5)


def test_smooth_twice_is_the_average_of_an_average():
    history, _ = run(
        weightings.smooth(weightings.smooth(inverse(), decay=0.5), decay=0.5)
    )
    once, _ = run(weightings.smooth(inverse(), decay=0.5))
    twice = once.copy()
    for k in range(1, len(once)):
        twice[k] = 0.5 * twice[k - 1] + 0.5 * once[k]
    np.testing.assert_allclose(history, twice, rtol=1e-6)


def test_every_tries_again_after_a_bad_batch():
    weighting = weightings.every(inverse(), 100)
    bad = {"a": jnp.nan, "b": 1.0}
    history, state = run(weighting, [bad, {"a": 0.25, "b": 0.5}, STEPS[0]])
    np.testing.assert_allclose(history[1:], [[4, 2], [4, 2]])
    assert int(state.inner.num_skipped) == 1


def test_a_loss_of_zero_keeps_its_scale():
    weighting = weightings.normalize(weightings.upgrad(), decay=0.9)
    state = weighting.init({"a": 0.0, "hinge": 0.0})
    gramian = jnp.diag(jnp.array([1.0, 0.0]))
    update = jax.jit(lambda s, x: weighting.update(x, s, gramian=gramian)[1])
    state = update(state, {"a": 1.0, "hinge": 4.0})
    for _ in range(2000):
        state = update(state, {"a": 1.0, "hinge": 0.0})
    assert int(optax.tree.get(state, "num_skipped")) == 0
    assert float(state.loss_scales["hinge"]) == 4.0
    fresh = update(weighting.init({"a": 0.0, "hinge": 0.0}), {"a": 1e-20, "hinge": 0.0})
    assert float(fresh.loss_scales["hinge"]) == 0.0


def test_normalized_statistics_have_no_unit():
    for name, power in {"alignment": 2, "ntk_diagonal": 1, "norms": 1}.items():
        inner = make_weighting(
            lambda spec: (),
            lambda losses, inner, spec, **seen: (*seen.values(), inner),
            needs=(name,),
            downstream="b",
        )
        weighting = weightings.normalize(inner)
        shown = []
        for unit in (1.0, 100.0):
            losses = {"a": 2.0, "b": 3.0 * unit}
            value = jnp.array([5.0, 7.0 * unit**power])
            if name == "alignment":
                value = jnp.array([5.0 * unit, 7.0 * unit**2])
            seen = {name: value}
            _, state = weighting.update(losses, weighting.init(losses), **seen)
            shown.append([float(state.normalized[n]) for n in "ab"])
        np.testing.assert_allclose(*shown, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot tell the unit of curvature"):
        weightings.normalize(inverse(needs=("curvature",)))


def test_no_gradient_flows_through_normalised_weights():
    weighting = weightings.normalize(weightings.equal(reduction="sum"))
    state = weighting.init({"a": 1.0})

    def composite(x):
        weights, _ = weighting.update({"a": x}, state)
        return weights["a"] * x

    np.testing.assert_allclose(jax.grad(composite)(4.0), 0.25)


def test_a_weighting_that_counts_nothing_can_be_wrapped():
    def update(losses, state, **_):
        weights = jax.tree.map(lambda x: jnp.float32(1.0) / x, losses)
        return weights, {"loss_weights": weights}

    one = lambda losses: {"loss_weights": jax.tree.map(jnp.ones_like, losses)}
    own = inverse()._replace(init=one, update=update)
    history, _ = run(weightings.smooth(own, decay=0.75))
    expected, _ = run(weightings.smooth(inverse(), decay=0.75))
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    run(weightings.normalize(weightings.every(own, 2)))
