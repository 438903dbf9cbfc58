"""What the runs of a stored result come to: scores, races, differences, ranks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.harness import searches
from benchmarks.harness.results import Record, Result, record
from benchmarks.harness.searches import reach
from benchmarks.tasks.frontier import races
from benchmarks.tasks.frontier.races import Race

Line = dict[str, Any]
Problems = dict[str, dict[str, Any]]

SEARCH = "search"
BAYESIAN = {"search, TPE": "tpe", "search, GP": "gp"}
"""Searches by samplers of Optuna, one run after the other."""
CEILING = "ceiling"
"""The best point of the search by validation, trained on validation data too: what is
not to be had without them, and no method."""
AVERAGED = " averaged"
LEVEL = 3
"""From which look on, from the last one, a training should have levelled off."""
SHARES = ("equal", "share 0.1", "share 1", "share 10")
EARLY, LATE = ((0.1, 4), (0.3, 1)), ((0.2, 3), (0.5, 1))
RACES = {
    "race: 5 points, cut at 20 and 50 %": Race((), 5, ((0.2, 2), (0.5, 1))),
    "race: 9 points, cut at 20 and 50 %": Race((), 9, LATE),
    "race: 9 points, cut at 10 and 30 %": Race((), 9, EARLY),
    "race: 15 points, cut at 20 and 50 %": Race((), 15, LATE),
    "race: 15 points, cut at 10 and 30 %": Race((), 15, EARLY),
    "race: equal and 7 points, cut at 10 and 30 %": Race(("equal",), 7, EARLY),
    "race: equal and shares, cut at 20 %": Race(SHARES, 0, ((0.2, 1),)),
    "race: equal and nash_mtl, cut at 20 %": Race(
        ("equal", "nash_mtl"), 0, ((0.2, 1),)
    ),
    "race: equal and aligned_mtl, cut at 20 %": Race(
        ("equal", "aligned_mtl"), 0, ((0.2, 1),)
    ),
}
"""Races of runs that are there, by name."""
ARMS = {arm for race in RACES.values() for arm in race.arms}


class Outcome(NamedTuple):
    """A method on a problem.

    Attributes:
      tests: By seed, more is better.
      runs: What it costs.
      collapsed: How many seeds end below all random constants.
    """

    tests: dict[int, float]
    runs: float
    collapsed: int


class Rank(NamedTuple):
    """Mean rank over problems, with Student's 95 % interval."""

    mean: float
    reach: float  # two-sided, to either side


class Difference(NamedTuple):
    """Mean difference to the search over paired seeds, with its 95 % bounds."""

    mean: float
    lower: float  # one-sided
    reach: float  # two-sided, to either side
    seeds: int


def lines_of(lines: Sequence[Line], problem: str, method: str) -> list[Line]:
    return [x for x in lines if x["problem"] == problem and x["method"] == method]


def kept(line: Line) -> Line:
    """The line with those looks alone that a report asks for.

    A race asks how its arms validated on the way. Of the search's points it is also
    told whether they level off, and what averaged parameters are worth.
    """
    looks: dict[str, list[float]] = line["looks"]
    counts = {"validation": 1, "test": 1}
    if line["method"] in (SEARCH, *ARMS):
        counts["validation"] = len(looks["validation"])
    if line["method"] == SEARCH:
        counts |= {"training": LEVEL, "validation averaged": 1, "test averaged": 1}
    final = {name: looks[name][-count:] for name, count in counts.items()}
    return line | {"looks": final}


def last(line: Line, score: str) -> float:
    """The final score; what is not finite is the worst there is."""
    value = line["looks"][score][-1]
    return value if math.isfinite(value) else -math.inf


def points_by_seed(
    lines: Sequence[Line], problem: str, search: str = SEARCH
) -> dict[int, list[Line]]:
    """The runs of a search, in their order."""
    by_seed: dict[int, list[Line]] = {}
    for line in lines_of(lines, problem, search):
        by_seed.setdefault(line["seed"], []).append(line)
    return by_seed


def picked(
    lines: Sequence[Line],
    problem: str,
    pick: Any,
    suffix: str = "",
    search: str = SEARCH,
) -> dict[int, Line]:
    """The run of a search that ``pick`` takes by validation, by seed."""
    key = lambda line: last(line, "validation" + suffix)
    points = points_by_seed(lines, problem, search)
    return {seed: pick(found, key=key) for seed, found in points.items()}


