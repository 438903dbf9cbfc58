"""The network's task is right, and its records say what was run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness.options import Options
from benchmarks.harness.results import describe, parse, read_json, select, values
from benchmarks.tasks.pinn import methods, report, task
from benchmarks.tasks.pinn import run as pinn

SEEDS, STEPS = 2, 4
RUN = ("static", "tuned", "ntk", "yoto")
RATIOS = pinn.SIZES["quick"].ratios

pytestmark = pytest.mark.usefixtures("any_rank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the quick preset writes."""
    folder = tmp_path_factory.mktemp("pinn")
    options = Options("pinn", RUN, seeds=SEEDS, steps=STEPS, preset="quick", out=folder)
    with jax.numpy_rank_promotion("allow"):
        pinn.main(options)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "pinn.json")


def cole_hopf(t, x, nodes=100):
    """The exact solution: a ratio of heat flows, by Gauss and Hermite's rule."""
    z, w = np.polynomial.hermite.hermgauss(nodes)
    y = x[:, None] - z * np.sqrt(4 * task.VISCOSITY * t)
    kernel = w * np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * task.VISCOSITY))
    return -(np.sin(np.pi * y) * kernel).sum(axis=1) / kernel.sum(axis=1)


def small_model():
    return task.init_model(jax.random.key(3), 8, 2)


def small_batch(key=0):
    return task.draw_batch(jax.random.key(key), (4, 8), 8)


# The reference.


def test_the_quadrature_of_the_exact_solution_has_converged():
    x = np.linspace(-1, 1, 301)
    for t in (0.1, 0.5, 1.0):
        np.testing.assert_allclose(cole_hopf(t, x), cole_hopf(t, x, 150), atol=1e-13)


def test_the_spectral_solution_is_the_exact_one():
    coefficients = task.solve()
    x = np.linspace(-1, 1, 501)
    for i in (1, 20, 80, 95, 100, 120, 160, 200):
        spectral = task.evaluate(coefficients[i : i + 1], x)[0]
        # Found: 1.3e-8, where the front is steepest.
        np.testing.assert_allclose(spectral, cole_hopf(i / 200, x), atol=1e-7)


def test_the_solution_keeps_its_initial_and_boundary_values():
    coefficients = task.solve(512, 1000, 10)
    x = np.linspace(-1, 1, 101)
    u = task.evaluate(coefficients, x)
    np.testing.assert_allclose(u[0], -np.sin(np.pi * x), atol=1e-14)
    np.testing.assert_allclose(u[:, [0, -1]], 0, atol=1e-10)
    np.testing.assert_allclose(u, -u[:, ::-1], atol=1e-10)


def test_validation_and_test_share_no_point():
    test, validation = task.references()
    assert len(test.t) == 101 * task.TEST_X
    assert len(validation.t) == task.VALIDATION_POINTS
    assert not set(np.unique(test.t)) & set(np.unique(validation.t))
    for points in (test, validation):
        assert points.u is not None
        at = [0.0, 0.25, 0.5, 1.0] if points is test else [0.255, 0.745]
        for time in at:
            here = np.isclose(points.t, time)
            assert here.any()
            x = np.asarray(points.x[here], np.float64)
            exact = -np.sin(np.pi * x) if time == 0 else cole_hopf(time, x)
            # float32 places and values, on a front of slope 150.
            np.testing.assert_allclose(points.u[here], exact, atol=1e-5)


# Points, residuals, losses.


def test_every_cell_has_a_point():
    batch = small_batch()
    cells = np.stack([batch.inside.t * 4, (batch.inside.x + 1) / 2 * 8]).astype(int)
    assert len({tuple(cell) for cell in cells.T}) == 32
    assert (np.abs(batch.inside.x) <= 1).all()
    assert (batch.initial.t == 0).all()
    np.testing.assert_array_equal(((batch.initial.x + 1) * 4).astype(int), range(8))
    np.testing.assert_array_equal((batch.boundary.t * 8).astype(int), range(8))
    np.testing.assert_array_equal(batch.boundary.x, [-1, 1] * 4)


