"""The toy problem is the published one, and the methods end where they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.results import read_json
from benchmarks.tasks.toy import report, task
from benchmarks.tasks.toy import run as toy

STEPS = 50_000
MISSED = None


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def ends(method):
    return toy.run(method, seeds=1, steps=STEPS)[0, :, -1]


# The problem.


@pytest.mark.parametrize(
    ("point", "losses"),
    [
        ((-8.5, 7.5), (6.552, 7.901)),
        ((0.0, 0.0), (0.0, 0.0)),
        ((9.0, 9.0), (7.944, 6.691)),
        ((-7.5, -0.5), (0.389, -4.754)),
        ((9.0, -1.0), (-8.831, 2.814)),
    ],
)
def test_losses_at_the_starts_are_the_published_ones(point, losses):
    assert point in task.STARTS
    unscaled = task.losses_of(jnp.array(point)) / np.array(task.SCALES)
    np.testing.assert_allclose(unscaled, losses, atol=5e-4)


def test_at_the_origin_both_sides_count():
    # There tanh(x2 / 2) and its mirror image are cut off at their tie. The derivative
    # of each is 1/2: d L1 / d x2 = (wall - bowl) / 2.
    wall, bowl = np.log(3.5) + 6, (7**2 + 6.4) / 10 - 20
    gradient = jax.jacobian(task.losses_of)(jnp.zeros(2))[0]
    np.testing.assert_allclose(gradient, [0, 0.1 * (wall - bowl) / 2], rtol=1e-12)


@pytest.mark.parametrize(
    ("x1", "losses"),
    [
        (-7.0, (-0.399, -19.989)),
        (-3.5, (-8.970, -18.765)),
        (0.0, (-15.092, -15.092)),
        (3.5, (-18.765, -8.970)),
        (7.0, (-19.989, -0.399)),
    ],
)
def test_on_the_front_gradients_are_opposite(x1, losses):
    x = jnp.array([x1, *task.front(np.array([x1]))])
    jacobian = jax.jacobian(task.losses_of)(x)
    assert abs(np.linalg.det(jacobian)) < 1e-12
    assert np.vdot(jacobian[0], jacobian[1]) < 1e-12
    # The published values are those at x2 = -8.3552, the middle of the front.
    np.testing.assert_allclose(
        task.losses_of(x) / np.array(task.SCALES), losses, atol=2e-3
    )


def test_distance_is_to_the_front_and_its_ends():
    height = task.front(np.array([0.0, 7.0]))
    np.testing.assert_allclose(height, [-8.35511, -8.43446], atol=1e-5)
    points = np.array([[0, height[0] + 1], [7, height[1]], [10, height[1]]])
    np.testing.assert_allclose(toy.distance(points), [1, 0, 3], atol=1e-3)


# Where the methods end. The runs pass walls of nearly infinite slope, so that rounding
# can decide: the tolerances are how far the ends move if the starts move by 1e-9.


@pytest.mark.parametrize(
    ("method", "expected", "tolerance"),
    [
        ("equal", (-5.727, -5.727, MISSED, -5.727, -5.727), 0.002),
        ("pcgrad", (-4.35, -3.350, MISSED, -3.817, 5.032), (0.4, *[0.01] * 4)),
        ("cagrad", (-5.727, -5.727, MISSED, -5.727, -5.727), 0.002),
        ("mgda", (-1.978, 6.094, 6.979, -4.260, 6.995), 0.02),
        ("famo", (-0.308, 0.084, 0.361, -0.951, 1.749), 0.02),
    ],
)
def test_methods_end_where_they_did(method, expected, tolerance):
    reached = np.array([x1 is not MISSED for x1 in expected])
    np.testing.assert_array_equal(toy.distance(ends(method)) < task.CLOSE, reached)
    error = np.abs(ends(method)[:, 0] - np.array(expected, float))[reached]
    assert (error <= np.broadcast_to(tolerance, 5)[reached]).all(), ends(method)


def two_starts(weighting, steps):
    every = jax.vmap(lambda start: toy.trajectory(weighting, start, steps)[-1])
    return jax.jit(every)(jnp.array([task.STARTS[1], task.STARTS[3]]))


def test_nash_keeps_the_symmetry_between_losses_of_different_scale():
    # Scales do not matter to it: from the middle it goes to the middle of the front.
    reached = two_starts(yoto.weightings.nash_mtl(), STEPS)
    np.testing.assert_allclose(reached[:, 0], [0.0, -3.29], atol=0.02)
    assert (toy.distance(np.asarray(reached)) < 0.01).all()


def test_upgrad_for_two_losses_follows_pcgrad():
    # Up to its ridge, which counts where gradients differ by many orders.
    weightings = yoto.weightings
    first = two_starts(weightings.upgrad(regularization=1e-14), 2000)
    second = two_starts(weightings.pcgrad(), 2000)
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_the_engine_takes_the_same_steps():
    weighting = yoto.weightings.pcgrad()
    start, tx = jnp.array(task.STARTS[0]), optax.adam(toy.LEARNING_RATE)
    value_and_grad = yoto.value_and_grad(lambda x: tuple(task.losses_of(x)), weighting)

    def step(carry, _):
        x, tx_state, state = carry
        _, gradient, state = value_and_grad(x, state)
        updates, tx_state = tx.update(gradient, tx_state, x)
        return (x + updates, tx_state, state), None

    carry = (start, tx.init(start), weighting.init(tuple(task.losses_of(start))))
    (x, _, _), _ = jax.lax.scan(step, carry, length=500)
    expected = toy.trajectory(weighting, start, 500)[-1]
    np.testing.assert_allclose(x, expected, rtol=1e-9)


# The benchmark.


def test_it_writes_its_results(tmp_path):
    methods = ("equal", "random", "famo")
    toy.main(Options("toy", methods, seeds=2, preset="quick", out=tmp_path))
    result = read_json(tmp_path / "toy.json")
    assert [entry["method"] for entry in result["trajectories"]] == list(methods)
    points = len(task.STARTS) * 3
    assert len(result["records"]) == (1 + 2 + 1) * points
    table = report.table(result)
    assert [row[0] for row in table.rows] == list(methods)
    assert all(len(row) == len(table.columns) for row in table.rows)
    report.figure(result, tmp_path / "again.png")
    written = (tmp_path / "toy.png").read_bytes()
    assert (tmp_path / "again.png").read_bytes() == written


def test_every_method_is_built():
    for build in toy.METHODS.values():
        weighting = build(jax.random.key(0))
        assert jax.tree.structure(weighting.init((1.0, 2.0)).loss_weights).num_leaves
