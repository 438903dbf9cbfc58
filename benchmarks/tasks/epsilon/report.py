"""What is shown of initial weights, from the stored result alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.harness import plots
from benchmarks.harness.results import Result
from benchmarks.harness.tables import Table
from benchmarks.tasks.epsilon.methods import (
    BALANCED,
    DEFAULT,
    EPSILONS,
    HELD_FROM,
    SHARES,
    in_norms,
    raw,
)
from benchmarks.tasks.frontier.outcomes import Difference, Outcome, difference, last
from yoto_jax._regularizer_range import Range, regularizer_range

SAME = 1.5
"""Ends whose weights differ by less than this factor, each of them, are one."""
SEARCH = "search"
Line = dict[str, Any]


def lines_of(result: Result, problem: str, method: str) -> list[Line]:
    return [
        x for x in result["runs"] if x["problem"] == problem and x["method"] == method
    ]


def methods_of(result: Result) -> list[str]:
    """All arms that were trained, in their order."""
    return list(dict.fromkeys(x["method"] for x in result["runs"]))


def outcome(result: Result, problem: str, method: str) -> Outcome:
    """Test scores by seed of an arm, or of a method of the frontier."""
    stored = result["meta"]["references"].get(problem, {})
    if method in stored:
        tests = {int(seed): x for seed, x in stored[method].items()}
    else:
        found = lines_of(result, problem, method)
        tests = {x["seed"]: last(x, "test") for x in found}
    return Outcome(tests, math.nan, 0)


def to_default(result: Result, problem: str, method: str) -> Difference:
    """Paired with the default epsilon."""
    default = outcome(result, problem, raw(DEFAULT))
    return difference(outcome(result, problem, method), default)


def end(result: Result, problem: str, method: str) -> np.ndarray:
    """Weights relative to the primary loss in the end, geometric means over seeds."""
    found = [list(x["path"][-1].values()) for x in lines_of(result, problem, method)]
    return np.exp(np.log(found).mean(axis=0)) if found else np.zeros(0)


def auxiliary(result: Result, problem: str) -> list[str]:
    return result["meta"]["problems"][problem]["losses"][1:]


def starts(result: Result, problem: str) -> list[str]:
    """The arms that start from numbers, the weights of a grid among them."""
    names = [x for x in methods_of(result) if x.startswith("epsilon ")]
    return [x for x in names if "norms" not in x and lines_of(result, problem, x)]


def attractors(result: Result, problem: str) -> list[list[str]]:
    """Starts from numbers, those together whose weights end alike, largest first."""
    groups: list[list[str]] = []
    for name in starts(result, problem):
        near = [
            group
            for group in groups
            if any(_alike(result, problem, name, other) for other in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append([*(x for group in near for x in group), name])
    return sorted(groups, key=len, reverse=True)


def _alike(result: Result, problem: str, first: str, second: str) -> bool:
    apart = np.log(end(result, problem, first)) - np.log(end(result, problem, second))
    return bool(np.max(np.abs(apart)) < math.log(SAME))


# Tables and sentences.


def table(result: Result) -> Table:
    problems = list(result["meta"]["problems"])
    rows = []
    for method in [*methods_of(result), *_references(result)]:
        if " and " in method or method == raw(DEFAULT):
            continue  # Of the grid, for where weights end; or what others are held to.
        rows.append([method, *(_cell(result, x, method) for x in problems)])
    units = result["meta"]["problems"].values()
    caption = (
        f"Test scores on unseen data less those of {raw(DEFAULT)}, the default, over "
        "paired seeds, with Student's 95 % interval (more is better; first row: the "
        "scores themselves). "
        f"Number of seeds where it is not {_most(result)} in brackets. Units: "
        + ", ".join(
            f"{name} {about['unit']}"
            for name, about in zip(problems, units, strict=True)
        )
        + ". The last rows are of the stored frontier, with the same seeds: equal "
        "weights, weights that balance the gradients of the first 2 % of the steps and "
        "are held, and the best by validation of 15 random constants."
    )
    default = [f"{raw(DEFAULT)}: score"]
    default += [_score(result, x) for x in problems]
    return Table(["start", *problems], [default, *rows], caption)


def _references(result: Result) -> list[str]:
    stored = result["meta"]["references"].values()
    return list(dict.fromkeys(name for found in stored for name in found))


def _most(result: Result) -> int:
    return len({x["seed"] for x in result["runs"]})


def _score(result: Result, problem: str) -> str:
    tests = list(outcome(result, problem, raw(DEFAULT)).tests.values())
    return f"{np.mean(tests):.1f}" if tests else ""


def _cell(result: Result, problem: str, method: str) -> str:
    found = to_default(result, problem, method)
    if not found.seeds:
        return ""
    text = f"{found.mean:+.1f}"
    if math.isfinite(found.reach):
        text += f" ± {found.reach:.1f}"
    return text if found.seeds == _most(result) else f"{text} [{found.seeds}]"


def ends(result: Result) -> Table:
    """Where the weights end."""
    problems = list(result["meta"]["problems"])
    columns = [f"{x}: {', '.join(auxiliary(result, x))}" for x in problems]
    rows = [
        [
            method,
            *(
                ", ".join(f"{x:.2g}" for x in end(result, problem, method))
                for problem in problems
            ),
        ]
        for method in methods_of(result)
    ]
    rest = [regularizer_range(len(auxiliary(result, x))).preferred for x in problems]
    rows.append(["the regulariser alone", *(f"{x:.2g} each" for x in rest)])
    caption = (
        "Weights relative to the primary loss after the training, for the losses as "
        "they come; geometric means over seeds."
    )
    return Table(["start", *columns], rows, caption)


def tables(result: Result) -> dict[str, Table]:
    return {"epsilon-ends": ends(result)}


def conclusions(result: Result) -> list[str]:
    return [
        sentence
        for problem in result["meta"]["problems"]
        for sentence in (
            _of_ends(result, problem),
            _of_scores(result, problem),
            *_of_balance(result, problem),
        )
    ]


def _of_ends(result: Result, problem: str) -> str:
    groups = attractors(result, problem)
    plain = lambda group: ", ".join(x.removeprefix("epsilon ") for x in group)
    told = [f"one from {plain(group)}" for group in groups if len(group) > 1]
    if alone := [group[0] for group in groups if len(group) == 1]:
        told.append(f"one each from {plain(alone)}")
    return (
        f"{problem}: {sum(map(len, groups))} starts lead to {len(groups)} ends that "
        f"are more than a factor of {SAME:g} apart: {'; '.join(told)}."
    )


def _of_scores(result: Result, problem: str) -> str:
    names = [name for name in starts(result, problem) if " and " not in name]
    means = {
        name: float(np.mean(list(outcome(result, problem, name).tests.values())))
        for name in names
    }
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return (
        f"{problem}: from {worst} it scores {means[worst]:.1f}, from {best} "
        f"{means[best]:.1f}."
    )


def _of_balance(result: Result, problem: str) -> list[str]:
    sentences = []
    for method in (*BALANCED, *HELD_FROM.values()):
        if not lines_of(result, problem, method):
            continue
        apart = to_default(result, problem, method)
        theirs = outcome(result, problem, SEARCH)
        searched = difference(outcome(result, problem, method), theirs)
        told = "not significantly different from"
        if abs(apart.mean) > apart.reach:
            told = "better than" if apart.mean > 0 else "worse than"
        sentence = (
            f"{problem}, {method}: {told} {raw(DEFAULT)} "
            f"({apart.mean:+.1f} ± {apart.reach:.1f}, {apart.seeds} seeds)"
        )
        if searched.seeds:
            sentence += f"; {searched.mean:+.1f} ± {searched.reach:.1f} to the search"
        sentences.append(f"{sentence}.")
    return sentences


# The figure.

COLORS = (plots.BLUE, plots.VERMILION, plots.GREEN)
AT_THE_START, _, AFTERWARDS, _ = BALANCED
LEVELS = {
    AT_THE_START: (plots.VERMILION, "-"),
    HELD_FROM["start"]: (plots.VERMILION, ":"),
    AFTERWARDS: (plots.ORANGE, "-"),
    HELD_FROM["warm-up"]: (plots.ORANGE, ":"),
    "share 1": (plots.PURPLE, "-."),
    "equal": (plots.GREY, "--"),
    SEARCH: (plots.GREEN, "-"),
}


def figure(result: Result, path: Path) -> None:
    """Above where the weights end, below what that is worth, against the start."""
    problems = list(result["meta"]["problems"])
    drawing = Figure(
        figsize=(2 + 3.4 * len(problems), 7), dpi=100, layout="constrained"
    )
    panels = drawing.subplots(2, len(problems), sharex=True, squeeze=False)
    for column, problem in zip(panels.T, problems, strict=True):
        draw_ends(column[0], result, problem)
        draw_scores(column[1], result, problem)
        column[0].set_title(problem)
        column[1].set_xlabel("epsilon")
        unit = result["meta"]["problems"][problem]["unit"]
        column[1].set_ylabel(f"test: {unit}")
    panels[0, 0].set_ylabel("weight in the end,\nrelative to the primary loss")
    drawing.legend(
        handles=legend(),
        loc="outside lower center",
        ncols=max(2, len(problems)),
        frameon=False,
    )
    plots.save(drawing, path)


def _trained(result: Result, problem: str, names: Sequence[str]) -> list[int]:
    return [k for k, x in enumerate(names) if lines_of(result, problem, x)]


def draw_ends(panel: Axes, result: Result, problem: str) -> None:
    names = [raw(x) for x in EPSILONS]
    there = _trained(result, problem, names)
    if not there:
        return
    x = np.array(EPSILONS)[there]
    weights = np.stack([end(result, problem, names[k]) for k in there])
    for k, name in enumerate(auxiliary(result, problem)):
        panel.plot(x, weights[:, k], color=COLORS[k], marker="o", label=name)
    where: Range = regularizer_range(weights.shape[1])
    panel.plot(x, x, color=plots.GREY, linestyle="--", linewidth=0.8, zorder=0)
    panel.axhline(where.preferred, color=plots.GREY, linewidth=0.8, zorder=0)
    panel.axvspan(where.low, where.high, color=plots.SKY, alpha=0.2, lw=0, zorder=0)
    panel.set(xscale="log", yscale="log")
    panel.legend(frameon=False, fontsize=8)


def draw_scores(panel: Axes, result: Result, problem: str) -> None:
    """Test scores against the start, and levels, over the first seeds."""
    seeds = set(range(result["meta"]["few"][problem]))
    for xs, named, color, marker in (
        (EPSILONS, raw, plots.BLACK, "o"),
        (SHARES, in_norms, plots.BLUE, "s"),
    ):
        names = [named(x) for x in xs]
        there = _trained(result, problem, names)
        tests = [_scores(result, problem, names[k], seeds) for k in there]
        if tests:
            x = np.array(xs)[there]
            plots.band(panel, x, np.array(tests).T, color, "", marker=marker)
    for method, (color, style) in LEVELS.items():
        if level := _scores(result, problem, method, seeds):
            panel.axhline(float(np.mean(level)), color=color, linestyle=style, zorder=1)
    panel.set_xscale("log")


def _scores(result: Result, problem: str, method: str, seeds: set[int]) -> list[float]:
    tests = outcome(result, problem, method).tests
    return [tests[seed] for seed in sorted(seeds & set(tests))]


def legend() -> list[Any]:
    line = lambda label, **style: Line2D([], [], label=label, **style)
    names = {
        HELD_FROM["start"]: "the same, then held",
        HELD_FROM["warm-up"]: "the same, then held",
        "share 1": "share 1 of the frontier, held",
        "equal": "equal weights",
        SEARCH: "search of 15 runs",
    }
    return [
        line("YOTO from epsilon", color=plots.BLACK, marker="o"),
        line("from epsilon in gradient norms, after 2 %", color=plots.BLUE, marker="s"),
        *(
            line(names.get(method, method), color=color, linestyle=style)
            for method, (color, style) in LEVELS.items()
        ),
        line("end = start", color=plots.GREY, linewidth=0.8, linestyle="--"),
        line("the regulariser alone", color=plots.GREY, linewidth=0.8),
        Patch(label="its pull grows with the distance", color=plots.SKY, alpha=0.2),
    ]
