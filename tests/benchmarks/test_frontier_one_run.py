"""What the frontier trains once and chooses afterwards, or on the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness.conditional import NARROWED_AT, Chosen, Conditional
from benchmarks.harness.options import Options
from benchmarks.harness.units import Units
from benchmarks.tasks.frontier import methods, report, run
from benchmarks.tasks.frontier.problem import TEST, VALIDATION
from benchmarks.tasks.frontier.problems import PROBLEMS, make
from benchmarks.tasks.frontier.train import LOOKS, choosing, of_seeds, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "plain_arithmetic")

SEEDS = [0, 3]


@pytest.fixture
def plain_arithmetic():
    """Networks of the digits add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", ["digits", "missing_labels", "burgers"])
def test_a_conditional_model_is_trained_and_its_weights_chosen(name):
    problem = make(name, "quick")
    rule = methods.every_entry(problem)["conditional"].rule
    lines = train(problem, rule, [{}] * len(SEEDS), SEEDS)
    for line in lines:
        assert {VALIDATION, TEST} <= set(line["looks"])
        assert all(len(scores) == LOOKS for scores in line["looks"].values())
        weights = [line["weights"][name] for name in problem.task.names]
        np.testing.assert_allclose(sum(weights), 1, rtol=1e-4)
        for weight, (low, high) in zip(weights[1:], problem.bounds, strict=True):
            assert low * 0.999 <= weight / weights[0] <= high * 1.001


@pytest.mark.parametrize("pick", ["yoto", "grap", "gradient"])
def test_weights_are_picked_with_the_data_of_the_seed(pick):
    problem = make("missing_labels", "quick")
    trained = Conditional(problem.bounds)
    rule = Chosen(trained, pick)
    both = train(problem, rule, [{}] * 2, SEEDS)
    alone = train(problem, rule, [{}], SEEDS[1:])
    for name, weight in alone[0]["weights"].items():
        np.testing.assert_allclose(weight, both[1]["weights"][name], rtol=1e-3)


def test_narrowing_happens_on_the_way():
    problem = make("digits", "quick")
    seen = []

    class Watched(Chosen):
        def after(self, task, carry, part, parts):
            made = super().after(task, carry, part, parts)
            seen.append(np.log(np.asarray(made.rule.high / made.rule.low)).max())
            return made

    rule = Watched(Conditional(problem.bounds), narrowing=True)
    train(problem, rule, [{}], [0])
    width = np.log(1e5)
    halved = [width * 0.5**n for n in (0, 0, 0, 1, 1, 2, 2, 3, 3, 3)]
    np.testing.assert_allclose(seen, halved, rtol=1e-3)


def test_lanes_are_looked_at_on_validation_data_of_their_seeds():
    problem = make("digits", "quick")
    models = jax.vmap(problem.task.init)(jax.random.split(jax.random.key(0), 2))
    seeds = jnp.array(SEEDS)
    np.testing.assert_allclose(
        of_seeds(problem, seeds).validate(models),
        problem.scores(models, seeds)[VALIDATION],
        rtol=1e-6,
    )


def test_choosing_is_counted():
    problem = make("digits", "quick")
    entries = methods.every_entry(problem)
    cost = {name: choosing(problem, entry.rule) for name, entry in entries.items()}
    once = cost["conditional"]
    assert cost["conditional-narrowed"] == pytest.approx(once * (1 + len(NARROWED_AT)))
    assert cost["equal" if "equal" in cost else "dwa"] == 0
    assert 0 < cost["conditional-yoto"] < cost["conditional-grap"]
    assert once > 0
    more = dataclasses.replace(problem.task, steps=4000)
    assert choosing(problem._replace(task=more), entries["conditional"].rule) == once


def test_a_conditional_row_costs_about_a_run_and_its_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run, "train", lambda problem, rule, configs, seeds: [{"looks": {}}] * len(seeds)
    )
    problem = make("missing_labels", "quick")
    long = dataclasses.replace(problem.task, steps=3000)
    options = Options("frontier", preset="quick", out=tmp_path)
    units = Units(options, "frontier-missing_labels")
    work = run.Work("missing_labels", problem._replace(task=long), units, [])
    (line,) = work.do("conditional", [0])
    assert line["kind"] == "library"
    assert 1 < line["runs"] < 1.2
    assert report._name([line], "conditional") == "conditional, best by validation"


def test_every_problem_has_conditional_rows(street_images):
    for name in PROBLEMS:
        assert "conditional" in run.rows(make(name, "quick", street_images))
