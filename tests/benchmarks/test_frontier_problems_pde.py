"""The references solve their equations, and what is scored is the error to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.harness.training import Carry
from benchmarks.tasks.frontier import methods, physics
from benchmarks.tasks.frontier.problem import LOG_ERROR, TEST, TRAINING, VALIDATION
from benchmarks.tasks.frontier.problems import allen_cahn, burgers, helmholtz
from benchmarks.tasks.pinn import task as pinn

MODULES = {"burgers": burgers, "allen_cahn": allen_cahn, "helmholtz": helmholtz}

pytestmark = pytest.mark.usefixtures("any_rank")


@functools.cache
def quick(name):
    with jax.numpy_rank_promotion("allow"):
        return MODULES[name].make("quick")


@pytest.fixture(params=MODULES)
def problem(request):
    return quick(request.param)


def models_of(problem, count=2):
    return jax.vmap(problem.task.init)(jax.random.split(jax.random.key(0), count))


# The references.


def test_the_allen_cahn_reference_has_converged():
    x = np.linspace(-1, 1, 301)
    u = allen_cahn.evaluate(allen_cahn.solve(saved=50), x)
    half_step = allen_cahn.solve(steps=2 * allen_cahn.TIME_STEPS, saved=50)
    np.testing.assert_allclose(allen_cahn.evaluate(half_step, x), u, atol=1e-10)
    half_width = allen_cahn.solve(2 * allen_cahn.MODES, saved=50)
    difference = allen_cahn.evaluate(half_width, x) - u
    # The initial values have a kink at the ends: coefficients fall with k^2 at first.
    assert np.abs(difference).max() < 1e-4
    assert np.sqrt(np.mean(difference**2)) < 1e-5


def test_the_allen_cahn_reference_solves_the_equation():
    saved = 200
    coefficients = allen_cahn.solve(saved=saved)
    k = np.pi * np.arange(coefficients.shape[1])
    x = np.linspace(-1, 1, 301)
    for i in (20, 60, 120, 180):
        stencil = coefficients[[i - 2, i - 1, i + 1, i + 2]]
        weights = np.array([1, -8, 8, -1]) / 12 * saved / allen_cahn.END
        u_t = weights @ allen_cahn.evaluate(stencil, x)
        u = allen_cahn.evaluate(coefficients[i : i + 1], x)[0]
        u_xx = allen_cahn.evaluate(-(k**2) * coefficients[i : i + 1], x)[0]
        residual = u_t - allen_cahn.DIFFUSION * u_xx + 5 * u**3 - 5 * u
        assert np.abs(u_t).max() > 0.1
        np.testing.assert_allclose(residual, 0, atol=1e-6)


def test_the_allen_cahn_reference_keeps_its_conditions():
    coefficients = allen_cahn.solve(saved=10)
    x = np.linspace(-0.99, 0.99, 101)
    start = allen_cahn.evaluate(coefficients[:1], x)[0]
    np.testing.assert_allclose(start, x**2 * np.cos(np.pi * x), atol=1e-4)


def in_float64(function):
    with jax.enable_x64(True):
        return function()


def test_the_exact_helmholtz_solution_has_no_residual():
    def losses():
        batch = helmholtz.draw(jax.random.key(0), (8, 8), 16)
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
        found = jax.jit(helmholtz.losses, static_argnums=0)(helmholtz.solution, batch)
        return {name: float(loss) for name, loss in found.items()}

    for name, loss in in_float64(losses).items():
        assert loss < 1e-20, name


@pytest.mark.parametrize(
    ("wrong", "loss"),
    [
        (lambda x, y: helmholtz.solution(x, y) + 1e-2 * jnp.cos(x), "x_edges"),
        (lambda x, y: helmholtz.solution(x, y) + 1e-2 * jnp.cos(y), "y_edges"),
    ],
)
def test_a_homogeneous_solution_shows_at_the_edges_alone(wrong, loss):
    """cos(x) solves the equation without a source, as k is 1."""
    batch = helmholtz.draw(jax.random.key(0), (8, 8), 16)
    found = jax.jit(lambda: helmholtz.losses(wrong, batch))()
    assert found["pde"] < 1e-6
    assert found[loss] > 1e-5


def test_allen_cahn_residuals_of_known_functions():
    """The constants 0, 1 and -1 solve it; of others the residual is known."""
    batch = allen_cahn.draw(jax.random.key(0), (4, 8), 8)
    for constant in (0.0, 1.0, -1.0):
        u = lambda t, x, c=constant: jnp.full_like(x, c)
        found = jax.jit(allen_cahn.losses, static_argnums=0)(u, batch)
        assert found["pde"] == found["boundary"] == 0
        assert found["initial"] > 0.01
    t, x = batch.inside.t, batch.inside.x
    square = jax.jit(lambda at: allen_cahn.pde_residual(lambda t, x: t * x**2, at))
    residual = square(batch.inside)
    v = t * x**2
    expected = x**2 - 2 * allen_cahn.DIFFUSION * t + 5 * v**3 - 5 * v
    np.testing.assert_allclose(residual, expected, atol=1e-5)
    of_value, of_slope = allen_cahn.boundary_residuals(
        lambda t, x: t * x + x**2, batch.times
    )
    np.testing.assert_allclose(of_value, 2 * batch.times, atol=1e-6)
    np.testing.assert_allclose(of_slope, 4.0, atol=1e-6)


def test_initial_points_lie_at_the_start_and_edges_at_the_ends():
    batch = allen_cahn.draw(jax.random.key(0), (4, 8), 8)
    assert not batch.initial.t.any()
    assert 0 <= batch.inside.t.min() < batch.inside.t.max() <= allen_cahn.END
    batch = helmholtz.draw(jax.random.key(0), (4, 8), 8)
    for ends in (batch.x_edges.x, batch.y_edges.y):
        assert set(ends.tolist()) == {-1.0, 1.0}


# Problems.


def test_validation_and_test_share_no_point(problem):
    data = problem.task.data
    held_out = set(zip(data.first.tolist(), data.second.tolist(), strict=True))
    known = TESTS[problem.task.name]()
    tested = set(zip(known.first.tolist(), known.second.tolist(), strict=True))
    assert len(held_out) > 4000
    assert len(tested) > 10_000
    assert not held_out & tested


TESTS = {
    "burgers": lambda: physics.Known(*pinn.references()[0]),
    "allen_cahn": lambda: allen_cahn.references()[0],
    "helmholtz": lambda: helmholtz.references()[0],
}


def test_the_exact_solution_scores_high_and_errors_are_percent():
    known = helmholtz.references()[0]
    scores = [
        float(physics.log_error(lambda x, y, f=f: f * helmholtz.solution(x, y), known))
        for f in (1.0 + 1e-4, 1.01, 1.05, 2.0)
    ]
    np.testing.assert_allclose(scores, -100 * np.log([1e-4, 0.01, 0.05, 1.0]), atol=0.5)


def test_a_problem_says_how_it_is_judged(problem):
    assert problem.unit == LOG_ERROR
    assert problem.margin == 5
    assert len(problem.bounds) == len(problem.task.auxiliary)
    assert all(low < high for low, high in problem.bounds)
    models = models_of(problem)
    scores = problem.scores(models, jnp.arange(2))
    assert set(scores) == {TRAINING, VALIDATION, TEST}
    for values in scores.values():
        assert values.shape == (2,)
        assert np.isfinite(values).all()
    # The downstream loss of all points is the squared relative error.
    everywhere = physics.Drawn(None, problem.task.data)
    downstream = lambda model: problem.task.downstream(model, None, everywhere)
    found = -50 * np.log(jax.vmap(downstream)(models))
    np.testing.assert_allclose(found, scores[VALIDATION], atol=1e-2)


def test_held_out_batches_come_from_the_validation_points(problem):
    task = problem.task
    drawn = task.draw_held_out(task.data, jax.random.key(0))
    places = set(zip(*(x.tolist() for x in task.data), strict=True))
    assert set(zip(*(x.tolist() for x in drawn.known), strict=True)) <= places
    assert task.draw(task.data, jax.random.key(0)).known is None


def test_quick_trains_with_finite_losses_and_weights_matter(problem):
    task = problem.task
    optimizer = task.optimizer()

    @jax.jit
    def step(model, state, key, weight):
        drawn = task.draw(task.data, key)

        def total(model):
            primary, *others = task.losses(model, None, drawn).values()
            return primary + weight * sum(others)

        loss, grads = jax.value_and_grad(total)(model)
        updates, state = optimizer.update(grads, state, model)
        return optax.apply_updates(model, updates), state, loss

    def train(weight):
        model = task.init(jax.random.key(0))
        state = optimizer.init(model)
        for key in jax.random.split(jax.random.key(1), task.steps):
            model, state, loss = step(model, state, key, weight)
            assert np.isfinite(loss)
        return model

    models = jax.tree.map(lambda *x: jnp.stack(x), train(0.0), train(100.0))
    first, second = problem.scores(models, jnp.arange(2))[TEST]
    assert first != second


def residuals_of(name, model, batch):
    """By loss: residuals [points], or [points] of each of two."""
    if name == "burgers":
        return pinn.residuals(model, batch)
    u = physics.function(model)
    if name == "helmholtz":
        edges = {"x_edges": u(*batch.x_edges), "y_edges": u(*batch.y_edges)}
        return {"pde": helmholtz.pde_residual(u, batch.inside), **edges}
    return {
        "pde": allen_cahn.pde_residual(u, batch.inside),
        "initial": allen_cahn.initial_residual(u, batch.initial),
        "boundary": jnp.stack(allen_cahn.boundary_residuals(u, batch.times), axis=1),
    }


def test_the_kernel_is_that_of_all_residuals(problem):
    task = problem.task
    model = task.init(jax.random.key(0))
    drawn = task.draw(task.data, jax.random.key(1))
    found = jax.jit(task.statistics[physics.KERNEL])(model, drawn)
    rows = jax.jit(jax.jacrev(lambda m: residuals_of(task.name, m, drawn.batch)))(model)
    assert set(found) == set(task.names)
    for name, of_loss in rows.items():
        leaves = jax.tree.leaves(of_loss)
        squares = sum(np.sum(np.square(x)) for x in leaves)
        np.testing.assert_allclose(found[name], squares / len(leaves[0]), rtol=1e-4)


def test_the_kernel_is_a_row_of_equations(problem):
    rows = methods.entries(problem.task)
    assert rows["ntk, every 100"].runs == 1.01
    rule = rows["ntk, every 100"].rule
    key, config = jax.random.key(0), rule.configure([{}])[0]
    model = problem.task.init(key)
    carry = Carry(jnp.zeros((), jnp.int32), model, (), rule.init(problem.task, config))
    made = rule.step(problem.task, problem.task.data, carry, config, key)
    batch = problem.task.draw(problem.task.data, key)
    kernel = problem.task.statistics[physics.KERNEL](model, batch)
    mean = sum(kernel.values()) / len(kernel)
    for name, weight in made.weights.items():  # The running mean of the first look.
        expected = 0.9 + 0.1 * mean / kernel[name]
        np.testing.assert_allclose(weight, expected, rtol=1e-4)
