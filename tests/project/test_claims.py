"""What README and guides say of methods is what the stored result says."""

import json
import pathlib

import pytest

RESULTS = pathlib.Path(__file__).parent.parent.parent / "benchmarks" / "results"
VERDICTS = {
    (row["task"], row["method"]): row
    for row in json.loads((RESULTS / "frontier.json").read_text())["verdicts"]
}
PROBLEMS = ["digits", "missing_labels"]
RACES = {
    "race: 15 points, cut at 10 and 30 %": 3.0,
    "race: equal and shares, cut at 20 %": 1.7,
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_run_of_aligned_mtl_beats_a_search_of_fifteen(problem):
    found = VERDICTS[problem, "aligned_mtl"]
    assert found["seeds"] == 10
    assert found["lower"] > 0


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("race", RACES)
def test_two_races_are_no_worse_than_the_search(race, problem):
    found = VERDICTS[problem, race]
    assert found["seeds"] == 10
    assert found["runs"] <= RACES[race]
    assert found["lower"] > -found["margin"]


@pytest.mark.parametrize("problem", [*PROBLEMS, "burgers"])
def test_learned_weights_lose(problem):
    found = VERDICTS[problem, "yoto"]
    assert found["difference"] < -5 * found["margin"]


def test_equal_weights_and_nash_mtl_lose_where_labels_are_missing():
    for method in ("equal", "nash_mtl"):
        found = VERDICTS["missing_labels", method]
        assert found["seeds"] == 10
        assert found["difference"] < -5 * found["margin"]
