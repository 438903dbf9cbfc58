"""The benchmark of bad batches: faults are faults, verdicts are those of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness.options import Options
from benchmarks.harness.results import read_json
from benchmarks.tasks.robustness import methods, report, task
from benchmarks.tasks.robustness import run as robustness
from yoto_jax import weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = ("famo", "lr_annealing", "layer 1, adamw")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    options = Options("robustness", METHODS, preset="quick", out=folder)
    robustness.main(options)
    return read_json(folder / "robustness.json")


def test_a_fault_is_in_the_loss_and_in_its_gradient():
    w, noise = jnp.ones(task.SIZE), jnp.zeros((3, task.SIZE))
    slope = jax.jit(jax.grad(lambda w, f: task.losses_of(w, noise, f)["b"]))
    clean = slope(w, jnp.ones(3))
    for fault in task.FAULTS.values():
        factors = jnp.array([1.0, fault, 1.0], jnp.float32)
        losses = task.losses_of(w, noise, factors)
        assert np.isfinite([losses["a"], losses["c"]]).all()
        np.testing.assert_allclose(slope(w, factors), clean * factors[1], rtol=1e-6)
        assert np.isfinite(fault) == bool(jnp.isfinite(losses["b"]))


def test_the_kernel_diagonal_is_that_of_the_roots_of_the_losses():
    w, noise = jnp.linspace(0, 1, task.SIZE), jnp.zeros((3, task.SIZE))
    roots = lambda w: jax.tree.map(jnp.sqrt, task.losses_of(w, noise, jnp.ones(3)))
    rows = np.stack(list(jax.jit(jax.jacobian(roots))(w).values()))
    diagonal = jax.jit(task.kernel_diagonal)
    got = diagonal(w, noise, jnp.ones(3))
    np.testing.assert_allclose(got, np.sum(rows**2, axis=1), rtol=1e-5)
    assert diagonal(w, noise, jnp.zeros(3)).tolist() == [0, 0, 0]


def test_every_weighting_takes_part_or_has_a_reason_not_to():
    names = set(weightings.methods())
    assert set(task.LEFT_OUT) < names
    assert set(task.WEIGHTINGS) & names == names - set(task.LEFT_OUT)


def test_with_skip_outliers_every_fault_comes_to_the_same(result):
    read = lambda *key: report.value(result, *key)
    for method in METHODS:
        for metric in ("weights", "losses", "not stepped"):
            found = {
                read(method, "skip_outliers", fault, metric) for fault in task.FAULTS
            }
            assert len(found) == 1, (method, metric)
        assert read(method, "skip_outliers", "NaN", "not stepped") >= 5
        assert read(method, "skip_outliers", "clean", "not stepped") == 0
        same = read(method, "skip_outliers", "NaN", "weights")
        assert same == pytest.approx(read(method, "bare", "NaN", "weights"), abs=1e-3)
        for fault in task.FAULTS:
            assert not report.broke(result, method, "skip_outliers", fault)


def test_without_it_large_losses_do_harm(result):
    off = lambda method: report.value(result, method, "bare", "1e10", "weights")
    assert off("lr_annealing") > 1  # an average of a ratio
    assert off("layer 1, adamw") > 1  # second moments
    assert off("famo") < 1  # logarithms
    assert report.broke(result, "layer 1, adamw", "bare", "1e30")


def test_tables_and_conclusions_read_the_stored_result_alone(result):
    tables = [report.table(result), *report.tables(result).values()]
    for table in tables:
        assert len(table.rows) == len(METHODS)
        assert all(len(row) == len(table.columns) for row in table.rows)
    sentences = report.conclusions(result)
    assert len(sentences) == 9
    assert "not finite in 0 of" in sentences[-3]
    assert "of 6 runs 0 held a number that is not finite" in sentences[3]
    assert "the same run with 3 of 3 methods" in sentences[-2]
    assert "skipped some with 0 of 3 methods" in sentences[-1]


def test_deviation_is_relative_and_weights_near_zero_count_little():
    weights = np.array([1.0, 0.5, 0.0])
    off = lambda *values: robustness.deviation(np.array(values), weights)
    assert off(1.0, 0.6, 0.0) == pytest.approx(0.2)
    assert off(1.0, 0.5, 1e-3) == pytest.approx(0.1)
    assert off(np.nan, 0.5, 0.0) == methods.LOST
    assert report._percent(methods.LOST) == "lost"
