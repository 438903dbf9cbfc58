"""What is shown of digits under shift, from the stored result alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from benchmarks.harness import plots, searches
from benchmarks.harness.results import Record, Result, parse, select, values
from benchmarks.harness.searches import ORACLE, VALIDATED, WORST, verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.digits import task
from benchmarks.tasks.digits.methods import CONDITIONAL, LEARNED, ROWS, WEIGHTED

NAMES = {"yoto": "YOTO", "conditional": "one conditional model"}


def _unseen(records: list[Record]) -> np.ndarray:
    """Accuracy averaged over the unseen shifts, one value for each seed and run."""
    shifts = [values(records, metric="accuracy", domain=d) for d in task.UNSEEN]
    return np.mean(shifts, axis=0)


def _of(result: Result, method: str, config: str | None = None) -> list[Record]:
    records = select(result["records"], method=method)
    return records if config is None else select(records, config=config)


def table(result: Result) -> Table:
    columns = ["method", "clean", *task.UNSEEN, "mean unseen", "runs", "seconds"]
    rows = [
        [_name(result, method, config), *_row(result, method, config)]
        for method, config in ROWS
        if _of(result, method)
    ]
    meta = result["meta"]
    caption = (
        f"Test accuracy in %, mean ± standard deviation over {meta['seeds']} seeds, "
        f"{meta['steps']} steps, {meta['device']} ({meta['cpu_count']} cores). "
        "Runs and seconds: cost of one repetition, compilation apart."
    )
    return Table(columns, rows, caption)


def summary(result: Result) -> Table:
    """The table without the shifts one by one."""
    columns, rows, caption = table(result)
    kept = [i for i, column in enumerate(columns) if column not in task.UNSEEN]
    return Table(
        [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], caption
    )


def _name(result: Result, method: str, config: str | None) -> str:
    settings = _of(result, method)[0]["config"] if method in LEARNED else ""
    return ROWS[method, config].format(**parse(settings))


def _row(result: Result, method: str, config: str | None) -> list[str]:
    records = _of(result, method, config)
    (seconds,) = select(_of(result, method), metric="run_seconds")
    compute = _compute(records)
    alone = method in (*CONDITIONAL, *WEIGHTED)
    repeated = 1 if alone else compute / seconds["compute"]
    return [
        *(
            mean_sd(values(records, metric="accuracy", domain=domain), scale=100)
            for domain in ("clean", *task.UNSEEN)
        ),
        mean_sd(_unseen(records), scale=100),
        f"{compute:.3g}",
        f"{seconds['value'] * repeated:.1f}",
    ]


def _compute(records: list[Record]) -> float:
    measured = select(records, metric="accuracy")
    return float(np.mean([record["compute"] for record in measured]))


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    rivals = [("grid", VALIDATED), ("random", VALIDATED), ("equal", None)]
    sentences = []
    if _of(result, "yoto"):
        present = [rival for rival in rivals if _of(result, rival[0])]
        sentences += [_comparison(result, *rival) for rival in present]
        if _of(result, "grid"):
            sentences.append(_cause(result))
    if _of(result, "conditional"):
        rivals += [("yoto", None), ("paper", None)]
        present = [rival for rival in rivals if _of(result, rival[0])]
        sentences += [_comparison(result, *r, ours="conditional") for r in present]
    if _of(result, "grid"):
        others = [m for m in (*WEIGHTED, "portfolio", "race") if _of(result, m)]
        sentences += [_comparison(result, "grid", VALIDATED, ours=m) for m in others]
    sentences += [_hold(result, method) for method in LEARNED if _of(result, method)]
    return sentences


def _comparison(
    result: Result, method: str, config: str | None, ours: str = "yoto"
) -> str:
    name = NAMES.get(ours) or _name(result, ours, None)
    mine, theirs = _of(result, ours), _of(result, method, config)
    difference = _unseen(mine) - _unseen(theirs)
    outcome = {
        0: "no significant difference (within 95 %)",
        1: f"{name} is ahead",
        -1: f"{name} is behind",
    }[verdict(difference)]
    return (
        f"{name} against {_name(result, method, config)}: "
        f"{mean_sd(difference, scale=100)} points on unseen shifts, for "
        f"{_compute(mine):.3g} against {_compute(theirs):g} training runs; {outcome}."
    )


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.2g}" for name, number in numbers.items())


def _cause(result: Result) -> str:
    """Where the weights went, and why not where the grid found the best ones."""
    ours, grid = _of(result, "yoto"), _of(result, "grid", VALIDATED)
    learned, searched = task.mean_of(ours, "weight"), task.mean_of(grid, "weight")
    losses = task.mean_of(ours, "loss")
    composite = sum(learned[name] * losses[name] for name in task.LOSSES)
    wanted = max(task.LOSSES, key=lambda name: searched[name] / learned[name])
    text = (
        f"Weights at the end of YOTO: {_listed(learned)}; the grid's choice: "
        f"{_listed(searched)}."
    )
    if verdict(_unseen(ours) - _unseen(grid)) < 0:
        text += (
            f" The grid's choice weighs {wanted} "
            f"{searched[wanted] / learned[wanted]:.2g} times as much."
        )
        if losses[wanted] > composite:
            text += (
                f" Likely cause: weight flows to small losses, and {wanted} "
                f"({losses[wanted]:.2g}) lies above the composite loss "
                f"({composite:.2g}), so descent lowers its weight."
            )
        else:
            text += (
                f" Likely cause: the regulariser or the short run, because descent "
                f"raises the weight of {wanted} ({losses[wanted]:.2g}), which lies "
                f"below the composite loss ({composite:.2g})."
            )
    return text


def _hold(result: Result, method: str) -> str:
    """How far the losses moved the weights from where the regulariser wants them."""
    furthest, factor = task.distance(
        task.mean_of(_of(result, method), "weight"),
        task.mean_of(_of(result, "regulariser"), "weight"),
    )
    return (
        f"{_name(result, method, None)}: the weights end within a factor of "
        f"{factor:.2g} ({furthest}) of those that the regulariser alone would choose."
    )


# The figure.


def figure(result: Result, path: Path) -> None:
    """Weights and losses over time, and accuracy against cost."""
    history = [h for h in result["history"] if h["method"] == "yoto"]
    drawing = Figure(figsize=(15, 4.4), dpi=100, layout="constrained")
    widths = (1, 1, 1.35) if history else (1,)
    panels = drawing.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if history:
        _draw_history(panels[0], history, "weights")
        _draw_history(panels[1], history, "losses")
        alone = task.mean_of(_of(result, "regulariser"), "weight")
        for name, color in plots.LOSS_COLORS.items():
            panels[0].axhline(alone[name], color=color, linestyle=(0, (1, 3)), zorder=0)
        panels[0].plot(
            [], [], color=plots.GREY, linestyle=":", label="regulariser alone"
        )
        panels[0].set(title="YOTO: loss weights", ylabel="loss weight (sum: 1)")
        panels[1].set(title="YOTO: training losses", ylabel="loss")
        drawing.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower left",
            ncols=4,
            frameon=False,
        )
    _draw_accuracy(panels[-1], result)
    plots.save(drawing, path)


def _draw_history(panel: Axes, history: list[dict[str, Any]], what: str) -> None:
    """Mean over seeds, and the range of the seeds as a band."""
    for name, color in plots.LOSS_COLORS.items():
        curves = np.array([h[what][name] for h in history])
        step = history[0]["step"]
        plots.band(panel, step, curves, color, name)
    panel.set(xlabel="training step")
    plots.plain_log_axis(panel)


def _draw_accuracy(panel: Axes, result: Result) -> None:
    points = [  # method, config, marker, colour, shift that keeps points apart
        ("yoto", None, "o", plots.BLUE, 0.0),
        ("paper", None, "v", plots.SKY, 0.25),
        ("equal", None, "s", plots.BLACK, -0.25),
        ("conditional", None, "P", plots.VERMILION, 0.0),
        ("nash_mtl", None, "<", plots.GREEN, 0.0),
        ("nash_mtl_features", None, ">", plots.GREEN, 0.4),
        ("share", None, "^", plots.VERMILION, -0.45),
        ("portfolio", None, "X", plots.BLUE, 0.0),
        ("race", None, "X", plots.GREY, 0.0),
        ("grid", VALIDATED, "D", plots.ORANGE, 0.15),
        ("grid", ORACLE, "*", plots.PURPLE, -0.15),
    ]
    for method, config, marker, color, shift in points:
        if records := _of(result, method, config):
            accuracy = 100 * _unseen(records)
            plots.point(
                panel,
                _compute(records) + shift,
                accuracy,
                marker,
                color,
                label=_name(result, method, config),
            )
    if _of(result, "random"):
        plots.random_search(panel, 100 * best_of_n(result, "random"))
    if grid := _of(result, "grid", WORST):
        panel.axhline(
            100 * _unseen(grid).mean(),
            color=plots.GREY,
            linestyle=":",
            label=_name(result, "grid", WORST),
        )
    panel.set(
        title="Accuracy against cost",
        xlabel="cost (training runs)",
        ylabel="accuracy, mean over unseen shifts (%)",
    )
    panel.xaxis.set_major_locator(MultipleLocator(1))
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def best_of_n(result: Result, method: str) -> np.ndarray:
    """Expected test accuracy of the validated best among n runs, for every n."""
    searched = [r for r in _of(result, method) if "=" in r["config"]]
    curves = []
    for seed in range(result["meta"]["seeds"]):
        of_seed = select(searched, seed=seed)
        validation = values(of_seed, domain="validation stylised")
        curves.append(searches.best_of_n(validation, _unseen(of_seed)))
    return np.mean(curves, axis=0)
