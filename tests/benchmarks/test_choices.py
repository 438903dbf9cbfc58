"""The study of choices: one-hot lanes are architectures, regrets are exact."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks.harness.results import read_json, values
from benchmarks.tasks.choices import report, run, task

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")

SIZE = run.SIZES["quick"]
METHODS = ("training softmax", "held-out straight_through")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    with jax.numpy_rank_promotion("allow"):
        command = f"choices --preset quick --seeds 2 --out {folder} --methods".split()
        command_line.main([*command, ",".join(METHODS)])
    return read_json(folder / "choices.json")


def test_parts_have_no_signal_in_common_and_every_view_its_scale():
    data = task.data_of(SIZE)
    x = np.concatenate([part.views["signal"] for part in data])
    assert len(np.unique(x, axis=0)) == SIZE.train + SIZE.validation + SIZE.test
    for view in data.train.views.values():
        np.testing.assert_allclose(view.mean(0), 0, atol=1e-5)
        assert 0.5 < view.std() <= 1.01


def test_a_one_hot_lane_is_the_architecture():
    data = task.data_of(SIZE)
    model = task.init_model(jax.random.key(0), SIZE)
    views = data.test.views

    @jax.jit
    @jax.vmap
    def lanes(choices):
        return task.predict(model, choices, views)

    mixed = lanes(task.one_hot())
    assert len(mixed) == 36
    for place in (0, 7, 20, 35):
        alone = task.predict(model, task.hard(task.ARCHITECTURES[place]), views)
        np.testing.assert_allclose(mixed[place], alone, rtol=1e-5, atol=1e-5)
    spread = jnp.std(mixed, axis=0)
    assert (spread > 0.01).all()
    indices = {
        name: jnp.argmax(choice.weights, -1) for name, choice in task.one_hot().items()
    }
    assert task.place_of(indices).tolist() == list(range(36))


def test_the_expected_regret_of_random_search_is_that_of_all_subsets():
    rng = np.random.default_rng(0)
    validation, regret = rng.normal(size=(2, 6)), rng.uniform(size=6)
    records = run.random_search(validation, regret)
    for seed, n in itertools.product(range(2), range(1, 7)):
        subsets = list(itertools.combinations(range(6), n))
        best = [max(s, key=lambda k: validation[seed, k]) for s in subsets]
        (found,) = values(records, seed=seed, config=f"runs={n}")
        np.testing.assert_allclose(found, regret[best].mean(), rtol=1e-4)


def test_the_regret_is_of_the_best_by_validation():
    validation, test = np.array([1.0, 3.0, 2.0]), np.array([5.0, 6.0, 8.0])
    assert run.regrets(validation, test).tolist() == [1.0, 0.0, -2.0]
    inside = np.array([0, 2])
    assert run.regrets(validation, test, inside).tolist() == [3.0, 2.0, 0.0]
    signal = [task.ARCHITECTURES[place][0] == "signal" for place in range(36)]
    assert run.smaller_space().tolist() == np.flatnonzero(signal).tolist()


def test_every_way_and_schedule_has_a_row(result):
    table = report.table(result)
    budgets = report._budgets(result)
    assert set(budgets) >= {1, 2, 3}
    assert len(table.rows) == 2 * 3 + len(budgets)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    for row in report._rows(result):
        (gap,) = {
            len(report._of(result, row, f"{when}: test"))
            for when in ("before", "after")
        }
        assert gap == 2
    tables = report.tables(result)
    assert len(tables["choices-options"].rows) == 10
    assert len(tables["choices-smaller"].rows) == 2 + len(budgets)
    assert len(report.conclusions(result)) == 7
    assert len(report.architectures(result)) == 36
    json.dumps(result["history"])


def test_a_gradient_of_the_mixture_takes_more_than_one_of_an_architecture(result):
    mixture, alone = values(result["records"], metric="flops")
    assert mixture > 1.2 * alone
