"""Pareto tools, against closed forms, an independent library and broken models."""

import builtins
from typing import NamedTuple

import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoto_jax.conditional._objective import conditional_loss
from yoto_jax.conditional._pareto import hypervolume, pareto_front
from yoto_jax.conditional._sweep import (
    concavity_violations,
    cross_matrix,
    gap,
    monotonicity_violations,
    select,
    sweep,
)

STAIRS = jnp.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def two_quadratics(n):
    """Weights, and the losses |x - a|^2 and |x - b|^2, |a - b| = 1, at the minima."""
    w = jnp.linspace(0, 1, n)
    return {"a": w, "b": 1 - w}, {"a": (1 - w) ** 2, "b": w**2}


# The front.


def test_front_leaves_out_what_is_dominated_and_keeps_equal_points():
    points = jnp.array([[1, 3], [2, 2], [2, 3], [2, 2], [3, 1], [1, 4], [4, 4.0]])
    expected = [True, True, False, True, True, False, False]
    np.testing.assert_array_equal(pareto_front(points), expected)


def test_front_of_a_tree_is_that_of_its_arrays():
    class Losses(NamedTuple):
        kl: jax.Array
        parts: dict

    points = np.random.default_rng(0).uniform(size=(50, 3)).astype(np.float32)
    tree = Losses(points[:, 0], {"x": jnp.asarray(points[:, 1]), "y": points[:, 2]})
    expected = moocore.is_nondominated(points)
    np.testing.assert_array_equal(pareto_front(tree), expected)
    np.testing.assert_array_equal(jax.jit(pareto_front)(tree), expected)
    batches = jax.vmap(pareto_front)(points.reshape(5, 10, 3))
    for found, batch in zip(batches, points.reshape(5, 10, 3), strict=True):
        np.testing.assert_array_equal(found, moocore.is_nondominated(batch))


def test_front_under_jit_leaves_out_nan():
    points = jnp.array([[jnp.nan, 0.0], [1.0, 1.0], [2.0, 2.0]])
    np.testing.assert_array_equal(jax.jit(pareto_front)(points), [False, True, False])


# The hypervolume.


@pytest.mark.parametrize(
    ("points", "reference", "expected"),
    [
        (STAIRS, 4.0, 6.0),
        (STAIRS, (4.0, 4.0), 6.0),
        (STAIRS, (3.0, 4.0), 3.0),  # the last one is no better than the reference
        (STAIRS, 1.0, 0.0),
        (STAIRS[:1], 4.0, 3.0),
        (STAIRS[:0], 4.0, 0.0),
        (jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), 2.0, 5.0),
        (jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), (2, 2, 1), 2.0),
        (jnp.array([[3.0, 0.0, 1.0]]), 2.0, 0.0),
        (np.array([[1, 3], [2, 2], [3, 1]]), 4, 6.0),  # integers
        (jnp.array([[1.0, jnp.inf], [jnp.inf, 1.0], [2.0, 2.0]]), 4.0, 4.0),
    ],
)
def test_hypervolume_of_a_few_points(points, reference, expected):
    reference = np.array(reference) if isinstance(reference, tuple) else reference
    found = hypervolume(points, reference)
    assert found.dtype == jnp.float32
    assert found == expected


@pytest.mark.parametrize(
    ("n", "expected"), [(5, 0.726563), (25, 0.818854), (101, 0.829967)]
)
def test_hypervolume_of_two_quadratics_on_a_grid(float64, n, expected):
    _, losses = two_quadratics(n)
    assert pareto_front(losses).all()
    assert hypervolume(losses, 1.0) == pytest.approx(expected, abs=6e-7)
    # Each unit that the reference moves away adds a strip along both axes.
    assert hypervolume(losses, 2.0) == pytest.approx(expected + 3, abs=6e-7)


@pytest.mark.parametrize(
    ("front", "reference", "expected"),
    [
        (lambda t: (t**2, (1 - t) ** 2), 1.0, 5 / 6),
        (lambda t: (t**2, (1 - t) ** 2), 2.0, 23 / 6),
        (lambda t: (t, 1 - jnp.sqrt(t)), 1.0, 2 / 3),  # ZDT1
        (lambda t: (t, 1 - t**2), 1.0, 1 / 3),  # ZDT2
    ],
)
def test_hypervolume_of_dense_fronts_is_the_integral(
    float64, front, reference, expected
):
    n = 20_001
    found = hypervolume(front(jnp.linspace(0, 1, n)), reference)
    assert expected - 2 / n < found < expected


