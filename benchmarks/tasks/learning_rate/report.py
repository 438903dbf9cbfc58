"""What is shown of learned learning rates, from the stored result alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result
from benchmarks.harness.searches import reach, verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.learning_rate.methods import (
    ARMS,
    DECADES,
    EQUATIONS,
    GUARDS,
    METHODS,
    NO_RATE,
    PROBLEMS,
)


def _problems(result: Result) -> list[str]:
    found = {line["problem"] for line in result["runs"]}
    return [problem for problem in PROBLEMS if problem in found]


def _methods(result: Result) -> list[str]:
    found = {line["method"] for line in result["runs"]}
    return [method for method in METHODS if method in found]


def _scores(
    result: Result,
    problem: str,
    method: str,
    arm: str,
    factor: float,
    metric: str = "test",
) -> np.ndarray:
    wanted = problem, method, arm, factor
    named = ("problem", "method", "arm", "factor")
    for line in result["runs"]:
        if tuple(line[name] for name in named) == wanted:
            return np.array(line[metric])
    return np.zeros(0)


def tuned(result: Result, problem: str, method: str, arm: str) -> float:
    """The factor that validates best."""
    mean = lambda f: _scores(result, problem, method, arm, f, "validation").mean()
    return max(METHODS[method].factors, key=mean)


def table(result: Result) -> Table:
    return _table_of(result, _problems(result)[0])


def tables(result: Result) -> dict[str, Table]:
    """A table for each problem."""
    return {
        f"learning_rate-{problem}": _table_of(result, problem)
        for problem in _problems(result)
    }


def _table_of(result: Result, problem: str) -> Table:
    columns = ["learning rate"]
    columns += [f"{arm}, {factor:g} x" for arm in ARMS for factor in DECADES]
    rows = []
    for method in _methods(result):
        row = [METHODS[method].label]
        for arm in ARMS:
            for factor in DECADES:
                found = _scores(result, problem, method, arm, factor)
                row.append(mean_sd(found) if len(found) else "")
        if any(row[1:]):
            rows.append(row)
    meta = result["meta"]
    steps = meta["steps"][problem]
    seeds = max(len(x["test"]) for x in result["runs"] if x["problem"] == problem)
    best = ", ".join(
        _tuned(result, problem, method, arm)
        for method in ("constant", "cosine")
        for arm in ARMS
        if method in _methods(result)
    )
    unit = "-100 log(relative error)" if problem in EQUATIONS else "accuracy in %"
    caption = (
        f"Test score ({unit}) on {PROBLEMS[problem]}, after {steps} gradient "
        f"evaluations, mean and standard deviation over {seeds} seeds, from "
        f"learning rates in units of {meta['rates'][problem]:g}. What validates best: "
        f"{best}. Methods without a rate are in the column of 1 x."
    )
    return Table(columns, rows, caption)


def _tuned(result: Result, problem: str, method: str, arm: str) -> str:
    """What validates best, and its test score."""
    factor = tuned(result, problem, method, arm)
    found = mean_sd(_scores(result, problem, method, arm, factor))
    return f"{METHODS[method].label} {factor:g} x with {ARMS[arm]} ({found})"


# Sentences.


def conclusions(result: Result) -> list[str]:
    if "constant" not in _methods(result):
        return []
    return [
        _against_tuned(result, problem, method, arm)
        for method in _methods(result)
        if method not in ("constant", *GUARDS)
        for problem in _problems(result)
        for arm in ARMS
    ]


def _against_tuned(result: Result, problem: str, method: str, arm: str) -> str:
    best = _scores(
        result, problem, "constant", arm, tuned(result, problem, "constant", arm)
    )
    parts = []
    for factor in METHODS[method].factors:
        difference = _scores(result, problem, method, arm, factor) - best
        sign = {1: "better", 0: "no significant difference", -1: "worse"}[
            verdict(difference)
        ]
        parts.append(
            f"{factor:g} x {difference.mean():+.1f} ± {reach(difference):.1f} ({sign})"
        )
    return (
        f"{PROBLEMS[problem]}, {ARMS[arm]}: {METHODS[method].label} against the tuned "
        f"constant rate: {', '.join(parts)}."
    )


# The figure.

LINES: dict[str, dict[str, Any]] = {
    "constant": {"color": plots.BLACK, "marker": "o"},
    "cosine": {"color": plots.GREY, "marker": "s"},
    "hyper": {"color": plots.VERMILION, "marker": "D", "linewidth": 2.5},
    "hyper_cosine": {"color": plots.ORANGE, "marker": "d", "linewidth": 2.5},
    "mechanize": {"color": plots.BLUE, "marker": "^"},
    "schedule_free": {"color": plots.GREEN, "marker": "v"},
    "prodigy": {"color": plots.SKY, "linestyle": "--"},
    "dadapt": {"color": plots.PURPLE, "linestyle": "--"},
}


def figure(result: Result, path: Path) -> None:
    """Test scores against the learning rate that a run was given."""
    problems = _problems(result)
    drawing = Figure(
        figsize=(1 + 4 * len(problems), 6.6), dpi=100, layout="constrained"
    )
    panels = drawing.subplots(
        len(ARMS), len(problems), sharex=True, sharey="col", squeeze=False
    )
    for row, arm in zip(panels, ARMS, strict=True):
        for panel, problem in zip(row, problems, strict=True):
            draw(panel, result, problem, arm)
        row[0].set_ylabel(f"{ARMS[arm]}\ntest score")
    for panel, problem in zip(panels[0], problems, strict=True):
        panel.set_title(PROBLEMS[problem])
    for panel in panels[-1]:
        panel.set_xlabel("learning rate / usual one")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    plots.save(drawing, path)


def draw(panel: Axes, result: Result, problem: str, arm: str) -> None:
    """One problem and arm: a line for each method."""
    for method in (m for m in LINES if m in _methods(result)):
        factors = METHODS[method].factors
        found = [_scores(result, problem, method, arm, f) for f in factors]
        means = [x.mean() for x in found]
        label = METHODS[method].label.replace("`", "")
        if factors == NO_RATE:
            panel.axhline(means[0], label=label, **LINES[method])
            continue
        spread = [x.std(ddof=1) if len(x) > 1 else 0.0 for x in found]
        panel.errorbar(
            factors,
            means,
            spread,
            label=label,
            capsize=2,
            markersize=5,
            **LINES[method],
        )
    panel.set_xscale("log")
