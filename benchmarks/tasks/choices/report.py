"""What is shown of choices, from the stored result alone."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result, describe, parse, select, values
from benchmarks.harness.searches import reach, verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.choices.methods import (
    FIXED,
    ONE_BY_ONE,
    RANDOM,
    RUNS,
    SCHEDULES,
    SMALLER,
    SOURCES,
    WAYS,
    config_of,
    name_of,
    random_config,
)


def _rows(result: Result) -> list[tuple[str, str, str]]:
    """Source, way and schedule of what was run."""
    there = {record["method"] for record in result["records"]}
    return [
        (source, way, schedule.name)
        for source in SOURCES
        for way in WAYS
        for schedule in SCHEDULES
        if name_of(source, way) in there
    ]


def _of(
    result: Result, row: tuple[str, str, str], metric: str, smaller: bool = False
) -> np.ndarray:
    """One number for each seed."""
    source, way, schedule = row
    config = config_of(schedule, smaller)
    method = name_of(source, way)
    return values(result["records"], method=method, config=config, metric=metric)


def _random(result: Result, runs: int, smaller: bool = False) -> np.ndarray:
    config = random_config(runs, smaller)
    return values(result["records"], method=RANDOM, config=config, metric="regret")


def architectures(result: Result, metric: str = "test") -> dict[str, np.ndarray]:
    """One number for each seed, by architecture."""
    found: dict[str, list[float]] = {}
    for record in select(result["records"], method=ONE_BY_ONE, metric=metric):
        found.setdefault(record["config"], []).append(record["value"])
    return {name: np.array(x) for name, x in found.items()}


def _flops(result: Result) -> float:
    """Those of the mixture's gradient over those of an architecture's."""
    mixture, alone = values(result["records"], metric="flops")
    return float(mixture / alone)


def table(result: Result) -> Table:
    columns = [
        "logits descend",
        "way",
        "schedule",
        "regret",
        "minus random search",
        "at equal operations",
        "as trained",
        "hardened",
        "gap",
        "certainty",
        "runs",
    ]
    return Table(columns, _cells(result, _rows(result)), _caption(result))


def _cells(
    result: Result, rows: list[tuple[str, str, str]], smaller: bool = False
) -> list[list[str]]:
    """Of each way to choose, and then of random search."""
    cells = []
    for row in rows:
        of = functools.partial(_of, result, row, smaller=smaller)
        regret, runs = of("regret"), RUNS[row[0]]
        before, after = (of(f"{when}: test") for when in ("before", "after"))
        cells.append(
            [
                row[0],
                row[1].replace("_", " "),
                row[2],
                mean_sd(regret),
                _interval(regret - _random(result, runs, smaller)),
                _interval(regret - _random(result, _runs(result, row[0]), smaller)),
                mean_sd(before),
                mean_sd(after),
                _interval(before - after),
                f"{_certainty(result, row, smaller):.2f}",
                str(runs),
            ]
        )
    for runs in _budgets(result):
        regret = mean_sd(_random(result, runs, smaller))
        cells.append([f"random search, {runs}", "", "", regret, *[""] * 6, str(runs)])
    return cells


def _runs(result: Result, source: str) -> int:
    """Trainings of as many operations as the search and the retraining."""
    return int(1 + (RUNS[source] - 1) * _flops(result))


def _budgets(result: Result) -> list[int]:
    """Trainings of the random searches that are shown."""
    return sorted({1, *RUNS.values(), *(_runs(result, source) for source in RUNS)})


def _interval(difference: np.ndarray) -> str:
    """Mean and 95 % interval, bold if 0 is not in it."""
    text = f"{difference.mean():.1f}"
    if len(difference) > 1:
        text += f" ± {reach(difference):.1f}"
    return f"**{text}**" if verdict(difference) else text


def _certainty(result: Result, row: tuple[str, str, str], smaller: bool) -> float:
    """Probability of the likeliest option at the end, over choices and seeds."""
    method, config = name_of(*row[:2]), config_of(row[2], smaller)
    there = select(result["records"], method=method, config=config)
    found = [r["value"] for r in there if r["metric"].startswith("certainty: ")]
    return float(np.mean(found))


def _caption(result: Result) -> str:
    meta, flops = result["meta"], _flops(result)
    return (
        f"Accuracy in %, on a test of {meta['test']} signals; mean ± standard "
        f"deviation over {meta['seeds']} seeds. Regret: what the chosen "
        "architecture, trained for itself, is behind the one that validates best "
        "(points). Minus random search: that of the best by validation of as many "
        "trainings, expected; mean ± 95 % interval, bold if 0 is outside of it. At "
        "equal operations: of more trainings, since a gradient of all branches "
        f"takes {flops:.1f} times as many operations. As trained: with the mixture, "
        "or the mean over architectures that are drawn. Hardened: with the same "
        "parameters, one architecture. Gap: the first minus the second. Certainty: "
        "probability of the likeliest option at the end. Runs: gradients, in "
        f"trainings of {meta['steps']} steps, with the retraining."
    )


def tables(result: Result) -> dict[str, Table]:
    """Options: what each is worth, and how often it is chosen."""
    mean = {name: x.mean() for name, x in architectures(result).items()}
    names = list(mean)
    sources = [s for s in SOURCES if any(row[0] == s for row in _rows(result))]
    chosen = {source: _picked(result, source, names) for source in sources}
    best = max(names, key=lambda n: architectures(result, "validation")[n].mean())
    rows = []
    for choice in parse(names[0]):
        for option in dict.fromkeys(parse(name)[choice] for name in names):
            having = [name for name in names if parse(name)[choice] == option]
            shares = [
                100 * np.mean([parse(n)[choice] == option for n in chosen[source]])
                for source in sources
            ]
            rows.append(
                [
                    f"{choice}: {option}",
                    f"{np.mean([mean[n] for n in having]):.1f}",
                    f"{max(mean[n] for n in having):.1f}",
                    *(f"{share:.0f}" for share in shares),
                    "yes" if parse(best)[choice] == option else "",
                ]
            )
    columns = [
        "option",
        "mean",
        "best",
        *(f"chosen by {source} loss, %" for source in sources),
        "in the best",
    ]
    caption = (
        "Test accuracy (%) over all architectures with an option, trained one by one: "
        "their mean and the best of them; how often all ways and schedules choose the "
        "option, by the loss that the logits descend; whether the architecture that "
        "validates best has it."
    )
    return {
        "choices-options": Table(columns, rows, caption),
        "choices-smaller": _smaller(result),
    }


def _smaller(result: Result) -> Table:
    """The space with the view given."""
    rows = [row for row in _rows(result) if row[2] == SMALLER.name]
    given = describe(**FIXED)
    caption = (
        f"As above, with {given} given: regret and random search among the "
        "architectures that have it."
    )
    return Table(table(result).columns, _cells(result, rows, smaller=True), caption)


def _picked(result: Result, source: str, names: list[str]) -> list[str]:
    rows = [row for row in _rows(result) if row[0] == source]
    return [
        names[int(place)] for row in rows for place in _of(result, row, "architecture")
    ]


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    test, validation = architectures(result), architectures(result, "validation")
    means = np.array([x.mean() for x in test.values()])
    best = max(validation, key=lambda name: validation[name].mean())
    worst = min(test, key=lambda name: test[name].mean())
    apart = test[best] - test[worst]
    half = architectures(result, "validation, half way")
    gained = np.mean([validation[n].mean() - half[n].mean() for n in test])
    twice = architectures(result, "test, twice")
    more = np.array([twice[n] - test[n][: len(twice[n])] for n in twice])
    sentences = [
        f"{len(means)} architectures, from {means.min():.1f} to {means.max():.1f} %. "
        f"Best by validation: {best} with {test[best].mean():.1f} %, "
        f"{_interval(apart)} points ahead of the worst, {worst}.",
        f"The second half of the steps gains {gained:.2f} points on validation; twice "
        f"the steps gain {more.mean():.2f} on the test (best architecture: "
        f"{(twice[best] - test[best][: len(twice[best])]).mean():.2f}).",
        f"A gradient of the mixture takes {_flops(result):.2f} times the operations of "
        "one of an architecture.",
    ]
    for source in SOURCES:
        rows = [row for row in _rows(result) if row[0] == source]
        if rows:
            sentences.append("All choices: " + _verdicts(result, source, rows))
            some = [row for row in rows if row[2] == SMALLER.name]
            given = f"With {describe(**FIXED)} given: "
            sentences.append(given + _verdicts(result, source, some, smaller=True))
    return sentences


def _verdicts(
    result: Result,
    source: str,
    rows: list[tuple[str, str, str]],
    smaller: bool = False,
) -> str:
    groups: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for row in rows:
        chosen = _of(result, row, "regret", smaller)
        difference = chosen - _random(result, RUNS[source], smaller)
        groups[verdict(difference)].append(f"{row[1]} {row[2]}")
    better, same, worse = (", ".join(groups[k]) or "none" for k in (-1, 0, 1))
    return (
        f"logits on the {source} loss, against random search of {RUNS[source]} runs: "
        f"less regret {better}; no significant difference {same}; more regret {worse}."
    )


# The figure.

COLORS = {"training": plots.VERMILION, "held-out": plots.BLUE}


def figure(result: Result, path: Path) -> None:
    """Regret of every way to choose, and what hardening costs."""
    rows = _rows(result)[::-1]
    drawing = Figure(
        figsize=(11, 0.27 * len(rows) + 2.2), dpi=100, layout="constrained"
    )
    left, right = drawing.subplots(1, 2, sharey=True)
    rivals = _budgets(result)[::-1]
    names = [f"random search, {n} run{'s' * (n > 1)}" for n in rivals]
    for y, runs in enumerate(rivals):
        _dots(left, _random(result, runs), y, plots.BLACK)
    for y, row in enumerate(rows, start=len(rivals)):
        color = COLORS[row[0]]
        _dots(left, _of(result, row, "regret"), y, color)
        gap = _of(result, row, "before: test") - _of(result, row, "after: test")
        _dots(right, gap, y, color)
        names.append(f"{row[0]}: {row[1].replace('_', ' ')}, {row[2]}")
    left.set_yticks(range(len(names)), names)
    left.axvline(0, color=plots.GREY, linewidth=0.8, zorder=0)
    right.axvline(0, color=plots.GREY, linewidth=0.8, zorder=0)
    left.set_xlabel("regret of the chosen architecture, retrained (points)")
    right.set_xlabel("accuracy that hardening costs (points)")
    left.set_title("What is chosen (0: the best architecture)")
    right.set_title("As trained, minus hardened")
    plots.save(drawing, path)


def _dots(panel: Any, found: np.ndarray, y: float, color: str) -> None:
    """A dot for each seed, and their mean."""
    panel.plot(found, np.full(len(found), y), ".", color=color, alpha=0.4)
    panel.plot(found.mean(), y, "|", color=color, markersize=12, markeredgewidth=2)