def test_hypervolume_of_a_tree_takes_a_reference_per_objective():
    losses = {"kl": STAIRS[:, 0], "l2": STAIRS[:, 1]}
    assert hypervolume(losses, {"kl": 4.0, "l2": 5.0}) == 9.0
    assert hypervolume({"l2": STAIRS[:, 1], "kl": STAIRS[:, 0]}, 4.0) == 6.0


points_in_the_plane = st.lists(
    st.tuples(*[st.integers(0, 12)] * 2), min_size=1, max_size=20
).map(lambda points: np.array(points, np.float32))


@settings(deadline=None, max_examples=60)
@given(points_in_the_plane, st.randoms(use_true_random=False))
def test_hypervolume_is_that_of_the_set(points, random):
    padded = np.full((20, 2), 100.0, np.float32)  # of one shape, to compile once
    padded[: len(points)] = points
    volume = hypervolume(padded, 10.0)
    # Integers: every sum is exact. An independent library agrees.
    assert volume == moocore.hypervolume(points, ref=[10, 10])
    order = random.sample(range(20), 20)
    assert hypervolume(padded[order], 10.0) == volume
    kept = np.where(np.asarray(pareto_front(padded))[:, None], padded, 100.0)
    assert hypervolume(kept, 10.0) == volume
    if len(points) > 1:
        padded[0] = 100.0
        assert hypervolume(padded, 10.0) <= volume


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_hypervolume_agrees_with_moocore_in_more_objectives(float64, objectives):
    rng = np.random.default_rng(objectives)
    for n in (1, 30):
        points = rng.uniform(0, 1.2, size=(n, objectives))
        reference = rng.uniform(0.8, 1.1, size=objectives)
        expected = moocore.hypervolume(points, ref=reference)
        assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_batches_and_compiles():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1.2, size=(6, 20, 2)).astype(np.float32)
    references = rng.uniform(0.8, 1.1, size=(6, 2)).astype(np.float32)
    found = jax.jit(jax.vmap(hypervolume))(points, references)
    expected = [
        moocore.hypervolume(*pair) for pair in zip(points, references, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isnan(jax.jit(hypervolume)(points[0].copy() * np.nan, 1.0))


def test_gradient_is_the_closed_form_with_zeros_off_the_front(float64):
    points = jnp.array(
        [[3, 1], [1, 3], [2, 2], [2, 2.5], [2.5, 2], [5, 0], [0, 4], [3, 3.5]]
    )
    expected = np.zeros((8, 2))
    expected[:3] = [[-1, -1], [-1, -1], [-1, -1]]
    np.testing.assert_array_equal(jax.grad(hypervolume)(points, 4.0), expected)
    of_reference = jax.grad(hypervolume, argnums=1)(points, jnp.array([4.0, 4.0]))
    np.testing.assert_array_equal(of_reference, [3.0, 3.0])


def test_gradient_agrees_with_finite_differences(float64):
    rng = np.random.default_rng(0)
    t = rng.uniform(size=25)
    front = np.stack([(1 - t) ** 2, t**2], axis=1)
    points = np.concatenate([front, rng.uniform(size=(15, 2)) + 0.5])
    gradient = np.asarray(jax.grad(hypervolume)(points, 1.2))
    found = np.empty_like(points)
    for index in np.ndindex(points.shape):
        step = np.zeros_like(points)
        step[index] = 1e-7
        difference = hypervolume(points + step, 1.2) - hypervolume(points - step, 1.2)
        found[index] = difference / 2e-7
    np.testing.assert_allclose(gradient, found, atol=1e-6)
    dominated = ~np.asarray(pareto_front(points))
    assert dominated.sum() >= 10
    np.testing.assert_array_equal(gradient[dominated], 0)
    # On the front: from the neighbours alone.
    order = np.argsort(points[:, 0])
    order = order[~dominated[order]]
    f1, f2 = points[order].T
    expected = np.stack(
        [np.diff(f2, prepend=1.2), -np.diff(f1, append=1.2)], axis=1
    )  # f2_k - f2_{k-1}, f1_k - f1_{k+1}
    np.testing.assert_allclose(gradient[order], expected, atol=1e-12)


def test_gradient_of_equal_points_goes_to_one_of_them():
    points = jnp.array([[2.0, 2.0], [2.0, 2.0]])
    gradient = np.asarray(jax.grad(hypervolume)(points, 4.0))
    assert sorted(map(tuple, gradient)) == [(-2.0, -2.0), (0.0, 0.0)]


def test_ascent_on_the_hypervolume_spreads_points_along_the_front():
    """Points between a and b, from one place: they end where no two are equal."""
    volume = lambda x: hypervolume({"a": (1 - x) ** 2, "b": x**2}, 1.0)
    x = jnp.linspace(0.45, 0.55, 5)
    ascend = jax.jit(lambda x: x + 0.05 * jax.grad(volume)(x))
    for _ in range(200):
        x = ascend(x)
    assert volume(x) > hypervolume(two_quadratics(7)[1], 1.0)  # ends included: 5 of 7
    assert jnp.diff(x).min() > 0.1


def test_without_moocore_two_objectives_work_and_more_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def fake(name, *arguments, **keywords):
        if name == "moocore":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", fake)
    assert hypervolume(STAIRS, 4.0) == 6.0
    with pytest.raises(ImportError, match=r"pip install 'yoto_jax\[pareto\]'"):
        hypervolume(jnp.ones((2, 3)), 4.0)


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [
        (jnp.ones(3), 1.0, r"\(n, K\), or a tree of arrays \(n,\), got shape \(3,\)"),
        (jnp.ones((3, 1)), 1.0, "at least two objectives, got 1"),
        ({}, 1.0, "tree of arrays"),
        ({"a": jnp.ones(3), "b": jnp.ones(2)}, 1.0, r"'a': \(3,\), 'b': \(2,\)"),
        ({"a": jnp.ones(3), "b": 1.0}, 1.0, r"'b': \(\)"),
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": 1.0}, "missing: 'b'"),
        (
            {"a": jnp.ones(3), "b": jnp.ones(3)},
            {"a": 1.0, "b": 1.0, "c": 1.0},
            "unexpected: 'c'",
        ),
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, (1.0, 1.0), "like the points; missing"),
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": STAIRS, "b": 1.0}, "one number"),
        (STAIRS, jnp.ones(3), "one number, or 2 for 2 objectives"),
        (STAIRS.at[1, 0].set(jnp.nan), 4.0, r"'0' is NaN at 1 of 3 points \(1\)"),
        (STAIRS.at[1, 1].set(-jnp.inf), 4.0, "'1' is -inf at 1 of 3 points"),
        (STAIRS, np.array([4.0, np.inf]), "reference of objective '1' must be finite"),
        (STAIRS, np.nan, "must be finite"),
    ],
)
def test_hypervolume_refuses(points, reference, message):
    with pytest.raises(ValueError, match=message):
        hypervolume(points, reference)


