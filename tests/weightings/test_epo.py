"""Exact Pareto optimality along rays, on fronts that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto
from tests.oracles import gramian as oracles
from yoto_jax.weightings import epo

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIMENSIONS = 6
CENTRES = np.float32([[0.0, 0.0], [1.0, 0.0], [0.3, 0.9]])


def fonseca(x):
    """Two losses whose front is concave: x all equal, between plus and minus c."""
    c = DIMENSIONS**-0.5
    return {
        "left": 1 - jnp.exp(-jnp.sum((x + c) ** 2)),
        "right": 1 - jnp.exp(-jnp.sum((x - c) ** 2)),
    }


def three(x):
    """Three losses; their front is the triangle between the centres."""
    squares = jnp.sum((x[None, :2] - CENTRES) ** 2, axis=1) + 0.1 * x[2] ** 2
    return list(1 - jnp.exp(-squares))


def descend(f, x, preference, steps=300, rate=0.1, **options):
    """The last point, and all losses on the way (steps, K)."""
    weighting = epo(preference=preference, **options)
    value_and_grad = yoto.value_and_grad(f, weighting)

    def step(carry, _):
        x, state = carry
        losses, grads, state = value_and_grad(x, state)
        return (x - rate * grads, state), jnp.stack(jax.tree.leaves(losses))

    start = x, weighting.init(jax.eval_shape(f, x))
    (x, _), history = jax.lax.scan(step, start, length=steps)
    return x, history


def problems(count):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        jacobian = rng.normal(size=(count, 3)) * np.exp(rng.normal(size=(count, 1)))
        yield jacobian, *np.exp(rng.normal(size=(2, count)))


@functools.cache
def solver():
    """Weights of a state in vectors; one program for each number of losses."""

    def solve(gramian, losses, preference, horizon):
        weighting = epo(preference=preference, horizon=horizon)
        losses = list(losses)
        found, _ = weighting.update(losses, weighting.init(losses), gramian=gramian)
        return jnp.stack(found)

    return jax.jit(solve)


@pytest.mark.parametrize(
    ("count", "dtype", "bound"),
    [
        (1, "float32", 0),
        (2, "float32", 1e-5),
        (3, "float64", 1e-10),
        (5, "float32", 1e-5),
    ],
)
def test_weights_are_those_of_the_best_face(count, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        mixed = 0
        for jacobian, losses, preference in problems(count):
            for horizon in (0.1, 1.0, 30.0):
                gramian = jacobian @ jacobian.T
                given = (gramian, losses, preference, horizon)
                found = solver()(*(jnp.asarray(x, dtype) for x in given))
                expected = oracles.epo(jacobian, losses, preference, horizon)
                np.testing.assert_allclose(found, expected, atol=bound)
                mixed += count > 1 and (expected > 0).sum() > 1
        assert count == 1 or mixed > 6


def test_the_largest_weighted_loss_falls_and_no_other_is_to_overtake_it():
    for jacobian, losses, preference in problems(4):
        w = oracles.epo(jacobian, losses, preference)
        shares = w / preference / (w / preference).sum()
        rows, values = preference[:, None] * jacobian, preference * losses
        d = shares @ rows
        length = np.abs(values).sum() / (rows**2).sum()
        assert rows[values.argmax()] @ d >= d @ d * (1 - 1e-9)
        ahead = values - length * rows @ d
        assert ahead.max() <= values.max() - length * d @ d * (1 - 1e-9)


def test_points_of_a_concave_front_along_given_rays():
    """As in ``vmap``, from one start; weighted sums end where one loss is least."""
    angles = np.linspace(0.15, np.pi / 2 - 0.15, 7)
    rays = {"left": jnp.cos(angles), "right": jnp.sin(angles)}
    x = jax.random.uniform(jax.random.key(0), (DIMENSIONS,), minval=-0.4, maxval=0.4)
    front = jax.jit(jax.vmap(lambda ray: descend(fonseca, x, ray)))
    points, history = jax.tree.map(np.asarray, front(rays))
    weighted = history * np.stack([rays["left"], rays["right"]], 1)[:, None]
    np.testing.assert_allclose(weighted[:, -1, 0], weighted[:, -1, 1], rtol=1e-5)
    np.testing.assert_allclose(np.ptp(points, axis=1), 0, atol=1e-4)
    # On the front sqrt(-log(1 - L)) of both add up to the distance of the centres.
    roots = np.sqrt(-np.log1p(-np.float64(history[:, -1])))
    np.testing.assert_allclose(roots.sum(1), 2, atol=1e-5)
    largest = weighted.max(2)
    assert (np.diff(largest, axis=1) <= 1e-6).all()
    rose = np.diff(history, axis=1).max((1, 2)) > 1e-4
    assert rose.sum() >= 4  # Ascent is what takes it along the front.


def test_the_linear_programmes_of_the_paper_end_about_there():
    ray = np.array([0.8, 0.6])
    x = np.linspace(-0.2, 0.4, DIMENSIONS)
    slopes = jax.jit(lambda x: (fonseca(x), jax.jacobian(fonseca)(x)))
    history = []
    for _ in range(120):
        losses, rows = (np.stack(list(v.values())) for v in slopes(jnp.float32(x)))
        w = oracles.epo_of_the_paper(np.float64(rows), np.float64(losses), ray)
        x = x - 0.1 * w @ rows
        history.append(losses * ray)
    _, ours = jax.jit(lambda x: descend(fonseca, x, list(ray)))(
        jnp.linspace(-0.2, 0.4, DIMENSIONS)
    )
    end = np.asarray(ours[-1]) * ray
    np.testing.assert_allclose(end[0], end[1], rtol=1e-5)
    np.testing.assert_allclose(history[-1], end, rtol=0.02)


def test_three_losses_meet_on_the_ray():
    rays = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 2.5], [2.0, 1.2, 1.0]])
    x = jnp.array([1.2, 0.9, 0.5])
    run = jax.jit(jax.vmap(lambda ray: descend(three, x, list(ray), steps=400)))
    points, history = jax.tree.map(np.asarray, run(rays))
    weighted = history * np.asarray(rays)[:, None]
    np.testing.assert_allclose(np.ptp(weighted[:, -1], axis=1), 0, atol=1e-5)
    corners = np.vstack([CENTRES.T, np.ones(3)])  # Inside of the triangle: optimal.
    inside = np.linalg.solve(corners, np.vstack([points[:, :2].T, np.ones(3)]))
    assert inside.min() > 0
    np.testing.assert_allclose(points[:, 2], 0, atol=0.02)
    assert (np.diff(weighted.max(2), axis=1) <= 1e-6).all()


def test_a_ray_that_misses_the_front_and_one_from_the_ideal():
    def parabolas(x):
        return {"a": (x + 1) ** 2 + 1, "b": (x - 1) ** 2}

    ends = jax.jit(
        lambda p, z: descend(parabolas, jnp.array(0.4), p, ideal=z, rate=0.05)[0]
    )
    # a is never as small as an eighth of b: the least of its weighted values.
    missed = ends({"a": 8.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    np.testing.assert_allclose(missed, -1, atol=1e-3)
    above = ends({"a": 4.0, "b": 1.0}, {"a": 1.0, "b": 0.0})
    np.testing.assert_allclose(above, -1 / 3, atol=1e-4)


def test_units_of_losses_that_the_preference_knows_change_nothing():
    factors = np.array([100.0, 1.0, 0.02])
    for jacobian, losses, preference in problems(3):
        found = []
        for scale in (np.ones(3), factors):
            rows = scale[:, None] * jacobian
            given = rows @ rows.T, losses * scale, preference / scale, 1.0
            weights = solver()(*(jnp.float32(x) for x in given))
            d = np.asarray(weights) @ rows
            found.append(d / np.linalg.norm(d))
        np.testing.assert_allclose(*found, atol=1e-4)


def test_what_does_not_fit_is_refused():
    losses = {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match="preference must be positive, got 0.0"):
        epo(preference={"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="horizon must be positive, got -1"):
        epo(horizon=-1)
    with pytest.raises(ValueError, match="preference must be one number, or one for"):
        epo(preference=[1.0, 2.0, 3.0]).init(losses)
    with pytest.raises(ValueError, match="ideal must be one number, or one for each"):
        epo(ideal={"a": 1.0}).init(losses)
