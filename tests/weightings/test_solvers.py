import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import gramian as oracles
from yoto_jax import _solvers


def conflicting(losses, seed):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(losses, losses // 2 + 8))
    jacobian -= rng.uniform(0.5, 1.0) * jacobian.mean(0)
    return jacobian * np.exp(rng.normal(size=(losses, 1)))


@functools.cache
def upgrad_solver(losses, dtype):
    def solve(gramian):
        matrix = _solvers.unit_trace(gramian) + 1e-4 * jnp.eye(losses, dtype=dtype)
        lengths = jnp.full((losses,), 1 / losses, dtype)
        return jnp.sum(_solvers.solve_axis_qps(matrix, lengths), axis=0)

    return jax.jit(solve)


@pytest.mark.parametrize("losses", [2, 3, 11, 40])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_bounded_qp_agrees_with_an_active_set_method(losses, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        for seed in range(10):
            jacobian = conflicting(losses, seed)
            gramian = np.asarray(jacobian @ jacobian.T, dtype)
            exact = gramian.astype(np.float64)  # of what the solver is given
            matrix = exact / np.trace(exact) + 1e-4 * np.eye(losses)
            expected = sum(
                oracles.bounded_qp(matrix, np.zeros(losses), u)
                for u in np.eye(losses) / losses
            )
            found = upgrad_solver(losses, dtype)(jnp.asarray(gramian))
            error = np.abs(np.float64(found) - expected).max() / expected.max()
            assert error <= bound


@pytest.mark.parametrize("at_once", [20, 2])
def test_what_is_not_solved_together_is_solved_one_by_one(at_once, monkeypatch):
    monkeypatch.setattr(_solvers, "_ENTRIES", at_once * 20**2)
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.5, 2, 20).astype("float32")
    jacobian = rng.normal(size=(20, 3))
    flat = jacobian @ jacobian.T / np.trace(jacobian @ jacobian.T)
    jacobian[::3] = 0  # losses without a gradient
    ridged = jacobian @ jacobian.T + np.eye(20)
    lanes = np.float32([flat, ridged, np.zeros((20, 20))])

    def solve(matrix):
        together = _solvers._axis_qps_together(matrix, jnp.asarray(lengths))
        return together[1], _solvers.solve_axis_qps(matrix, jnp.asarray(lengths))

    exact, found = map(np.asarray, jax.jit(jax.vmap(solve))(lanes))
    np.testing.assert_array_equal(exact, [False, True, True])
    assert (found >= np.diag(lengths)).all()
    slack = found[0] @ flat
    assert slack.min() >= -1e-5
    assert np.abs((found[0] - np.diag(lengths)) * slack).max() <= 1e-4
    expected = [oracles.bounded_qp(ridged, np.zeros(20), u) for u in np.diag(lengths)]
    np.testing.assert_allclose(found[1], expected, atol=1e-5)
    np.testing.assert_array_equal(found[2], np.diag(lengths))


def test_non_negative_least_squares_has_exact_zeros_and_float64_accuracy():
    rng = np.random.default_rng(0)
    solve = jax.jit(_solvers.solve_bounded_qp)
    with jax.enable_x64(True):
        for _ in range(20):
            unit = oracles.units(rng.normal(size=(7, 12)))
            matrix, linear = unit @ unit.T, unit @ rng.normal(size=12)
            expected = oracles.bounded_qp(matrix, linear, np.zeros(7))
            found = np.asarray(solve(matrix, linear, jnp.zeros(7)))
            np.testing.assert_allclose(found, expected, atol=1e-10)
            np.testing.assert_array_equal(found == 0, expected == 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_singular_matrices_give_an_optimal_solution(dtype):
    rng = np.random.default_rng(1)
    solve = jax.jit(_solvers.solve_bounded_qp)
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    with jax.enable_x64(dtype == "float64"):
        for _ in range(10):
            unit = oracles.units(rng.normal(size=(6, 3)))
            unit[1] = unit[0]
            unit[2] = 0
            matrix, linear = unit @ unit.T, unit @ rng.normal(size=3)
            found = solve(
                jnp.asarray(matrix, dtype),
                jnp.asarray(linear, dtype),
                jnp.zeros(6, dtype),
            )
            found = np.float64(found)
            slack = matrix @ found - linear
            assert np.isfinite(found).all()
            assert found.min() >= 0
            assert slack.min() >= -tolerance
            assert abs(found @ slack) <= tolerance * 10


def test_zero_matrix_returns_the_bounds():
    lower = jnp.asarray([0.5, 0.0, 2.0])
    found = _solvers.solve_bounded_qp(jnp.zeros((3, 3)), jnp.zeros(3), lower)
    np.testing.assert_allclose(found, lower, atol=1e-6)


@pytest.mark.parametrize("losses", [1, 2, 3, 5])
def test_smallest_convex_combination_is_the_best_of_all_faces(losses):
    solve = jax.jit(_solvers.smallest_convex_combination)
    with jax.enable_x64(True):
        for seed in range(10):
            jacobian = conflicting(losses, seed)
            found = np.asarray(solve(jacobian @ jacobian.T))
            expected = oracles.mgda(jacobian)
            np.testing.assert_allclose(found, expected, atol=1e-9)


def power_solver(regularization, steps):
    def solve(cosine, scale, power):
        eye = jnp.eye(len(scale), dtype=scale.dtype)
        matrix = cosine + regularization * eye
        return _solvers.solve_power_equation(matrix, scale, power, steps=steps)

    return jax.jit(solve)


@pytest.mark.parametrize("losses", [2, 20])
def test_power_equation_is_solved_for_many_exponents_and_scales(losses):
    solve = power_solver(1e-4, 40)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for alpha in (0.5, 1.0, 2.0, 5.0):
            for spread in (0.0, 1.0, 2.0):
                unit = oracles.units(rng.normal(size=(losses, losses // 2 + 2)))
                matrix = unit @ unit.T + 1e-4 * np.eye(losses)
                norms = np.exp(spread * rng.normal(size=losses))
                scale = (norms / norms.max()) ** (1 / alpha - 1)
                b = np.asarray(solve(unit @ unit.T, jnp.asarray(scale), 1 / alpha))
                assert b.min() > 0
                np.testing.assert_allclose(
                    (matrix @ b) * b ** (1 / alpha) / scale, 1, atol=1e-7
                )


def test_a_gradient_that_is_zero_has_no_cosine():
    cosine, norms = _solvers.cosines(jnp.diag(jnp.asarray([4.0, 0.0, 1e-30])))
    np.testing.assert_allclose(cosine, np.diag([1.0, 0.0, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(norms, [2.0, 0.0, 1e-15], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_simplex_qp_is_the_best_of_all_faces(dtype):
    tolerance = 1e-5 if dtype == "float32" else 1e-11
    with jax.enable_x64(dtype == "float64"):
        solve = jax.jit(_solvers.solve_simplex_qp)
        for seed in range(8):
            rng = np.random.default_rng(seed)
            rows = rng.normal(size=(4, 6))
            linear = rng.normal(size=4) * 10.0 ** rng.uniform(-3, 0)
            if seed % 2:  # A mixture of all vanishes, as on a Pareto front.
                w = rng.uniform(0.2, 1.0, 4)
                rows -= np.outer(w, w @ rows) / (w @ w)
            matrix = rows @ rows.T / np.trace(rows @ rows.T)
            expected = oracles.simplex_qp(matrix, linear)
            found = solve(jnp.asarray(matrix, dtype), jnp.asarray(linear, dtype))
            np.testing.assert_allclose(found, expected, atol=tolerance)
            np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)
            there = np.arange(4) != seed % 4
            part = np.ix_(there, there)
            expected = oracles.simplex_qp(matrix[part], linear[there])
            found = solve(
                jnp.asarray(matrix, dtype),
                jnp.asarray(linear, dtype),
                jnp.asarray(there),
            )
            np.testing.assert_allclose(found[there], expected, atol=tolerance)
            assert found[~there] == 0


def test_simplex_qp_without_a_matrix_or_with_many_solutions():
    solve = jax.jit(_solvers.solve_simplex_qp)
    linear = jnp.array([1.0, 3.0, 2.0])
    np.testing.assert_allclose(solve(jnp.zeros((3, 3)), linear), [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(solve(jnp.zeros((3, 3)), 0 * linear), 1 / 3, atol=1e-6)
    found = solve(jnp.ones((3, 3)), 0 * linear)  # Three gradients alike.
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
    none = solve(jnp.eye(3), linear, jnp.zeros(3, bool))
    assert np.isfinite(none).all()
