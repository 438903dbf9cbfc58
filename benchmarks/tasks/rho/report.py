"""What is shown of the strength of the regulariser, from the stored result alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.harness import plots
from benchmarks.harness.results import Record, Result, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.digits import task
from benchmarks.tasks.rho.methods import (
    COLLAPSED,
    EPSILON,
    EPSILONS,
    METHODS,
    Entropy,
    config_of,
)


def _methods(result: Result) -> list[str]:
    return [m for m in METHODS if select(result["records"], method=m)]


def _run(
    result: Result, method: str, rho: float, epsilon: float, entropy: Entropy = "all"
) -> list[Record]:
    config = config_of(rho, epsilon, entropy)
    return select(result["records"], method=method, config=config)


def _stylised(records: list[Record]) -> np.ndarray:
    """Validation accuracy on stylised images in %, for each seed."""
    return 100 * values(records, domain="validation stylised")


def _grid(result: Result, method: str) -> dict[str, float]:
    """Validation accuracy of every point of the grid, over seeds."""
    return {
        config: _stylised(
            select(result["records"], method=method, config=config)
        ).mean()
        for config in map(task.describe_ratios, task.GRID)
    }


def _regulariser(result: Result, entropy: Entropy = "all") -> dict[str, float]:
    return task.mean_of(
        select(result["records"], method="regulariser", config=f"entropy={entropy}"),
        "weight",
    )


def table(result: Result) -> Table:
    methods = _methods(result)
    columns = ["rho"]
    for method in methods:
        columns += [f"{method}: {name}" for name in task.LOSSES] + ["accuracy"]
    rows = []
    for rho in result["meta"]["rhos"]:
        row = [f"{rho:g}"]
        for method in methods:
            records = _run(result, method, rho, EPSILON)
            weights = task.mean_of(records, "weight")
            row += [f"{weights[name]:.2g}" for name in task.LOSSES]
            row.append(mean_sd(_stylised(records)))
        rows.append(row)
    alone = [f"{weight:.2g}" for weight in _regulariser(result).values()]
    rows.append(["regulariser alone", *[*alone, ""] * len(methods)])
    for name, choose in (("best of grid", max), ("worst of grid", min)):
        row = [name]
        for method in methods:
            row += ["", "", "", f"{choose(_grid(result, method).values()):.1f}"]
        rows.append(row)
    meta = result["meta"]
    steps = " and ".join(f"{n} steps of {m}" for m, n in meta["steps"].items())
    caption = (
        f"Weights after {steps} from epsilon {EPSILON:g}, and accuracy "
        f"in % on stylised validation images, over {meta['seeds']} seeds; "
        f"{meta['device']} ({meta['cpu_count']} cores)."
    )
    return Table(columns, rows, caption)


def conclusions(result: Result) -> list[str]:
    return [
        sentence
        for method in _methods(result)
        for sentence in (_held(result, method), _moved(result, method))
    ]


def _held(result: Result, method: str) -> str:
    """Where no loss is lost, from whichever epsilon."""
    safe = [
        rho
        for rho in result["meta"]["rhos"]
        if min(
            record["value"]
            for epsilon in EPSILONS
            for record in _run(result, method, rho, epsilon)
            if record["metric"].startswith("weight:")
        )
        >= COLLAPSED
    ]
    listed = ", ".join(f"{rho:g}" for rho in safe) or "none"
    return (
        f"{method}: from every epsilon, all weights stay above {COLLAPSED:g} at rho "
        f"{listed}."
    )


def _moved(result: Result, method: str) -> str:
    """Where the losses have a say, and where accuracy is best."""
    alone = _regulariser(result)
    runs = {rho: _run(result, method, rho, EPSILON) for rho in result["meta"]["rhos"]}
    moved = {
        rho: task.distance(task.mean_of(records, "weight"), alone)[1]
        for rho, records in runs.items()
    }
    pinned = ", ".join(f"{rho:g}" for rho, factor in moved.items() if factor < 1.5)
    accuracy = {rho: _stylised(records) for rho, records in runs.items()}
    best = max(accuracy, key=lambda rho: accuracy[rho].mean())
    grid = _grid(result, method).values()
    return (
        f"{method}: the weights end within a factor of 1.5 of the regulariser's own at "
        f"rho {pinned or 'none'}; accuracy is best at rho {best:g} "
        f"({mean_sd(accuracy[best])}; fixed weights: {min(grid):.1f} to "
        f"{max(grid):.1f})."
    )


# The figure.

STYLES = {0.01: ":", 0.1: "-", 1.0: "--"}
ZERO = 1e-3  # where rho = 0 stands on the logarithmic axis


def figure(result: Result, path: Path) -> None:
    """Weights and validation accuracy against rho, one column for each optimizer."""
    methods = _methods(result)
    drawing = Figure(figsize=(2 + 5 * len(methods), 7), dpi=100, layout="constrained")
    panels = drawing.subplots(2, len(methods), sharex=True, sharey="row", squeeze=False)
    for column, method in zip(panels.T, methods, strict=True):
        _draw_weights(column[0], result, method)
        _draw_accuracy(column[1], result, method)
        rate = result["meta"]["learning_rates"][method]
        steps = result["meta"]["steps"][method]
        column[0].set_title(f"{method}, learning rate {rate:g}, {steps} steps")
        column[1].set_xlabel("rho")
    panels[0, 0].set_ylabel("loss weight after training")
    panels[1, 0].set_ylabel("accuracy on stylised\nvalidation images (%)")
    drawing.legend(
        handles=_legend(),
        loc="outside lower center",
        ncols=2 + len(methods),
        frameon=False,
    )
    plots.save(drawing, path)


def _on_axis(rho: float) -> float:
    return rho or ZERO


def _draw_weights(panel: Axes, result: Result, method: str) -> None:
    x = [_on_axis(rho) for rho in result["meta"]["rhos"]]
    for name, color in plots.LOSS_COLORS.items():
        for epsilon, style in STYLES.items():
            weights = [
                task.mean_of(_run(result, method, rho, epsilon), "weight")[name]
                for rho in result["meta"]["rhos"]
            ]
            panel.plot(x, weights, color=color, linestyle=style)
    for weight in set(_regulariser(result).values()):
        panel.axhline(weight, color=plots.GREY, linewidth=0.8, zorder=0)
    panel.set(xscale="log", yscale="log")
    panel.set_ylim(bottom=1e-5)
    _label_zero(panel)


def _draw_accuracy(panel: Axes, result: Result, method: str) -> None:
    x = [_on_axis(rho) for rho in result["meta"]["rhos"]]
    lines: list[tuple[float, Entropy, str, str]] = [
        *((epsilon, "all", plots.BLACK, style) for epsilon, style in STYLES.items()),
        (EPSILON, "auxiliary", plots.PURPLE, "-"),
    ]
    for epsilon, entropy, color, style in lines:
        accuracy = np.stack(
            [
                _stylised(_run(result, method, rho, epsilon, entropy))
                for rho in result["meta"]["rhos"]
            ]
        )
        panel.plot(x, accuracy.mean(axis=1), color=color, linestyle=style)
        if epsilon == EPSILON:
            low, high = accuracy.min(axis=1), accuracy.max(axis=1)
            panel.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    grid = _grid(result, method).values()
    panel.axhspan(min(grid), max(grid), color=plots.SKY, alpha=0.2, lw=0, zorder=0)


def _label_zero(panel: Axes) -> None:
    ticks = [ZERO, 1e-2, 1e-1, 1, 10, 100]
    panel.set_xticks(ticks, ["0", *(f"{tick:g}" for tick in ticks[1:])])
    panel.minorticks_off()


def _legend() -> list[Line2D]:
    def line(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **style)

    return [
        *(line(name, color=color) for name, color in plots.LOSS_COLORS.items()),
        *(
            line(f"epsilon {epsilon:g}", color=plots.BLACK, linestyle=style)
            for epsilon, style in STYLES.items()
        ),
        line("regulariser alone", color=plots.GREY, linewidth=0.8),
        line("entropy over auxiliary losses", color=plots.PURPLE),
        line("worst to best of the grid", color=plots.SKY, alpha=0.4, linewidth=8),
    ]