def test_every_step_has_its_own_points():
    first, again, other = small_batch(0), small_batch(0), small_batch(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.isclose(first.inside.t, other.inside.t).any()
    assert not np.isclose(first.initial.x, other.initial.x).any()


def test_an_exact_wave_leaves_no_residual(monkeypatch):
    """u = 1 - tanh((x - t) / (2 nu)) solves the equation, with a front that moves."""
    with jax.enable_x64(True):
        nu = task.VISCOSITY
        wave = lambda _, t, x: 1.0 - jnp.tanh((x - t) / (2 * nu))
        t = jnp.linspace(0.1, 0.9, 41)
        at = task.Points(t, t + nu * jnp.linspace(-5, 5, 41))
        monkeypatch.setattr(task, "predict", wave)
        # The terms themselves are of the size 1 / nu = 314.
        np.testing.assert_allclose(task.pde_residual(None, at), 0, atol=1e-10)


def test_the_residual_is_that_of_derivatives_point_by_point():
    with jax.enable_x64(True):
        model, batch = small_model(), small_batch()

        def at_one(t, x):
            u = lambda t, x: task.predict(model, t, x)
            u_xx = jax.grad(jax.grad(u, 1), 1)(t, x)
            return (
                jax.grad(u)(t, x) + u(t, x) * jax.grad(u, 1)(t, x) - 0.01 / np.pi * u_xx
            )

        expected = jax.jit(jax.vmap(at_one))(batch.inside.t, batch.inside.x)
        residual = jax.jit(task.pde_residual)(model, batch.inside)
        np.testing.assert_allclose(residual, expected, atol=1e-12)


def test_losses_are_means_of_squares():
    model, batch = small_model(), small_batch()
    losses = jax.jit(task.losses)(model, batch)
    assert set(losses) == set(task.LOSSES)
    start = task.predict(model, jnp.zeros(8), batch.initial.x)
    wanted = np.mean((start + np.sin(np.pi * batch.initial.x)) ** 2)
    np.testing.assert_allclose(losses["initial"], wanted, rtol=1e-5)
    ends = task.predict(model, batch.boundary.t, batch.boundary.x)
    np.testing.assert_allclose(losses["boundary"], np.mean(ends**2), rtol=1e-5)


def test_the_kernel_is_that_of_the_whole_jacobian():
    model, batch = small_model(), small_batch()
    jacobian = jax.jit(jax.jacrev(task.residuals))(model, batch)
    for name, found in jax.jit(task.ntk_diagonal)(model, batch).items():
        squares = [
            np.sum(np.square(leaf).reshape(len(leaf), -1), axis=1)
            for leaf in jax.tree.leaves(jacobian[name])
        ]
        np.testing.assert_allclose(found, np.mean(sum(squares)), rtol=1e-4)


def test_the_error_of_a_perfect_network_is_0_and_of_none_is_1():
    t, x = np.random.default_rng(0).uniform(-1, 1, (2, 50)).astype(np.float32)
    model = small_model()
    exact = task.Points(t, x, task.predict(model, t, x))
    assert task.relative_error(model, exact) == 0
    silent = jax.tree.map(jnp.zeros_like, model)
    np.testing.assert_allclose(task.relative_error(silent, exact), 1, rtol=1e-6)


# Runs.


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_can_be_traced_and_keeps_its_state(method):
    make = methods.METHODS[method].make
    start, advance = pinn.program_of(make, pinn.SIZES["quick"], 10, 5)
    carry = jax.eval_shape(start, 0, jnp.ones(2))
    after, (weights, losses) = jax.eval_shape(advance, carry, 0, jnp.ones(2))
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    assert jax.tree.leaves(after) == jax.tree.leaves(carry)
    for history in (weights, losses):
        assert set(history) == set(task.LOSSES)
        assert all(x.shape == (5,) for x in history.values())


def test_equal_weights_are_trained_once():
    runs = pinn.choose_runs(("static", "tuned", "yoto"), (1.0, 10.0))
    assert len(runs) == len(set(runs)) == 5
    assert set(pinn.grid((1.0, 10.0))) < set(runs)
    assert pinn.choose_runs(("yoto",), (1.0,)) == [pinn.Run("yoto", (1.0, 1.0))]


def trained(errors, validation, seconds):
    """A stretch of 10 steps each, by hand; ``seconds`` by program."""
    curves = {
        (run, 0): pinn.Curve(errors[run], validation[run], [], []) for run in errors
    }
    rounds = {
        program: [[s] for s in of_stretches]
        for program, of_stretches in seconds.items()
    }
    steps = 10 * len(next(iter(errors.values())))
    return pinn.Trained(steps, 10, curves, rounds, dict.fromkeys(seconds, 1.0))


@pytest.mark.parametrize(("factor", "error"), [(1, 0.2), (2, 0.4), (0.5, 0.2)])
def test_at_equal_time_a_slower_method_has_done_fewer_steps(factor, error):
    run = pinn.Run("ntk", (1.0, 1.0))
    errors = {run: [0.5, 0.4, 0.3, 0.2], pinn.EQUAL: [1.0] * 4}
    static = [1.0, 3.0, 2.0, 1.0]  # Others were busy: both slow down.
    seconds = {"static": static, "ntk": [factor * s for s in static]}
    found = trained(errors, errors, seconds)
    np.testing.assert_allclose(
        pinn.at_equal_time(found.curves[run, 0], run, found), error
    )


def test_the_search_looks_at_validation_alone_and_survives_nan():
    runs = pinn.grid((1.0, 10.0))
    errors = dict(zip(runs, ([0.1], [0.2], [0.3], [np.nan]), strict=True))
    validation = dict(zip(runs, ([0.3], [np.nan], [0.2], [0.4]), strict=True))
    choice = pinn.chosen(
        "tuned", 0, (1.0, 10.0), trained(errors, validation, {"static": [1.0]})
    )
    assert choice[pinn.VALIDATED] == runs[2]
    assert choice[pinn.WORST] == runs[3]


def test_without_static_weights_no_time_is_relative():
    run = pinn.Run("yoto", (1.0, 1.0))
    found = trained({run: [0.5]}, {run: [0.5]}, {"yoto": [1.0]})
    metrics = {r["metric"] for r in pinn.timing_records(("yoto",), found)}
    assert metrics == {"step_seconds", "compile_seconds"}


# Records, and what is made of them.


def test_every_method_has_every_seed(result):
    for method in RUN:
        configs = {
            r["config"]
            for r in select(result["records"], method=method, metric="error")
        }
        assert len(configs) == (len(RATIOS) ** 2 + 2 if method == "tuned" else 1)
        for config in configs:
            for metric in ("error", "error at equal time", "weight:pde"):
                seeds = select(
                    result["records"], method=method, config=config, metric=metric
                )
                assert [r["seed"] for r in seeds] == list(range(SEEDS))
                assert all(r["value"] > 0 for r in seeds)


def test_all_methods_start_alike(result):
    starts = [h["losses"] for h in result["history"] if h["seed"] == 0]
    for start in starts:
        for name in task.LOSSES:
            np.testing.assert_allclose(start[name][0], starts[0][name][0], rtol=1e-4)
    assert starts[0] != next(h["losses"] for h in result["history"] if h["seed"] == 1)


def test_fixed_weights_stay_and_are_those_of_the_configuration(result):
    for record in select(result["records"], method="tuned", seed=0):
        if record["metric"] in ("weight:initial", "weight:boundary"):
            settings = parse(record["config"]) if "=" in record["config"] else {}
            name = record["metric"].removeprefix("weight:")
            assert record["value"] == float(settings.get(name, record["value"]))
    equal = next(h for h in result["history"] if h["method"] == "static")
    assert all(set(weights) == {1.0} for weights in equal["weights"].values())


def test_equal_weights_are_a_point_of_the_grid(result):
    config = describe(initial=1, boundary=1)
    static, point = (
        values(result["records"], method=m, config=config, metric="error")
        for m in ("static", "tuned")
    )
    np.testing.assert_array_equal(static, point)


def test_a_search_pays_for_all_its_runs(result):
    chosen = select(result["records"], method="tuned", config=pinn.VALIDATED)
    assert {r["compute"] for r in chosen} == {len(RATIOS) ** 2}
    others = [r for r in result["records"] if r["config"] != pinn.VALIDATED]
    assert {r["compute"] for r in others} == {1}


def test_table_and_sentences_follow_from_the_file(folder, result):
    rows = {row[0]: row for row in report.table(result).rows}
    assert set(rows) == {
        "static 1:1:1",
        "static, best by validation",
        "static, worst of grid",
        "NTK",
        "YOTO",
    }
    assert rows["static 1:1:1"][3].startswith("1.000")
    better = json.loads(json.dumps(result))
    for record in better["records"]:
        if record["method"] == "yoto" and record["metric"] == "error":
            record["value"] = 1e-3 * (1 + 0.001 * record["seed"])
    ranking, against_static, _ = report.conclusions(better)
    assert "seeds: YOTO 0.001," in ranking
    assert "YOTO" in against_static.partition("; no significant difference")[0]
    written = (folder / "pinn.png").read_bytes()
    report.figure(result, folder / "again.png")
    assert (folder / "again.png").read_bytes() == written