def test_front_refuses_nan_and_what_is_no_table():
    with pytest.raises(ValueError, match="'kl' is NaN at 2 of 2 points"):
        pareto_front({"kl": jnp.full(2, jnp.nan), "l2": jnp.ones(2)})
    with pytest.raises(ValueError, match="got shape"):
        pareto_front(jnp.ones((2, 3, 4)))


def test_more_objectives_are_refused_where_there_is_no_host():
    for transformed in (jax.jit(hypervolume), jax.grad(hypervolume)):
        with pytest.raises(TypeError, match="outside of jit, vmap and grad"):
            transformed(jnp.ones((2, 3)), 4.0)


# The sweep.


def test_sweep_evaluates_every_weighting_whatever_the_batches():
    data = jnp.linspace(-1, 1, 7)

    def evaluate(weights):
        x = weights["b"] / (weights["a"] + weights["b"])
        assert jnp.shape(x) == ()
        images = x * jnp.outer(data, data)
        return {"losses": ((x - data) ** 2).mean(), "image": images}

    weights = {"a": np.linspace(1, 2, 10), "b": jnp.linspace(2, 1, 10)}
    whole = sweep(evaluate, weights)
    assert whole["image"].shape == (10, 7, 7)
    for i in (0, 4, 9):
        one = evaluate(jax.tree.map(lambda w: w[i], weights))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5), whole, one
        )
    for batch_size in (1, 3, 10, 32):
        some = jax.jit(lambda w, b=batch_size: sweep(evaluate, w, batch_size=b))(
            weights
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            some,
            whole,
        )


@pytest.mark.parametrize(
    ("weights", "batch_size", "message"),
    [
        ({"a": jnp.ones(3), "b": jnp.ones(2)}, None, "one n for all"),
        ({"a": 1.0}, None, "one n for all"),
        ({}, None, "one n for all"),
        ({"a": jnp.ones(3)}, 0, "batch_size must be positive"),
    ],
)
def test_sweep_refuses(weights, batch_size, message):
    with pytest.raises(ValueError, match=message):
        sweep(lambda w: w, weights, batch_size=batch_size)


