"""What the figures share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Okabe and Ito's colours, told apart by most colour-blind readers.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
LOSS_COLORS = {"ce": BLUE, "invariance": VERMILION, "reconstruction": GREEN}


def plain_log_axis(panel: Axes) -> None:
    """A logarithmic axis with plain numbers on it, dense enough for one decade."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def band(
    panel: Axes,
    x: Sequence[float] | np.ndarray,
    curves: np.ndarray,
    color: str,
    label: str,
    geometric: bool = False,
    **line: Any,
) -> None:
    """Mean of the curves of the seeds, and their range as a band."""
    mean = np.exp(np.log(curves).mean(axis=0)) if geometric else curves.mean(axis=0)
    panel.plot(x, mean, color=color, label=label, **line)
    low, high = curves.min(axis=0), curves.max(axis=0)
    panel.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def point(
    panel: Axes, cost: float, found: np.ndarray, marker: str, color: str, **more: Any
) -> None:
    """Mean over seeds at its cost, with the standard deviation as a bar."""
    panel.errorbar(
        cost,
        found.mean(),
        found.std(ddof=1) if len(found) > 1 else None,
        fmt=marker,
        color=color,
        capsize=3,
        markersize=8,
        **more,
    )


def random_search(panel: Axes, percent: np.ndarray) -> None:
    """What the best of n random draws reaches, for every n."""
    panel.plot(
        np.arange(1, len(percent) + 1),
        percent,
        color=GREEN,
        marker=".",
        zorder=0,
        label="random, best of n by validation",
    )


def save(drawing: Figure, path: Path) -> None:
    for panel in drawing.axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path)
