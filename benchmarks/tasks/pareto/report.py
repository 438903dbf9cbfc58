"""What is shown of the fronts of two tasks, from the stored result alone."""

import functools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.harness import plots
from benchmarks.harness.results import Result, describe, select, values
from benchmarks.harness.searches import verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.pareto import task
from benchmarks.tasks.pareto.methods import (
    EQUAL,
    GRID,
    METHODS,
    MODELS,
    RAYS,
    REFERENCES,
    weightings,
)
from benchmarks.tasks.pareto.task import TASKS


def _of(
    result: Result,
    method: str,
    runs: int,
    metric: str,
    n: int | None = None,
    domain: str = "test",
) -> np.ndarray:
    """A metric for every seed; by default at as many weightings as are asked for."""
    n = weightings(method) if n is None else n
    return values(
        result["records"],
        method=method,
        compute=runs,
        metric=metric,
        domain=domain,
        config=describe(weightings=n),
    )


def _methods(result: Result) -> list[str]:
    present = {front["method"] for front in result["fronts"]}
    return [method for method in METHODS if method in present]


def _budgets(result: Result) -> list[int]:
    return sorted({front["runs"] for front in result["fronts"]})


def _front(result: Result, method: str, runs: int) -> dict[str, np.ndarray]:
    """The losses of both tasks, (seeds, weightings)."""
    found = select(result["fronts"], method=method, runs=runs)
    return {name: np.array([front[name] for front in found]) for name in TASKS}


def table(result: Result) -> Table:
    columns = [
        "method",
        "runs",
        "weightings",
        "hypervolume",
        f"at {MODELS} weightings",
        "of errors",
        "on the front",
        "regret",
        "row minima on the diagonal",
        "gap to the full grid",
    ]
    rows = []
    for runs in _budgets(result):
        rows += [_row(result, method, runs) for method in _methods(result)]
    meta = result["meta"]
    bounds = {name: f"({r:g}, {r:g})" for name, r in REFERENCES.items()}
    caption = (
        f"Test set: {meta['test_images']} images of source digits not trained on; mean "
        f"± standard deviation over {meta['seeds']} seeds. Runs: training steps in "
        f"all, in units of {meta['steps']}; the {MODELS} models of the grid share "
        f"them. Hypervolume of the two cross-entropies up to {bounds['ce']}, of the "
        f"two error rates up to {bounds['error']}. Regret, row minima and gap at "
        f"{MODELS} weightings; gap: weighted cross-entropy above the grid with the "
        "most runs, mean over weightings."
    )
    return Table(columns, rows, caption)


def _row(result: Result, method: str, runs: int) -> list[str]:
    of = functools.partial(_of, result, method, runs)
    share = of("row minima on the diagonal", MODELS)
    return [
        method,
        f"{runs}",
        f"{weightings(method)}",
        _cell(of("hypervolume"), 2),
        _cell(of("hypervolume", MODELS), 2),
        _cell(of("hypervolume of errors"), 3),
        f"{of('on the front').mean():.1f}",
        _cell(of("regret", MODELS), 3),
        f"{share.mean():.0%}" if share.size else "",
        _cell(of("mean gap", MODELS), 3),
    ]


def _cell(values: np.ndarray, digits: int) -> str:
    return mean_sd(values, digits=digits) if values.size else ""


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    methods, budgets = _methods(result), _budgets(result)
    few, many = budgets[0], budgets[-1]
    models = [method for method in methods if METHODS[method] is not None]
    sentences = []
    if GRID in methods:
        sentences.append(_competition(result, many))
        pairs = sorted({(few, few), (many, many), (few, many)})
        sentences += [_against(result, models, a, GRID, b) for a, b in pairs]
    if EQUAL in methods:
        pairs = sorted({(few, few), (many, many)})
        rivals = [GRID, *models] if GRID in methods else models
        sentences += [_against(result, rivals, a, EQUAL, b) for a, b in pairs]
    sentences += [_spread(result, method, many) for method in models]
    return [*sentences, *map(functools.partial(_cost, result), models)]


def _competition(result: Result, runs: int) -> str:
    front = _front(result, GRID, runs)
    left, right = (front[name].mean(axis=0) for name in TASKS)
    steps = result["meta"]["steps"] * runs / MODELS
    return (
        f"The tasks compete for the trunk: from one end of the grid to the other "
        f"({runs} runs, {steps:.0f} steps per model), the cross-entropy of the left "
        f"digit goes from {left[0]:.2f} down to {left[-1]:.2f} and that of the right "
        f"one from {right[-1]:.2f} down to {right[0]:.2f}."
    )


def _against(
    result: Result, methods: list[str], runs: int, rival: str, of_rival: int
) -> str:
    """Hypervolumes beside that of a rival, perhaps with another budget."""
    theirs = _of(result, rival, of_rival, "hypervolume")
    outcomes = {0: "no significant difference", 1: "ahead", -1: "behind"}

    def one(method: str) -> str:
        ours = _of(result, method, runs, "hypervolume")
        outcome = outcomes[verdict(ours - theirs)]
        return f"{method} {mean_sd(ours, digits=2)} ({outcome})"

    return (
        f"Hypervolume with {_runs(runs)}, against {mean_sd(theirs, digits=2)} "
        f"of {RIVALS[rival]} with {_runs(of_rival)}: "
        f"{', '.join(map(one, methods))}; ahead or behind at 95 %."
    )


