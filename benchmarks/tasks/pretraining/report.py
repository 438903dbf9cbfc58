"""What is shown of the pretraining, from the stored result alone."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots, searches
from benchmarks.harness.results import Record, Result, select, values
from benchmarks.harness.searches import ORACLE, VALIDATED, WORST, verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.pretraining import task
from benchmarks.tasks.pretraining.methods import (
    ALIGNED,
    CLOSED,
    EQUAL,
    FIXED,
    GRAP,
    METRICS,
    PLAIN,
    PROBE,
    ROWS,
    SEARCHES,
)


def _of(result: Result, method: str, config: str | None = None) -> list[Record]:
    records = select(result["records"], method=method)
    records = [r for r in records if r["seed"] is not None]
    return records if config is None else select(records, config=config)


def _compute(result: Result, method: str, config: str | None) -> float:
    """Total cost in units of one run with constant weights."""
    (ratio,) = values(result["records"], method=method, metric="step_ratio")
    return float(ratio * _of(result, method, config)[0]["compute"])


def _present(result: Result) -> dict[tuple[str, str | None], str]:
    return {row: name for row, name in ROWS.items() if _of(result, *row)}


def table(result: Result) -> Table:
    shares = [f"{name} %" for name in task.LOSSES]
    rows = []
    for row, name in _present(result).items():
        records = _of(result, *row)
        accuracies = [
            mean_sd(values(records, metric=metric), scale=100) for metric in METRICS
        ]
        at_the_end = [
            f"{100 * values(records, metric=f'weight:{loss}').mean():.1f}"
            for loss in task.LOSSES
        ]
        rows.append([name, *accuracies, f"{_compute(result, *row):.3g}", *at_the_end])
    meta = result["meta"]
    caption = (
        f"Test accuracy in %, mean ± standard deviation over {meta['seeds']} seeds; "
        f"{meta['data']}: {meta['training_images']} training images, "
        f"{meta['labelled_images']} of them labelled, {meta['test_images']} test "
        f"images, {meta['classes']} classes; {meta['steps']} steps, {meta['device']} "
        f"({meta['cpu_count']} cores). Runs: total cost in units of one run with "
        "constant weights. Last columns: effective weights at the end, sum 100."
    )
    return Table(["method", *METRICS.values(), "runs", *shares], rows, caption)


def summary(result: Result) -> Table:
    """The table without the weights."""
    columns, rows, caption = table(result)
    kept = 2 + len(METRICS)
    caption, _ = caption.split(" Last columns:")
    return Table(columns[:kept], [row[:kept] for row in rows], caption)


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    if _of(result, "random"):
        best, worst = (_probe(result, "random", c) for c in (ORACLE, WORST))
        sentences.append(
            f"Weights matter: the best and the worst random draw are "
            f"{mean_sd(best - worst, scale=100)} points apart."
        )
    rivals = [("random", VALIDATED), ("grid", VALIDATED), (EQUAL, None)]
    rivals += [("published", None), (PLAIN, None), (CLOSED, None)]
    if _of(result, GRAP):
        sentences += [
            _comparison(result, GRAP, rival) for rival in rivals if _of(result, *rival)
        ]
    return sentences


def _probe(result: Result, method: str, config: str | None = None) -> np.ndarray:
    return values(_of(result, method, config), metric=PROBE)


def _comparison(result: Result, ours: str, theirs: tuple[str, str | None]) -> str:
    difference = _probe(result, ours) - _probe(result, *theirs)
    outcome = {
        1: "ahead (95 %)",
        0: "no significant difference (within 95 %)",
        -1: "behind (95 %)",
    }[verdict(difference)]
    return (
        f"{ROWS[ours, None]} against {ROWS[theirs]}: "
        f"{mean_sd(difference, scale=100)} points of the linear probe, for "
        f"{_compute(result, ours, None):.3g} against {_compute(result, *theirs):.3g} "
        f"runs; {outcome}."
    )


# The figure.

COLORS = dict(zip(task.LOSSES, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=True))


def figure(result: Result, path: Path) -> None:
    """Effective weights of GraP over time, and accuracy against total cost."""
    shown = [m for m in ALIGNED if _of(result, m)]
    drawing = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    widths = [1.0] * len(shown) + [2.2]
    panels = drawing.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for panel, method in zip(panels, shown, strict=False):
        _draw_weights(panel, result, method)
    if shown:
        panels[0].set_ylabel("effective weight (sum: 1)")
        handles, labels = panels[0].get_legend_handles_labels()
        drawing.legend(
            handles, labels, loc="outside lower left", ncols=5, frameon=False
        )
    _draw_accuracy(panels[-1], result)
    plots.save(drawing, path)


def _draw_weights(panel: Axes, result: Result, method: str) -> None:
    """Mean over seeds, and the range of the seeds as a band."""
    history = [h for h in result["history"] if h["method"] == method]
    step = history[0]["step"]
    for name, color in COLORS.items():
        curves = np.array([h["weights"][name] for h in history])
        plots.band(panel, step, curves, color, name)
        share = FIXED["published"][task.LOSSES.index(name)] / sum(FIXED["published"])
        panel.axhline(share, color=color, linestyle=(0, (1, 3)), zorder=0)
    panel.plot([], [], color=plots.GREY, linestyle=":", label="published")
    panel.set(
        title=ROWS[method, None].replace(", ", ",\n"),
        xlabel="training step",
        ylim=(0, 1),
    )


def _draw_accuracy(panel: Axes, result: Result) -> None:
    points = [  # method, config, marker, colour
        (GRAP, None, "o", plots.BLUE),
        (CLOSED, None, "v", plots.SKY),
        (EQUAL, None, "s", plots.BLACK),
        ("published", None, "P", plots.VERMILION),
        ("grid", VALIDATED, "D", plots.ORANGE),
        ("random", ORACLE, "*", plots.PURPLE),
    ]
    cheap = [p for p in points if _of(result, *p[:2]) and p[0] not in SEARCHES]
    for method, config, marker, color in points:
        if _of(result, method, config):
            accuracy = 100 * _probe(result, method, config)
            # Points of equal cost side by side.
            place = [p[0] for p in cheap].index(method) if method in FIXED else 0
            plots.point(
                panel,
                _compute(result, method, config) * 0.96**place,
                accuracy,
                marker,
                color,
                label=ROWS[method, config],
            )
    if _of(result, "random"):
        plots.random_search(panel, 100 * best_of_n(result, "random"))
    panel.set_xscale("log")
    ticks = [1, 2, 5, 10, 20]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set(
        title="Accuracy against total cost",
        xlabel="cost (runs with constant weights)",
        ylabel="linear probe on the test half (%)",
    )
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def best_of_n(result: Result, method: str) -> np.ndarray:
    """Expected test accuracy of the validated best among n runs, for every n."""
    searched = [r for r in _of(result, method) if "=" in r["config"]]
    curves = []
    for seed in range(result["meta"]["seeds"]):
        of_seed = select(searched, seed=seed)
        validation = values(of_seed, metric="validation")
        test = values(of_seed, metric=PROBE)
        curves.append(searches.best_of_n(validation, test))
    return np.mean(curves, axis=0)
