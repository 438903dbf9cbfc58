"""What is shown of two objectives in the plane, from the stored result alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Record, Result, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.toy.task import CLOSE, STARTS, front, losses_of, start_of


def table(result: Result) -> Table:
    """Where the runs end: x1 on the front, both coordinates of those that miss it."""
    columns = ["method", "on the front"]
    columns += [f"from ({a:g}, {b:g})" for a, b in STARTS]
    rows = []
    for trajectories in result["trajectories"]:
        method = trajectories["method"]
        records = select(result["records"], method=method)
        near = values(records, metric="distance to front") <= CLOSE
        cells = [_cell(select(records, config=start_of(s))) for s in STARTS]
        rows.append([method, f"{near.mean() * len(STARTS):.2g} of 5", *cells])
    meta = result["meta"]
    caption = (
        f"Coordinate x1 on the front, from -7 (best for the second loss) to 7 (for the "
        f"first), after {meta['steps']} steps of Adam; (x1, x2) of a run that ends "
        f"farther than {CLOSE} from it. Random: {meta['seeds']} seeds. All runs with "
        f"compilation: {meta['seconds']} s, {meta['device']} ({meta['cpu_count']} "
        "cores)."
    )
    return Table(columns, rows, caption)


def _cell(records: list[Record]) -> str:
    x1, x2, far = (
        values(records, metric=metric) for metric in ("x1", "x2", "distance to front")
    )
    missed = np.flatnonzero(far > CLOSE)
    if missed.size:
        return f"({x1[missed[0]]:.2f}, {x2[missed[0]]:.2f})"
    return mean_sd(x1, digits=2)


COLORS = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE)
LINES = "#BBBBBB"
LIMIT = 10.5


def figure(result: Result, path: Path) -> None:
    """The paths of every method on the contours of the mean loss."""
    trajectories = result["trajectories"]
    columns = min(5, len(trajectories))
    rows = -(-len(trajectories) // columns)
    drawing = Figure(
        figsize=(2.6 * columns, 2.75 * rows + 0.7), dpi=90, layout="constrained"
    )
    panels = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(trajectories) :]:
        panel.set_visible(False)
    axis = np.linspace(-LIMIT, LIMIT, 211)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    mean_loss = np.mean(jax.vmap(jax.vmap(losses_of))(jnp.asarray(grid)), axis=-1)
    for panel, entry in zip(panels.flat, trajectories, strict=False):
        panel.contour(
            axis,
            axis,
            mean_loss,
            levels=14,
            colors=LINES,
            linewidths=0.6,
            linestyles="solid",
        )
        _draw_paths(panel, np.array(entry["paths"]))
        panel.set_title(entry["method"], fontsize=10)
        panel.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    for panel in panels[-1]:
        panel.set_xlabel("x1")
    for panel in panels[:, 0]:
        panel.set_ylabel("x2")
    drawing.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    plots.save(drawing, path)


def _draw_paths(panel: Axes, paths: np.ndarray) -> None:
    x1 = np.linspace(-7, 7, 141)
    panel.plot(x1, front(x1), color=plots.BLACK, lw=4, label="Pareto front")
    ends = dict(linestyle="none", markersize=8, zorder=4)
    for color, points in zip(COLORS, paths, strict=True):
        panel.plot(*points.T, color=color, lw=1.5)
        panel.plot(*points[0], "o", color=color, markeredgecolor="white", zorder=3)
        panel.plot(*points[-1], "*", color=color, markeredgecolor="black", **ends)
    panel.plot([], [], "o", color=plots.GREY, linestyle="none", label="start")
    panel.plot([], [], "*", color=plots.GREY, label="end", **ends)