RIVALS = {GRID: "the grid", EQUAL: "one model with equal weights"}


def _runs(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _spread(result: Result, method: str, runs: int) -> str:
    """What a method makes of its weights, and how much of the front it covers."""
    front = _front(result, method, runs)
    ranges = " and ".join(
        f"from {x.min(axis=1).mean():.2f} to {x.max(axis=1).mean():.2f} ({name})"
        for name, x in front.items()
    )
    # The weight of the left task rises along the rays.
    weight = task.rays(RAYS)["left"]
    correlation = np.mean([np.corrcoef(weight, x)[0, 1] for x in front["left"]])
    meaning = "smaller" if correlation < 0 else "larger"
    inside = _of(result, method, runs, "within the reference").mean()
    minima = _of(result, method, runs, "row minima on the diagonal", MODELS).mean()
    return (
        f"{method} with {_runs(runs)} reaches cross-entropies {ranges}; "
        f"{inside:.0f} of {RAYS} weightings lie within the reference; a larger "
        f"weight makes a {meaning} loss (correlation {correlation:.2f}); of "
        f"{MODELS} weightings, {minima:.0%} are served best by the model that was told "
        "them."
    )


def _cost(result: Result, method: str) -> str:
    of = functools.partial(values, result["records"], method=method)
    (parameters,), (step,) = of(metric="parameters"), of(metric="cost of a step")
    return (
        f"{method}: {parameters:.0f} parameters, and {step:.2f} times the operations "
        "of a training step without conditioning."
    )


# The figure.

STYLES = {
    GRID: (plots.BLACK, "s"),
    "linear": (plots.BLUE, "o"),
    EQUAL: (plots.PURPLE, "*"),
    "cosmos": (plots.VERMILION, "D"),
    "cosmos_groups": (plots.ORANGE, "P"),
    "chebyshev": (plots.GREEN, "^"),
}
MARGIN = 1.15  # of the reference that is drawn


def figure(result: Result, path: Path) -> None:
    """Fronts with the smallest and the largest budget, and hypervolume against cost."""
    budgets = _budgets(result)
    shown = sorted({budgets[0], budgets[-1]})
    columns = len(shown) + 1
    drawing = Figure(figsize=(4.3 * columns, 4.9), dpi=110, layout="constrained")
    panels = drawing.subplots(1, columns, squeeze=False)[0]
    for panel, runs in zip(panels, shown, strict=False):
        _draw_fronts(panel, result, runs)
    _draw_hypervolume(panels[-1], result)
    drawing.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=7,
        frameon=False,
    )
    plots.save(drawing, path)


def _draw_fronts(panel: Axes, result: Result, runs: int) -> None:
    """One line a method: the first seed."""
    for method in _methods(result):
        front = {name: x[0] for name, x in _front(result, method, runs).items()}
        color, marker = STYLES[method]
        front = front["left"], front["right"]
        size = 12 if method == EQUAL else 4.5
        panel.plot(
            *front, color=color, marker=marker, markersize=size, lw=1, label=method
        )
    bound = REFERENCES["ce"]
    panel.plot([0, bound, bound], [bound, bound, 0], color=plots.GREY, ls=":", lw=1)
    panel.plot(
        bound, bound, "x", color=plots.GREY, ms=8, label="reference", linestyle="none"
    )
    panel.set(
        title=f"{_runs(runs)} in all (first seed)",
        xlabel="cross-entropy, left digit (nats)",
        ylabel="cross-entropy, right digit (nats)",
        xlim=(0, MARGIN * bound),
        ylim=(0, MARGIN * bound),
        aspect="equal",
    )


def _draw_hypervolume(panel: Axes, result: Result) -> None:
    budgets = _budgets(result)
    methods = _methods(result)
    for k, method in enumerate(methods):
        found = [_of(result, method, runs, "hypervolume") for runs in budgets]
        color, marker = STYLES[method]
        shift = 1.03 ** (k - len(methods) / 2)  # keeps the error bars apart
        panel.errorbar(
            shift * np.array(budgets),
            [x.mean() for x in found],
            [x.std(ddof=1) if len(x) > 1 else 0.0 for x in found],
            color=color,
            marker=marker,
            markersize=6,
            lw=1.2,
            capsize=3,
        )
    panel.set(
        title="Hypervolume against cost",
        xlabel=f"training runs of {result['meta']['steps']} steps, in all",
        ylabel=f"hypervolume up to ({REFERENCES['ce']:g}, {REFERENCES['ce']:g})",
        xscale="log",
    )
    panel.set_box_aspect(1)
    panel.xaxis.set_major_locator(FixedLocator(budgets))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
