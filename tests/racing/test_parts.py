"""The parts of a race: weightings in lanes, cuts, weights in units of norms."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import racing
from yoto_jax.testing import check_weighting

pytestmark = pytest.mark.usefixtures("quick_compilation")

EQUAL, UPGRAD = yoto.weightings.equal(), yoto.weightings.upgrad()
LOSSES = {"a": 1.0, "b": 2.0}


# One of several.


@pytest.mark.parametrize(
    "weightings",
    [
        pytest.param(
            {"upgrad": UPGRAD, "mgda": yoto.weightings.mgda()}, marks=pytest.mark.slow
        ),
        {"famo": yoto.weightings.famo(), "dwa": yoto.weightings.dwa(window=2)},
    ],
    ids=" and ".join,
)
def test_it_promises_what_every_weighting_promises(weightings):
    check_weighting(racing.one_of(weightings))


def test_what_it_needs_is_what_any_needs():
    arms = racing.one_of({"equal": EQUAL, "upgrad": UPGRAD})
    assert arms.needs == ("losses", "gramian")
    assert racing.one_of({"equal": EQUAL}).needs == ("losses",)


def test_it_is_due_when_the_weighting_of_the_lane_is():
    held = yoto.weightings.hold(UPGRAD, 2)
    arms = racing.one_of({"equal": EQUAL, "held": held, "upgrad": UPGRAD})
    assert racing.one_of({"equal": EQUAL, "upgrad": UPGRAD}).due is None
    states = racing.start(arms.init(LOSSES), 3)
    assert arms.due is not None
    step = jax.jit(
        jax.vmap(lambda s: (arms.due(s), arms.update(LOSSES, s, gramian=jnp.eye(2))[1]))
    )
    seen = []
    for _ in range(3):
        due, states = step(states)
        seen.append(due.tolist())
    assert seen == [[False, True, True], [False, True, True], [False, False, True]]


def test_a_lane_touches_no_other_weighting():
    both = {"famo": yoto.weightings.famo(), "dwa": yoto.weightings.dwa(window=1)}
    arms = racing.one_of(both)
    states = racing.start(arms.init(LOSSES), 2)
    update = jax.jit(jax.vmap(lambda s: arms.update(LOSSES, s)[1]))
    after = update(states)
    for lane in range(2):
        before, now = (racing.lane(s, lane) for s in (states, after))
        for index in range(2):
            own = [jax.tree.leaves(state.inner[index]) for state in (before, now)]
            same = [np.array_equal(x, y) for x, y in zip(*own, strict=True)]
            assert all(same) == (index != lane)


def test_losses_after_the_step_reach_the_weighting_of_the_lane():
    both = {"equal": EQUAL, "famo": yoto.weightings.famo(exact=True)}
    arms = racing.one_of(both)
    states = racing.start(arms.init(LOSSES), 2)
    states = jax.jit(jax.vmap(lambda s: arms.update(LOSSES, s)[1]))(states)
    less = {"a": 0.5, "b": 1.9}
    states = jax.jit(jax.vmap(lambda s: arms.observe_step(less, s)))(states)
    famo = both["famo"]
    _, alone = famo.update(LOSSES, famo.init(LOSSES))
    alone = famo.observe_step(less, alone)
    _, _, raced = racing.alone(both, racing.lane(states, 1))
    jax.tree.map(np.testing.assert_allclose, raced, alone)


def test_absent_losses_have_no_weight_in_any_lane():
    arms = racing.one_of({"equal": EQUAL, "upgrad": UPGRAD})
    states = racing.start(arms.init(LOSSES), 2)
    present = {"a": True, "b": False}
    update = lambda s: arms.update(LOSSES, s, gramian=jnp.eye(2), present=present)
    weights, states = jax.jit(jax.vmap(update))(states)
    np.testing.assert_allclose(weights["a"], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights["b"], 0)
    np.testing.assert_allclose(states.loss_weights["b"], 0.5)  # held


def test_bad_batches_are_counted_in_each_lane():
    arms = racing.one_of({"equal": EQUAL, "upgrad": UPGRAD})
    states = racing.start(arms.init(LOSSES), 2)
    bad = {"a": jnp.nan, "b": 1.0}
    update = jax.jit(jax.vmap(lambda s: arms.update(bad, s, gramian=jnp.eye(2))[1]))
    np.testing.assert_array_equal(update(update(states)).num_skipped, [2, 2])


def test_the_order_of_the_weightings_is_part_of_their_state():
    # Their states have the same shapes: another order would exchange the arms.
    arms = {name: yoto.weightings.static({"a": 1.0, "b": b}) for name, b in ARMS}
    state = racing.one_of(arms).init(LOSSES)
    exchanged = dict(reversed(arms.items()))
    for use in (
        racing.one_of(exchanged).update,
        lambda _, s: racing.alone(exchanged, s),
    ):
        with pytest.raises(TypeError, match="arm low, arm high, in this order"):
            use(LOSSES, state)
    of_others = jax.tree.structure(racing.one_of(exchanged).init(LOSSES))
    assert jax.tree.structure(state) != of_others


ARMS = (("low", 0.1), ("high", 10.0))


def test_names_of_arms_are_not_those_of_fields():
    names = ("loss_weights", "num_updates", "num_skipped", "arm", "inner")
    arms = racing.one_of(dict.fromkeys(names, EQUAL))
    state = arms.update(LOSSES, arms.init(LOSSES))[1]
    assert optax.tree.get(state, "num_updates") == 1
    assert optax.tree.get(state, "loss_weights") == state.loss_weights


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: racing.one_of({}), ValueError, "at least one"),
        (
            lambda: racing.one_of({"a": cast("Any", 0.5)}),
            TypeError,
            r"weightings\['a'\] must be a LossWeighting, got a float",
        ),
        (
            lambda: racing.one_of({"g": yoto.weightings.grap("a")}),
            ValueError,
            "steered by a downstream loss",
        ),
        (
            lambda: racing.start(racing.one_of({"a": EQUAL}).init(LOSSES), 2),
            ValueError,
            "one_of has 1 weightings",
        ),
        (
            lambda: racing.alone(
                {"a": EQUAL, "b": UPGRAD},
                racing.start(racing.one_of({"a": EQUAL, "b": UPGRAD}).init(LOSSES), 2),
            ),
            ValueError,
            "several lanes",
        ),
        (
            lambda: racing.alone({"a": EQUAL}, EQUAL.init(LOSSES)),
            TypeError,
            "OneOfState",
        ),
        (
            lambda: racing.alone(
                {"a": EQUAL}, racing.one_of({"a": EQUAL, "b": UPGRAD}).init(LOSSES)
            ),
            TypeError,
            "state is that of another one_of",
        ),
        (
            lambda: racing.one_of({"a": yoto.weightings.famo()}).update(
                LOSSES, racing.one_of({"a": EQUAL}).init(LOSSES)
            ),
            TypeError,
            "state is that of another one_of",
        ),
        (
            lambda: racing.one_of({"a": EQUAL, "b": EQUAL}).update(
                LOSSES,
                racing.start(racing.one_of({"a": EQUAL, "b": EQUAL}).init(LOSSES), 2),
            ),
            ValueError,
            "under jax.vmap",
        ),
        (
            lambda: racing.one_of({"a": racing.one_of({"b": EQUAL})}).init(LOSSES),
            ValueError,
            "made by one_of itself",
        ),
        (lambda: racing.one_of(cast("Any", [EQUAL])), TypeError, "must be a mapping"),
        (
            lambda: racing.one_of(cast("Any", {"a": {"fit": 1.0}})),
            TypeError,
            r"of constant weights make yoto\.weightings\.static",
        ),
        (lambda: racing.start(jnp.ones(2), 0), ValueError, "arms must be at least 1"),
    ],
)
def test_misuse_of_weightings(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Cuts.


def test_lanes_that_were_not_started():
    arms = {"equal": yoto.weightings.equal(), "dwa": yoto.weightings.dwa()}
    state = racing.one_of(arms).init(LOSSES)
    lanes = racing.stack([state, state])
    with pytest.raises(ValueError, match="not made by racing.start: all run 'equal'"):
        racing.keep(lanes, jnp.array([1.0, 2.0]), 1)
    with pytest.raises(ValueError, match="not made by racing.start: all run 'equal'"):
        racing.alone(arms, state)
    weights, _ = racing.one_of(arms).update(LOSSES, state)  # As the first arm.
    assert len(set(map(float, jax.tree.leaves(weights)))) == 1
    racing.keep(racing.start(state, 2), jnp.array([1.0, 2.0]), 1)


def test_more_scores_than_lanes():
    with pytest.raises(ValueError, match="there are 5 scores for 6 lanes"):
        racing.keep({"w": jnp.ones((6, 2)), "b": jnp.ones(6)}, jnp.arange(5.0), 1)


@pytest.mark.parametrize("jit", [False, True])
def test_ties_go_to_the_first_and_nan_to_nobody(jit):
    keep = lambda scores: racing.keep({"x": jnp.arange(6)}, scores, 3)
    keep = jax.jit(keep) if jit else keep
    scores = jnp.array([jnp.nan, 1.0, -jnp.inf, 1.0, jnp.inf, 1.0])
    kept = keep(scores)
    np.testing.assert_array_equal(kept.indices, [1, 3, 4])
    np.testing.assert_array_equal(kept.lanes["x"], [1, 3, 4])
    np.testing.assert_array_equal(kept.scores, [1.0, 1.0, jnp.inf])
    kept = keep(jnp.array([jnp.nan, jnp.nan, -jnp.inf, jnp.nan, 0.0, jnp.nan]))
    np.testing.assert_array_equal(kept.indices, [0, 2, 4])


def test_scores_of_any_dtype():
    for dtype in (jnp.int32, jnp.uint8, jnp.bfloat16, jnp.float32):
        scores = jnp.array([3, 0, 200, 7], dtype)
        kept = racing.keep(jnp.arange(4), scores, 2)
        np.testing.assert_array_equal(kept.lanes, [2, 3])
        assert kept.scores.dtype == dtype


def test_large_integers_are_compared_exactly():
    scores = jnp.array([16777216, 16777217, -(2**31)], jnp.int32)
    np.testing.assert_array_equal(racing.keep(jnp.arange(3), scores, 1).indices, [1])
    kept = racing.keep(np.arange(2), jnp.array([False, True]), 1)
    np.testing.assert_array_equal(kept.lanes, [1])


def test_seeds_inside_a_lane_have_its_weighting():
    arms = racing.one_of({"equal": EQUAL, "dwa": yoto.weightings.dwa(window=1)})
    seeds = jax.vmap(lambda _: arms.init(LOSSES))(jnp.arange(3))
    lanes = racing.start(seeds, 2)
    np.testing.assert_array_equal(lanes.arm, [[0] * 3, [1] * 3])
    update = jax.jit(jax.vmap(jax.vmap(lambda s: arms.update(LOSSES, s)[1])))
    np.testing.assert_array_equal(update(lanes).num_updates, np.ones((2, 3)))


class Bare(NamedTuple):
    """State of a weighting that counts nothing."""

    loss_weights: Any


def test_a_weighting_without_counters_is_counted_and_smoothed():
    def update(losses, state, *, present=None):
        weights = jax.tree.map(lambda x: 10 * jnp.asarray(x), losses)
        return weights, Bare(weights)

    first = lambda losses: Bare(jax.tree.map(lambda x: jnp.ones(()), losses))
    bare = yoto.LossWeighting(first, update)
    arms = racing.one_of({"bare": bare})
    assert arms.update(LOSSES, arms.init(LOSSES))[1].num_updates == 1
    smooth = yoto.weightings.smooth(arms)
    weights, _ = smooth.update(LOSSES, smooth.init(LOSSES))
    assert (weights["a"], weights["b"]) == (10, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: racing.keep(jnp.arange(2), jnp.ones(2, complex), 1),
            "must be real numbers",
        ),
        (lambda: racing.lane({"x": jnp.ones((2, 1)), "y": jnp.ones(3)}, 0), "2 lanes"),
        (lambda: racing.spread(jnp.ones(2), []), "at least one"),
        (lambda: racing.keep(jnp.arange(3), jnp.ones(2), 1), "2 scores for 3 lanes"),
        (
            lambda: racing.keep((jnp.ones(3), jnp.ones(2)), jnp.ones(2), 1),
            "leading axis of 2 lanes",
        ),
        (lambda: racing.keep({"x": 1.0}, jnp.ones(2), 1), r"'x' has shape \(\)"),
        (lambda: racing.keep(jnp.arange(2), jnp.ones(2), 0), "at least 1, got 0"),
        (lambda: racing.keep(jnp.arange(2), jnp.ones(2), 3), "from 1 to 2, got 3"),
        (lambda: racing.keep(jnp.arange(2), jnp.ones((2, 1)), 1), r"of shape \(2, 1\)"),
        (
            lambda: racing.keep(jnp.arange(2), jnp.full(2, jnp.nan), 1),
            "all scores are NaN",
        ),
        (lambda: racing.stack([]), "no trees"),
        (lambda: racing.spread({}), "no arrays"),
        (lambda: racing.spread({"x": 1.0}), "leading axis"),
    ],
)
def test_misuse_of_lanes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_there_is_no_lane_beyond_the_last():
    for index in (2, -3):
        with pytest.raises(IndexError, match="there are 2 lanes"):
            racing.lane(jnp.arange(2), index)
    assert racing.lane(np.arange(2), -1) == 1


def test_lanes_are_copies():
    lane = {"w": jnp.ones(3), "key": jax.random.key(1)}
    lanes = racing.start(lane, 2)
    jax.jit(lambda x: jax.tree.map(lambda y: y, x), donate_argnums=0)(lanes)
    assert lane["w"].sum() == 3
    assert lanes["key"].shape == (2,)


# Units.


def test_norms_are_those_of_the_gradients():
    def loss_fn(w, x):
        return {
            "a": jnp.sum((x @ w) ** 2),
            "b": jnp.sum(jnp.sin(w)),
            "c": 1.0 + 0 * w[0],
        }

    w, x = jnp.arange(1.0, 4.0), jax.random.normal(jax.random.key(0), (7, 3))
    norms = jax.jit(racing.gradient_norms(loss_fn))(w, x)
    for name, norm in norms.items():
        own = jax.grad(lambda w, name=name: loss_fn(w, x)[name])(w)
        np.testing.assert_allclose(norm, jnp.linalg.norm(own), rtol=1e-6)
    chunked = racing.gradient_norms(loss_fn, chunk_size=1)(w, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), norms, chunked
    )
    with_aux = racing.gradient_norms(lambda w, x: (loss_fn(w, x), w), has_aux=True)
    assert with_aux(w, x).keys() == norms.keys()


def test_weighted_gradients_have_the_length_that_was_asked_for():
    norms = {"p": 2.0, "a": 0.01, "b": 300.0}
    shares = {"p": 9.0, "a": 0.1, "b": 3.0}
    weights = racing.weights_by_norms(norms, "p", shares)
    lengths = {name: weights[name] * norms[name] / norms["p"] for name in norms}
    np.testing.assert_allclose(
        [lengths[name] for name in ("p", "a", "b")], [1.0, 0.1, 3.0], rtol=1e-6
    )
    for whatever in (-1.0, np.nan):  # The share of the primary loss does not matter.
        other = racing.weights_by_norms(norms, "p", shares | {"p": whatever})
        np.testing.assert_array_equal(list(other.values()), list(weights.values()))
    alike = racing.weights_by_norms(norms, "p", 0.5)
    np.testing.assert_allclose(alike["a"], 100.0, rtol=1e-6)
    assert alike["p"] == 1


def test_units_of_losses_do_not_matter():
    def loss_fn(w):
        return {"p": jnp.sum(w**2), "a": jnp.sum(jnp.cos(w))}

    def gradient(scale):
        scaled = lambda w: loss_fn(w) | {"a": scale * loss_fn(w)["a"]}
        weights = racing.weights_by_norms(racing.gradient_norms(scaled)(w), "p", 0.3)
        return jax.grad(lambda w: sum(weights[k] * v for k, v in scaled(w).items()))(w)

    w = jnp.array([0.3, -0.7])
    np.testing.assert_allclose(gradient(1.0), gradient(1e3), rtol=1e-5)


def test_a_loss_without_gradient_and_one_left_out():
    weights = racing.weights_by_norms({"p": 1.0, "a": 0.0}, "p", most=50.0)
    assert weights["a"] == 50
    assert racing.weights_by_norms({"p": 1.0, "a": 0.0}, "p", 0.0)["a"] == 0


def test_norms_that_are_not_finite_give_no_weight_under_jit():
    weights = jax.jit(lambda n: racing.weights_by_norms(n, "p"))
    found = weights({"p": 1.0, "a": jnp.nan, "b": 2.0})
    assert np.isnan(found["a"])
    assert found["b"] == 0.5
    found = weights({"p": jnp.inf, "a": 1.0})
    assert np.isnan(found["a"])
    assert found["p"] == 1


@pytest.mark.parametrize(
    ("norms", "share", "message"),
    [
        ({"p": jnp.ones(2), "a": jnp.ones(2)}, 1.0, "'a' must be a scalar"),
        ({"p": 1.0, "a": 1.0}, jnp.ones(2), "share must be one number"),
        ({"p": 0.0, "a": 1.0}, 1.0, "'p' has no gradient"),
        ({"p": 1.0, "a": jnp.nan}, 1.0, "norm of 'a' is nan"),
        ({"p": 1.0, "a": 1.0}, -1.0, "must not be negative"),
        ({"p": 1.0, "a": 1.0}, {"a": 1.0}, "a tree like the norms"),
        ({"q": 1.0, "a": 1.0}, 1.0, "primary 'p' is unknown"),
    ],
)
def test_misuse_of_units(norms, share, message):
    with pytest.raises(ValueError, match=message):
        racing.weights_by_norms(norms, "p", share)