def searched(
    lines: Sequence[Line],
    problem: str,
    pick: Any = max,
    suffix: str = "",
    search: str = SEARCH,
) -> Outcome:
    """The best of all points of a search by validation, or the worst."""
    chosen = picked(lines, problem, pick, suffix, search)
    tests = {seed: last(line, "test" + suffix) for seed, line in chosen.items()}
    points = points_by_seed(lines, problem, search).values()
    return Outcome(tests, float(max(map(len, points), default=math.nan)), 0)


def so_far(
    lines: Sequence[Line], problem: str, search: str = SEARCH
) -> dict[int, np.ndarray]:
    """By seed, what a search ends with if it stops after n runs, for every n.

    Points drawn at random have no order: the mean over all choices of n of them.
    """
    best = searches.best_of_n if search == SEARCH else searches.best_so_far
    curves = {}
    for seed, found in points_by_seed(lines, problem, search).items():
        validation = [last(line, "validation") for line in found]
        curves[seed] = best(validation, [last(line, "test") for line in found])
    return curves


def worst_points(lines: Sequence[Line], problem: str) -> dict[int, float]:
    """The worst test score of random constants, by seed."""
    points = points_by_seed(lines, problem)
    return {seed: min(last(x, "test") for x in found) for seed, found in points.items()}


def outcome(lines: Sequence[Line], problem: str, method: str) -> Outcome:
    """What a method, a race or a search ends with."""
    if method == SEARCH or method in BAYESIAN:
        return searched(lines, problem, search=method)
    if method in RACES:
        return raced(lines, problem, RACES[method])
    found = lines_of(lines, problem, method)
    tests = {x["seed"]: last(x, "test") for x in found}
    worst = worst_points(lines, problem)
    collapsed = sum(test < worst.get(seed, -math.inf) for seed, test in tests.items())
    return Outcome(tests, found[0]["runs"] if found else math.nan, collapsed)


def raced(lines: Sequence[Line], problem: str, race: Race) -> Outcome:
    """A race of the runs that are there, on all seeds that have every arm."""
    arms = {
        method: {x["seed"]: x for x in lines_of(lines, problem, method)}
        for method in race.arms
    }
    points = points_by_seed(lines, problem)
    tests: dict[int, float] = {}
    costs = []
    for seed, found in points.items():
        own = [arms[method].get(seed) for method in race.arms] + found[: race.points]
        if all(own) and len(own) == len(race.arms) + race.points:
            finish = races.run(race, own, "validation")
            tests[seed] = last(finish.line, "test")
            costs.append(finish.runs)
    return Outcome(tests, float(np.mean(costs)) if costs else math.nan, 0)


def difference(ours: Outcome, theirs: Outcome) -> Difference:
    """Over the seeds that both have."""
    both = sorted(set(ours.tests) & set(theirs.tests))
    apart = np.array([ours.tests[s] - theirs.tests[s] for s in both])
    if len(apart) == 0:
        return Difference(math.nan, math.nan, math.nan, 0)
    mean, one = float(apart.mean()), reach(apart, 0.95)
    lower = mean - one if math.isfinite(one) else -math.inf
    return Difference(mean, lower, reach(apart), len(apart))


def methods_of(lines: Sequence[Line]) -> list[str]:
    """All rows: the search, races, then methods in their order."""
    return [SEARCH, *RACES, *(name for name in trained(lines) if name != SEARCH)]


def trained(lines: Sequence[Line]) -> list[str]:
    """What was trained and is judged, in its order."""
    found = dict.fromkeys(line["method"] for line in lines)
    return [name for name in found if name != CEILING]


def problems_of(result: Result) -> Problems:
    return result["meta"]["problems"]


def contenders(lines: Sequence[Line], problem: str) -> list[str]:
    """Methods whose interval reaches the best mean of all, and what is compared with.

    All that a race is made of is among them.
    """
    always = {SEARCH, *ARMS}
    names = trained(lines)
    best = max(
        float(np.mean(list(outcome(lines, problem, name).tests.values())))
        for name in names
    )
    chosen = []
    for name in names:
        tests = np.array(list(outcome(lines, problem, name).tests.values()))
        if name in always or tests.mean() + reach(tests) >= best:
            chosen.append(name)
    return chosen


