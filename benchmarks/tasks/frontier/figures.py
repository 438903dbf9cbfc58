"""Methods against problems, and how good an answer is against what it costs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots, searches
from benchmarks.harness.results import Result
from benchmarks.tasks.frontier.outcomes import (
    SEARCH,
    Line,
    difference,
    outcome,
    problems_of,
    so_far,
    standings,
)

SHOWN = {
    "equal": ("equal weights", "o", plots.BLACK),
    "yoto": ("YOTO", "v", plots.BLUE),
    "share 1": ("equal gradient norms at the start", "d", plots.GREY),
    "aligned_mtl, every 10": ("Aligned-MTL, every 10 steps", "<", plots.ORANGE),
    "aligned_mtl": ("Aligned-MTL", ">", plots.VERMILION),
    "nash_mtl": ("Nash-MTL", "P", plots.PURPLE),
    "race: equal and shares, cut at 20 %": (
        "race: equal, shares of gradient norms",
        "*",
        plots.GREEN,
    ),
    "race: 15 points, cut at 10 and 30 %": ("race: 15 random points", "s", plots.SKY),
}
"""Rows that are drawn: label, marker, colour."""

SEARCHES = {
    SEARCH: ("random search, best of n by validation", "-", plots.GREEN),
    "search, TPE": ("search by TPE, after five at random", "--", plots.BLUE),
    "search, GP": ("search by a Gaussian process, the same", ":", plots.VERMILION),
}
"""Searches that are drawn: label, line, colour."""

LOWEST = -10.0  # margins; what is lower stands at the edge
UNKNOWN = "no search to compare with"


def against_runs(result: Result, path: Path) -> None:
    """A panel for each problem: difference to the whole search, in margins."""
    lines, problems = result["runs"], problems_of(result)
    columns = min(len(problems), 3)
    rows = -(-len(problems) // columns)
    size = (3.2 * columns + 2.6, 3.2 * rows + 0.2)
    drawing = Figure(size, dpi=110, layout="constrained")
    panels = drawing.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(problems) :]:
        panel.set_axis_off()
    for panel, (problem, about) in zip(panels, problems.items(), strict=False):
        theirs = outcome(lines, problem, SEARCH)
        if theirs.tests:
            _draw_search(panel, lines, problem, about["margin"])
        else:
            panel.text(0.5, 0.5, UNKNOWN, ha="center", transform=panel.transAxes)
        below: Counter[float] = Counter()  # labels at the lower edge, by their cost
        for method, (label, marker, color) in SHOWN.items():
            ours = outcome(lines, problem, method)
            apart = difference(ours, theirs)
            if not np.isfinite(apart.mean):
                continue
            mean, reach = (x / about["margin"] for x in (apart.mean, apart.reach))
            look = {"color": color, "label": label, "marker": marker, "linestyle": ""}
            if mean > LOWEST:
                panel.errorbar(ours.runs, mean, reach, capsize=2, **look)
            else:  # At the lower edge, with its number.
                panel.plot(ours.runs, LOWEST, clip_on=False, **look)
                place = round(5 * np.log10(ours.runs))  # Labels close by stack.
                panel.annotate(
                    f"{mean:.0f}",
                    (ours.runs, LOWEST),
                    xytext=(6, 3 + 9 * below[place]),
                    textcoords="offset points",
                    color=color,
                    fontsize=8,
                )
                below[place] += 1
        panel.set_xscale("log")
        panel.set_xticks([1, 2, 3, 5, 10, 15], ["1", "2", "3", "5", "10", "15"])
        panel.minorticks_off()
        panel.set_ylim(LOWEST, 6)
        panel.set_title(problem.replace("_", " "))
        panel.set_xlabel("cost (training runs)")
    for panel in panels[::columns]:
        panel.set_ylabel("difference to the search\nof 15 runs (margins)")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        drawing.legend(
            handles.values(), handles, loc="outside right upper", frameon=False
        )
    plots.save(drawing, path)


def _draw_search(
    panel: Axes, lines: Sequence[Line], problem: str, margin: float
) -> None:
    """What others are compared with: the best of n points, and one margin below all."""
    panel.axhline(0.0, color="0.7", linewidth=1)
    panel.axhspan(-1.0, 0.0, color="0.93")
    for search, (label, style, color) in SEARCHES.items():
        if outcome(lines, problem, search).tests:
            curve = search_curve(lines, problem, search) / margin
            runs = np.arange(1, len(curve) + 1)
            told = runs >= (1 if search == SEARCH else searches.STARTED)
            panel.plot(runs[told], curve[told], style, color=color, label=label)


def search_curve(
    lines: Sequence[Line], problem: str, search: str = SEARCH
) -> np.ndarray:
    """What a search ends with after n runs, beside what the random one does at last."""
    whole = outcome(lines, problem, SEARCH).tests
    curves = so_far(lines, problem, search)
    return np.mean([x - whole[seed] for seed, x in curves.items()], axis=0)


def heatmap(result: Result, path: Path) -> None:
    """Methods against problems, in margins away from the search."""
    lines, problems = result["runs"], problems_of(result)
    names = [name for name in standings(lines, problems) if name != SEARCH]
    margins = np.full((len(names), len(problems)), np.nan)
    lost = np.zeros_like(margins, bool)
    for column, (problem, about) in enumerate(problems.items()):
        theirs = outcome(lines, problem, SEARCH)
        for row, name in enumerate(names):
            ours = outcome(lines, problem, name)
            apart = difference(ours, theirs)
            lost[row, column] = ours.collapsed > 0 or apart.mean == -np.inf
            if apart.seeds:
                margins[row, column] = max(apart.mean, -1e6) / about["margin"]
    size = (5.2 + 0.85 * len(problems), 1.2 + 0.2 * len(names))
    drawing = Figure(size, dpi=110, layout="constrained")
    panel = drawing.add_subplot()
    colors = matplotlib.colormaps["RdBu"].with_extremes(bad="0.9")
    image = panel.imshow(
        np.ma.masked_invalid(margins), cmap=colors, vmin=-6, vmax=6, aspect="auto"
    )
    panel.set_xticks(range(len(problems)), [p.replace("_", "\n") for p in problems])
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    for (row, column), value in np.ndenumerate(margins):
        if np.isfinite(value):
            text = "x" if lost[row, column] else f"{value:+.1f}"
            dark = abs(value) > 3.5
            panel.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    bar = drawing.colorbar(image, ax=panel, extend="both", shrink=0.4, aspect=30)
    bar.set_label(
        "difference to the search of 15 runs, in margins (more is better)\n"
        "x: a seed ends below all 15 random constants",
        fontsize=8,
    )
    drawing.savefig(path)
