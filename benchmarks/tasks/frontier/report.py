"""What is shown of all methods on all problems, from the stored result alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.conditional import LABELS
from benchmarks.harness.results import Result
from benchmarks.harness.searches import STARTED, reach
from benchmarks.harness.tables import Table
from benchmarks.tasks.frontier import figures
from benchmarks.tasks.frontier.outcomes import (
    BAYESIAN,
    SEARCH,
    Line,
    Problems,
    averaging,
    ceiling,
    difference,
    levelled,
    methods_of,
    outcome,
    problems_of,
    separates,
    separation,
    so_far,
    standings,
    verdicts,
)
from benchmarks.tasks.frontier.problem import DELTA1, MEAN_IOU

RECOMMENDED = (
    "equal",
    "yoto",
    "share 1",
    "ntk, every 100",
    "aligned_mtl, every 10",
    "aligned_mtl",
    "ntk_surrogate",
    "nash_mtl",
    "race: equal and shares, cut at 20 %",
    "race: 15 points, cut at 10 and 30 %",
    *BAYESIAN,
    SEARCH,
)
"""Rows of the short table, from the cheapest on."""

STOPS = (3, 5, 9, 15)
"""Runs after which searches are compared."""


def table(result: Result) -> Table:
    """Difference to the search by method and problem."""
    lines, problems = result["runs"], problems_of(result)
    found = standings(lines, problems)
    rows = [
        [
            *_row(lines, problems, name),
            f"{rank.mean:.1f} ± {rank.reach:.1f}" if rank else "",
        ]
        for name, rank in found.items()
    ]
    ranked = any(found.values())
    caption = _caption(result) + (_about_ranks(lines, problems) if ranked else "")
    return Table(["method", "runs", *problems, "mean rank"], rows, caption)


def _about_ranks(lines: Sequence[Line], problems: Problems) -> str:
    alike = [name for name in problems if not separates(lines, name)]
    but = f" but {', '.join(alike)}" if alike else ""
    why = " (there no constants differ significantly)" if alike else ""
    return (
        f" Mean rank: among the rows that all problems{but}{why} have, with Student's "
        "95 % interval over these problems; the other rows are in the order of their "
        "mean place on the problems that they have."
    )


def tables(result: Result) -> dict[str, Table]:
    """The short table, of what there is to choose from."""
    lines, problems = result["runs"], problems_of(result)
    rows = [_row(lines, problems, name) for name in RECOMMENDED]
    short = Table(["method", "runs", *problems], rows, _caption(result))
    return {"frontier-recommended": short, "frontier-searches": stopped(result)}


def stopped(result: Result) -> Table:
    """What searches end with that stop early, on problems that have all of them."""
    lines, names = result["runs"], (SEARCH, *BAYESIAN)
    columns, rows, counts = ["search"], [[name] for name in names], []
    for problem in problems_of(result):
        whole, *_ = curves = [so_far(lines, problem, name) for name in names]
        if not all(curves):
            continue
        columns += [f"{problem}, {n} runs" for n in STOPS]
        counts.append(f"{problem} {', '.join(str(len(curve)) for curve in curves)}")
        for row, curve in zip(rows, curves, strict=True):
            for n in STOPS:
                apart = np.array([x[n - 1] - whole[s][-1] for s, x in curve.items()])
                row.append(f"{apart.mean():+.1f} ± {reach(apart):.1f}")
    caption = (
        "The best by validation of the first n points, beside that of 15 random ones: "
        "mean difference over paired seeds, with Student's 95 % interval. TPE and GP: "
        "samplers of Optuna on the logarithms of the weights, which begin with "
        f"{STARTED} random points. Random points: the mean over all choices of n of "
        f"the 15. Seeds of each: {'; '.join(counts)}."
    )
    return Table(columns, rows, caption)


def _row(lines: Sequence[Line], problems: Problems, method: str) -> list[str]:
    cells = [_cell(lines, problem, method) for problem in problems]
    return [_name(lines, method), _runs(lines, problems, method), *cells]


def _cell(lines: Sequence[Line], problem: str, method: str) -> str:
    ours = outcome(lines, problem, method)
    if not ours.tests:
        return ""
    if method == SEARCH:
        return f"{np.mean(list(ours.tests.values())):.1f}"
    apart = difference(ours, outcome(lines, problem, SEARCH))
    if apart.seeds == 0:
        return f"[{np.mean(list(ours.tests.values())):.1f}]"
    mark = f" ({ours.collapsed} lost)" if ours.collapsed else ""
    if not math.isfinite(apart.mean):
        return f"diverged{mark}"
    return f"{apart.mean:+.1f} ± {apart.reach:.1f}{mark}"


def _name(lines: Sequence[Line], method: str) -> str:
    if method in LABELS:
        return LABELS[method]
    kinds = {line["kind"] for line in lines if line["method"] == method}
    return f"`{method}`" if kinds == {"library"} and " " not in method else method


def _runs(lines: Sequence[Line], problems: Problems, method: str) -> str:
    runs = [outcome(lines, problem, method).runs for problem in problems]
    runs = sorted({f"{x:.2g}" for x in runs if math.isfinite(x)}, key=float)
    return " to ".join(dict.fromkeys([runs[0], runs[-1]])) if runs else ""


def _caption(result: Result) -> str:
    stage, lines = result["meta"]["stage"], result["runs"]
    without = unsearched(lines, problems_of(result))
    seeds = {
        name: len(outcome(lines, name, SEARCH).tests)
        for name in result["meta"]["problems"]
    }
    more: dict[int, list[str]] = {}
    for name, count in seeds.items():
        if count > stage:
            more.setdefault(count, []).append(name)
    known = [f"{n} on {', '.join(more[n])}" for n in sorted(more, reverse=True)]
    others = (
        f"; the search has {' and '.join(known)}, and so have most methods that came "
        "near it"
        if known
        else ""
    )
    alone = (
        f" No search of {', '.join(without)} to compare with: scores, in brackets."
        if without
        else ""
    )
    return (
        "Search: the best by validation of 15 random constants, its score. Others: "
        "mean difference to it over paired seeds (more is better), with Student's 95 % "
        f"interval. Accuracy in %{_other_units(result)}; for equations -100 times the "
        "logarithm of the error, so that 5 is 5 %. "
        f"Every method has {stage} seeds{others}. "
        "Runs: gradient evaluations, in those of one run with constant weights. Lost: "
        f"seeds that end below all 15 constants.{alone}"
    )


def _other_units(result: Result) -> str:
    """Problems whose per cents are of something else, in brackets."""
    units = {name: about["unit"] for name, about in problems_of(result).items()}
    others = [
        f"{name}: {unit.removesuffix(' in %')}"
        for name, unit in units.items()
        if unit in (MEAN_IOU, DELTA1)
    ]
    return f" ({', '.join(others)})" if others else ""


def unsearched(lines: Sequence[Line], problems: Problems) -> list[str]:
    """Problems whose rows have no search to be compared with."""
    return [name for name in problems if not outcome(lines, name, SEARCH).tests]


def summary(result: Result) -> Table:
    """The problems: whether they level off and separate, what averaging is worth."""
    lines, problems = result["runs"], problems_of(result)
    columns = [
        "problem",
        "half",
        "seeds",
        "levelled",
        "best - worst",
        "averaging",
        "ceiling",
    ]
    rows = [
        [problem, about["half"], *_about_search(lines, problem)]
        for problem, about in problems.items()
    ]
    caption = (
        "Levelled: what the last fifth of the steps adds to the score in the training "
        "domain, with the points of the search that validate best. Best - worst: test "
        "score of the points of the search that validate best and worst. Averaging: "
        "what averaged parameters change in the search's result. Ceiling: what changes "
        "if its point is trained once more, on training and validation data together: "
        "no method, but what more data of that kind are worth."
    )
    return Table(columns, rows, caption)


def _about_search(lines: Sequence[Line], problem: str) -> list[str]:
    """What the search says about a problem, from the number of its seeds on."""
    seeds = len(outcome(lines, problem, SEARCH).tests)
    if not seeds:
        return ["0", "", "", "", ""]
    apart, gain = separation(lines, problem), averaging(lines, problem)
    above = ceiling(lines, problem)
    return [
        str(seeds),
        f"{levelled(lines, problem):+.1f}",
        f"{apart.mean:.1f} ± {apart.reach:.1f}",
        f"{gain.mean:+.1f} ± {gain.reach:.1f}",
        f"{above.mean:+.1f} ± {above.reach:.1f}" if above.seeds else "",
    ]


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    lines, problems = result["runs"], problems_of(result)
    found = verdicts(lines, problems)
    sentences = []
    for method in methods_of(lines):
        own = [v for v in found if v["method"] == method]
        more = [v for v in own if v["seeds"] > result["meta"]["stage"]]
        held = [
            v for v in more if v["lower"] is not None and v["lower"] >= -v["margin"]
        ]
        if len(own) == len(problems) and own and len(held) == len(own):
            sentences.append(
                f"{method}: no worse than the search on every problem, at "
                f"{max(v['runs'] for v in own):.2g} runs or fewer."
            )
    without = unsearched(lines, problems)
    if not sentences and len(without) < len(problems):
        sentences.append(
            "No row with more seeds than the first stage is shown to be no worse than "
            "the search everywhere."
        )
    sentences += [f"{problem}: no search to compare with." for problem in without]
    for problem in (name for name in problems if name not in without):
        if not separates(lines, problem):
            sentences.append(f"{problem}: the constants do not differ significantly.")
    return sentences


def figure(result: Result, path: Path) -> None:
    """Methods against problems; beside it, quality against runs."""
    figures.heatmap(result, path)
    figures.against_runs(result, path.with_name(f"{path.stem}_runs.png"))