def records_of(lines: Sequence[Line], problems: Problems) -> list[Record]:
    """Test scores of all rows, and of the search with averages, as flat records."""
    records = []
    for problem in problems:
        found = [
            (method, "test", outcome(lines, problem, method))
            for method in methods_of(lines)
        ]
        smooth = searched(lines, problem, suffix=AVERAGED)
        for method, metric, ended in [*found, (SEARCH, "test" + AVERAGED, smooth)]:
            for seed, test in ended.tests.items():
                records.append(
                    record(
                        method,
                        metric,
                        test,
                        seed=seed,
                        domain=problem,
                        unseen=True,
                        compute=ended.runs,
                    )
                )
    return records


def verdicts(lines: Sequence[Line], problems: Problems) -> list[dict[str, Any]]:
    """Difference to the search of each row on each problem, and whether it is worse."""
    found = []
    for problem, about in problems.items():
        theirs = outcome(lines, problem, SEARCH)
        for method in methods_of(lines):
            ours = outcome(lines, problem, method)
            apart = difference(ours, theirs)
            if method == SEARCH or apart.seeds == 0:
                continue
            finite = lambda x: round(x, 3) if math.isfinite(x) else None
            found.append(
                {
                    "task": problem,
                    "method": method,
                    "runs": round(ours.runs, 2),
                    "difference": finite(apart.mean),
                    "lower": finite(apart.lower),
                    "margin": about["margin"],
                    "seeds": apart.seeds,
                }
            )
    return found


def standings(lines: Sequence[Line], problems: Problems) -> dict[str, Rank | None]:
    """All rows that are there, in order, with the mean ranks of some.

    Rows that all problems have whose constants differ are ranked among each other, so
    that a rank says the same on each problem. They come first; the others follow by
    their mean place on the problems that they have, in shares of its rows.
    """
    means = {problem: mean_tests(lines, problem) for problem in problems}
    places: dict[str, list[float]] = {name: [] for name in methods_of(lines)}
    for tests in means.values():
        for name, rank in zip(tests, _ranked([*tests.values()]), strict=True):
            places[name].append(rank / len(tests))
    there = [name for name, found in places.items() if found]
    separating = [means[name] for name in problems if separates(lines, name)]
    shared = [n for n in there if separating and all(n in x for x in separating)]
    found = np.array([_ranked([x[n] for n in shared]) for x in separating])
    ranks = {
        name: Rank(float(own.mean()), reach(own))
        for name, own in zip(shared, found.T, strict=True)
    }
    first = lambda name: ranks[name].mean if name in ranks else math.inf
    order = sorted(there, key=lambda name: (first(name), float(np.mean(places[name]))))
    return {name: ranks.get(name) for name in order}


def mean_tests(lines: Sequence[Line], problem: str) -> dict[str, float]:
    """The mean score of each row that a problem has."""
    return {
        name: float(np.mean(list(found.tests.values())))
        for name in methods_of(lines)
        if (found := outcome(lines, problem, name)).tests
    }


def _ranked(means: Sequence[float]) -> np.ndarray:
    """Ranks, the best one's is 1."""
    return scipy.stats.rankdata([-x for x in means])


def levelled(lines: Sequence[Line], problem: str) -> float:
    """What the last fifth of the training adds."""
    best = picked(lines, problem, max).values()
    gains = [x["looks"]["training"][-1] - x["looks"]["training"][-LEVEL] for x in best]
    return float(np.mean(gains))


def separation(lines: Sequence[Line], problem: str) -> Difference:
    """Best and worst constants by validation, on the test."""
    best, worst = (searched(lines, problem, pick) for pick in (max, min))
    return difference(best, worst)


def separates(lines: Sequence[Line], problem: str) -> bool:
    """Whether the weights matter: the two differ significantly."""
    apart = separation(lines, problem)
    return apart.mean - apart.reach > 0


def ceiling(lines: Sequence[Line], problem: str) -> Difference:
    """What the search's result gains by training on validation data too."""
    return difference(outcome(lines, problem, CEILING), outcome(lines, problem, SEARCH))


def averaging(lines: Sequence[Line], problem: str) -> Difference:
    """What averaged parameters change in the search's result."""
    smooth = searched(lines, problem, suffix=AVERAGED)
    return difference(smooth, outcome(lines, problem, SEARCH))