# Checks of calibration.


def test_true_minimisers_pass_every_check(float64):
    weights, losses = two_quadratics(21)
    matrix = cross_matrix(losses, weights)
    w = np.asarray(weights["a"])
    # w_i . L(w_j) = w_i (1 - w_j)^2 + (1 - w_i) w_j^2 = w_i (1 - w_i) + (w_i - w_j)^2
    expected = (w * (1 - w))[:, None] + (w[:, None] - w[None, :]) ** 2
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    np.testing.assert_array_equal(matrix.argmin(axis=1), np.arange(21))
    assert monotonicity_violations(losses, weights).max() == 0
    assert concavity_violations(jnp.diag(matrix), weights["a"]).max() <= 1e-15
    backwards = concavity_violations(jnp.diag(matrix)[::-1], weights["a"][::-1])
    assert backwards.max() <= 1e-15
    np.testing.assert_array_equal(gap(losses, losses, weights), 0)


def test_a_model_that_ignores_its_weights_is_caught():
    weights, _ = two_quadratics(21)
    constant = {"a": jnp.full(21, 0.25), "b": jnp.full(21, 0.25)}
    matrix = cross_matrix(constant, weights)
    np.testing.assert_allclose(matrix, 0.25)  # no column is better than another
    _, best = two_quadratics(21)
    excess = gap(constant, best, weights)
    # 1/4 - w (1 - w): largest at the ends, nothing in the middle.
    w = np.linspace(0, 1, 21)
    np.testing.assert_allclose(excess, 0.25 - w * (1 - w), atol=1e-6)


def test_a_model_conditioned_the_wrong_way_round_is_caught():
    weights, losses = two_quadratics(11)
    swapped = {"a": losses["b"], "b": losses["a"]}
    diagonal = cross_matrix(swapped, weights).argmin(axis=1) == np.arange(11)
    assert diagonal.sum() == 1  # the middle
    violations = monotonicity_violations(swapped, weights)
    # (w_a - w_b) (w_a^2 - w_b^2 - (1 - w_a)^2 + (1 - w_b)^2) = 2 (w_a - w_b)^2
    w = np.linspace(0, 1, 11)
    expected = 2 * (w[:, None] - w[None, :]) ** 2
    np.testing.assert_allclose(violations, expected, atol=1e-5)


def test_a_dent_and_a_bump_are_caught_where_they_are():
    weights, losses = two_quadratics(9)
    values = jnp.diag(cross_matrix(losses, weights))
    dented = concavity_violations(values.at[4].add(-0.1), weights["a"])
    np.testing.assert_array_equal(np.nonzero(dented)[0], [3])  # of the inner points
    bumped = concavity_violations(values.at[4].add(0.1), weights["a"])
    np.testing.assert_array_equal(np.nonzero(bumped)[0], [2, 4])
    uneven = jnp.array([0.0, 1.0, 4.0])
    assert concavity_violations(jnp.array([0.0, 0.0, 4.0]), uneven) == 1.0


def test_checks_work_compiled_and_in_batches():
    weights, losses = two_quadratics(6)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), losses)
    for check in (cross_matrix, monotonicity_violations):
        found = jax.jit(jax.vmap(check, in_axes=(0, None)))(several, weights)
        np.testing.assert_allclose(found[1], check(losses, weights), atol=1e-6)
    found = jax.jit(gap)(losses, several | losses, weights)
    np.testing.assert_array_equal(found, 0)
    curve = jax.jit(concavity_violations)(losses["a"], weights["a"])
    assert curve.shape == (4,)


@pytest.mark.parametrize("check", [cross_matrix, monotonicity_violations])
def test_checks_refuse_what_does_not_match(check):
    weights, losses = two_quadratics(4)
    with pytest.raises(ValueError, match="losses .* missing: 'b'; unexpected: 'kl'"):
        check({"a": losses["a"], "kl": losses["b"]}, weights)
    with pytest.raises(ValueError, match="containers"):
        check([losses["a"], losses["b"]], tuple(weights.values()))
    with pytest.raises(ValueError, match=r"losses .* 'b': \(\)"):
        check({"a": losses["a"], "b": 1.0}, weights)
    with pytest.raises(ValueError, match="same length.*got 3 and 4"):
        check(jax.tree.map(lambda x: x[:3], losses), weights)
    with pytest.raises(ValueError, match="none"):
        check({}, {})


