"""The study of initial weights: its arms do what they say, and so do its sentences."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import read_json
from benchmarks.harness.training import prepare
from benchmarks.tasks.epsilon import methods, report, run
from benchmarks.tasks.epsilon.train import measure, ratios, replaced, train
from benchmarks.tasks.frontier import methods as frontier_methods
from benchmarks.tasks.frontier import train as frontier_train
from benchmarks.tasks.frontier.methods import SOFTMAX
from benchmarks.tasks.frontier.problems import make
from yoto_jax._regularizer_range import regularizer_range

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")

SEEDS = jnp.arange(2)


@pytest.fixture(scope="module")
def problem():
    return make("digits", "quick")


def test_arms_start_where_they_say(problem):
    arms = methods.arms(problem.task, grid=True)
    assert len(arms) == 6 + 4 + 4 + 4 + 6
    (line,) = train(problem, arms["epsilon 0.001 and 10"], [0])
    assert list(line["start"].values()) == pytest.approx([1e-3, 10.0])
    (line,) = train(problem, arms["balanced by gradient, after 2 %, then held"], [0])
    assert line["path"][-1] == line["start"]
    assert len(line["looks"]["test"]) == 2
    (line,) = train(problem, arms["epsilon 0.1 in gradient norms"], [0])
    # It is not held, and was measured after the warm-up.
    assert line["path"][-1] != line["path"][1] != line["start"]


def test_the_default_start_is_the_yoto_of_the_frontier(problem):
    arm = methods.arms(problem.task, grid=False)[methods.raw(methods.DEFAULT)]
    ours = train(problem, arm, [0, 1])
    config = frontier_methods.learned(problem.task, "yoto")
    rule = frontier_methods.SOFTMAX
    theirs = frontier_train.train(problem, rule, [config] * 2, [0, 1])
    for own, other in zip(ours, theirs, strict=True):
        primary, *weights = other["weights"].values()
        expected = [weight / primary for weight in weights]
        # Those that the last step was taken with; a quick training has ten.
        used = list(own["path"][-2].values())
        np.testing.assert_allclose(used, expected, rtol=1e-4)
        assert own["looks"]["test"][-1] == pytest.approx(other["looks"]["test"][-1])


def test_what_was_measured_becomes_weights_or_units(problem):
    task = problem.task
    arm = methods.Arm((0.1, 0.1))
    switches = SOFTMAX.configure([methods.config(arm, 2)] * 2)
    carry = prepare(task, SOFTMAX, switches, 2).init(SEEDS, switches)
    every = measure(task, carry.model, SEEDS)
    found = every["gradient", False]
    assert found.shape == (2, 2)
    how = methods.Measured(clip=False, share=0.5)
    after, changed = replaced(task, how, carry, switches, SEEDS)
    np.testing.assert_allclose(ratios(task, after, changed), 0.5 * found, rtol=1e-5)
    np.testing.assert_array_equal(changed.factors, 1.0)
    units = how._replace(units=True)
    after, changed = replaced(task, units, carry, switches, SEEDS)
    np.testing.assert_allclose(ratios(task, after, changed), 0.5 * found, rtol=1e-5)
    np.testing.assert_allclose(changed.factors[:, 1:], found, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(after.rule.mu.learned), 0.5, rtol=1e-6)
    clipped = every["loss", True]
    low, _, high = regularizer_range(2)
    assert low * 0.999 <= clipped.min() <= clipped.max() <= high * 1.001


def test_from_the_command_to_the_table_and_on_from_there(tmp_path, monkeypatch):
    options = Options(
        "epsilon",
        methods=("epsilon 0.1", "balanced by loss, at the start"),
        seeds=2,
        preset="quick",
        out=tmp_path,
        extra={"problems": "digits"},
    )
    run.main(options)
    result = read_json(tmp_path / "epsilon.json")
    assert (tmp_path / "epsilon.png").stat().st_size > 5000
    assert len(result["records"]) == len(result["runs"]) == 4
    rows = [row[0] for row in report.table(result).rows]
    assert rows == ["epsilon 0.1: score", "balanced by loss, at the start"]
    text = (tmp_path / "epsilon-digits.units.jsonl").read_text()
    again = Options(
        "epsilon",
        options.methods,
        2,
        preset="quick",
        out=tmp_path,
        resume=True,
        extra=options.extra,
    )
    run.main(again)
    assert (tmp_path / "epsilon-digits.units.jsonl").read_text() == text
    assert read_json(tmp_path / "epsilon.json")["runs"] == result["runs"]
    more = {**options.extra, "collect": True}
    collected = Options(
        "epsilon", None, 2, preset="quick", out=tmp_path, resume=True, extra=more
    )
    run.main(collected)
    assert read_json(tmp_path / "epsilon.json")["runs"] == result["runs"]
    (tmp_path / "epsilon-digits.units.jsonl").unlink()
    monkeypatch.setattr(run, "train", None)  # Nothing that is stored is trained.
    run.main(again)
    assert read_json(tmp_path / "epsilon.json")["runs"] == result["runs"]
    with pytest.raises(UsageError, match="unknown problem 'x'"):
        run.chosen("x")


def made_up(ends, tests):
    """A result of starts with these ends and, by seed, test scores."""
    about = {"losses": ["p", "a"], "unit": "accuracy in %"}
    runs = [
        {
            "problem": "q",
            "method": method,
            "seed": seed,
            "path": [{"a": weight}],
            "looks": {"test": [0.0, test]},
        }
        for method, weight in ends.items()
        for seed, test in enumerate(tests[method])
    ]
    references = {"q": {"search": {"0": 5.0, "1": 7.0}}}
    meta = {"problems": {"q": about}, "references": references}
    return json.loads(json.dumps({"meta": meta, "runs": runs}))


def test_ends_that_are_near_are_one_and_differences_are_paired():
    ends = {
        "epsilon 0.01": 1e-3,
        "epsilon 0.1": 0.2,
        "epsilon 1": 0.28,
        "epsilon 10": 0.39,
        "balanced by loss, at the start": 0.2,
    }
    tests = {
        "epsilon 0.01": [1, 2],
        "epsilon 0.1": [3, 4],
        "epsilon 1": [3, 4],
        "epsilon 10": [9, 9],
        "balanced by loss, at the start": [4, 5.2],
    }
    result = made_up(ends, tests)
    assert report.attractors(result, "q") == [
        ["epsilon 0.1", "epsilon 1", "epsilon 10"],
        ["epsilon 0.01"],
    ]
    found = report.to_default(result, "q", "balanced by loss, at the start")
    assert found.mean == pytest.approx(1.1)
    assert report.to_default(result, "q", "search").mean == pytest.approx(2.5)
    first, second, third = report.conclusions(result)
    assert first == (
        "q: 4 starts lead to 2 ends that are more than a factor of 1.5 apart: one from "
        "0.1, 1, 10; one each from 0.01."
    )
    assert "from epsilon 0.01 it scores 1.5, from epsilon 10 9.0" in second
    assert "not significantly different from epsilon 0.1 (+1.1 ± 1.3, 2 seeds)" in third
    assert "-1.4 ±" in third


def test_only_a_stored_frontier_of_the_same_problem_is_a_reference(problem):
    about = {"digits": run.description("digits", make("digits", "cpu"))}
    found = run.references(about, Options("epsilon"))
    assert set(found["digits"]) == {"equal", "share 1", "search"}
    assert len(found["digits"]["search"]) == 10
    other = {"digits": run.description("digits", problem)}
    assert run.references(other, Options("epsilon", preset="quick")) == {}