def test_gap_names_what_does_not_match():
    weights, losses = two_quadratics(4)
    with pytest.raises(ValueError, match="reference_losses .* missing: 'b'"):
        gap(losses, {"a": losses["a"]}, weights)
    with pytest.raises(ValueError, match="reference_losses and weights"):
        gap(losses, jax.tree.map(lambda x: x[:3], losses), weights)


@pytest.mark.parametrize(
    ("values", "positions", "message"),
    [
        (jnp.ones(3), jnp.array([0.0, 2.0, 1.0]), "in order"),
        (jnp.ones(3), jnp.array([0.0, 1.0, 1.0]), "in order"),
        (jnp.ones(3), jnp.array([0.0, jnp.nan, 1.0]), "in order"),
        (jnp.ones(2), jnp.arange(2.0), "at least 3"),
        (jnp.ones(3), jnp.arange(4.0), r"got shape \(4,\) for positions"),
        (jnp.ones((3, 1)), jnp.ones((3, 1)), r"got shape \(3, 1\) for values"),
    ],
)
def test_concavity_refuses(values, positions, message):
    with pytest.raises(ValueError, match=message):
        concavity_violations(values, positions)


# Selection.

METRICS = {
    "psnr": jnp.array([27.0, 25.0, 24.5, 21.0, jnp.nan]),
    "losses": {"kl": np.array([90, 40, 30, 5, 1])},
}


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [
        ({"minimize": "losses/kl"}, 4),
        ({"maximize": "psnr"}, 0),
        ({"minimize": "psnr"}, 3),  # not the one that is NaN
        ({"minimize": "losses/kl", "at_least": {"psnr": 24.0}}, 2),
        (
            {"minimize": "losses/kl", "at_least": {"psnr": 24.5}},
            2,
        ),  # a bound that binds
        ({"maximize": "psnr", "at_most": {"losses/kl": 50}}, 1),
        (
            {
                "maximize": "losses/kl",
                "at_least": {"psnr": 24.0},
                "at_most": {"losses/kl": 35, "psnr": 26},
            },
            2,
        ),
    ],
)
def test_select_takes_the_best_within_bounds(wish, chosen):
    found = select(METRICS, **wish)
    assert type(found) is int
    assert found == chosen


def test_select_takes_the_first_of_equals_also_if_they_are_infinite():
    ties = {"a": jnp.array([2.0, 1.0, 1.0]), "b": jnp.array([0.0, 1.0, 1.0])}
    assert select(ties, minimize="a") == 1
    infinite = {"a": jnp.full(3, jnp.inf), "b": jnp.array([0.0, 0.0, 1.0])}
    assert select(infinite, minimize="a", at_least={"b": 0.5}) == 2


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"minimize": "losses/kl", "at_least": {"psnr": 30.0}},
            "no weighting meets psnr >= 30: the largest is 27",
        ),
        (
            {"maximize": "psnr", "at_most": {"losses/kl": 0.5}},
            "no weighting meets losses/kl <= 0.5: the smallest is 1",
        ),
        (
            {
                "minimize": "psnr",
                "at_least": {"psnr": 24.0},
                "at_most": {"losses/kl": 20},
            },
            r"none of the 5 .* psnr >= 24 \(met at 3\), losses/kl <= 20 \(met at 2\)",
        ),
        ({"minimize": "kl"}, "no metric 'kl'; the metrics are: 'losses/kl', 'psnr'"),
        ({"minimize": "psnr", "at_most": {"size": 1}}, "no metric 'size'"),
        ({}, "name one metric"),
        ({"minimize": "psnr", "maximize": "psnr"}, "name one metric"),
    ],
)
def test_select_refuses(wish, message):
    with pytest.raises(ValueError, match=message):
        select(METRICS, **wish)


def test_select_refuses_what_is_nan_everywhere_or_not_known():
    with pytest.raises(ValueError, match="'a' is NaN at every"):
        select({"a": jnp.full(3, jnp.nan)}, minimize="a")
    metrics = {"a": jnp.full(3, jnp.nan), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="a >= 1: it is NaN at all"):
        select(metrics, minimize="b", at_least={"a": 1})
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda m: select(m, minimize="psnr"))(METRICS)


def test_lists_have_concavity_violations_too():
    np.testing.assert_allclose(concavity_violations([0, -1, 0], [0, 1, 2]), [1])


def test_a_scalarization_of_a_number_is_refused():
    losses = weights = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"scalarization must give one value per exam"):
        conditional_loss(losses, weights, scalarization=lambda losses, weights: 1.0)
