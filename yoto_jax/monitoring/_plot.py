"""Figure of recorded loss weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from yoto_jax.monitoring._history import History, check_history, weighed

_LABELLED = 15  # With more lines than this, a legend.
_FLOOR = 1e-8  # Of the largest weight: where a logarithmic axis ends.
STYLES = ("-", "--", ":", "-.")
_SIZE = 9.0  # Of a label, in points.
_LEADER = {  # From a label to its line.
    "arrowstyle": "-",
    "linewidth": 0.6,
    "relpos": (0.0, 0.5),
    "shrinkA": 1,
    "shrinkB": 0,
}


def plot_loss_weights(history: History, *, ax: Any = None) -> Any:
    """Plots loss weights over steps.

    The axis of weights is logarithmic where they span more than two decades; it then
    omits weights of 0 and ends at 1e-8 of the largest. A downstream loss, which has no
    weight, is left out.

    Args:
      history: From :func:`history`.
      ax: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      ModuleNotFoundError: Matplotlib is not installed.
      TypeError: ``history`` is something else, such as the state.
      ValueError: There is nothing to draw yet.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> weights = {"depth": np.array([0.8, 0.7]), "camera": np.array([0.2, 0.3])}
      >>> seen = monitoring.History(np.array([0, 10]), weights, losses={})
      >>> ax = monitoring.plot_loss_weights(seen)
      >>> print(ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale())
      step loss weight linear
    """
    check_history(history)
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_loss_weights needs Matplotlib: pip install 'yoto_jax[monitoring]'"
        ) from error
    curves = {name: history.loss_weights[name] for name in weighed(history)}
    curves = {name: y for name, y in curves.items() if np.isfinite(y).any()}
    if not curves:
        why = (
            "no row has any of the losses"
            if len(history.steps)
            else "no loss weights have been recorded yet"
        )
        raise ValueError(f"nothing to draw: {why}.")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    values = np.concatenate(list(curves.values()))
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    wide = positive.size and np.ptp(np.log10(positive)) > 2
    logarithmic = wide and values.min() >= 0
    marker = "o" if len(history.steps) == 1 else None
    for k, (name, y) in enumerate(curves.items()):
        shown = np.where(y > 0, y, np.nan) if logarithmic else y
        style = STYLES[k // 10 % len(STYLES)]
        there = slice(None) if history.present is None else history.present[name]
        ax.plot(
            history.steps[there],
            shown[there],
            style,
            color=f"C{k % 10}",
            marker=marker,
            label=name,
        )
    if logarithmic:
        ax.set_yscale("log")
        lowest = max(positive.min(), _FLOOR * positive.max())
        ax.set_ylim(lowest / 1.5, positive.max() * 1.5)
    if len(history.steps) > 1:
        ax.set_xlim(history.steps[0], history.steps[-1])
    ax.set(xlabel="step", ylabel="loss weight")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) <= _LABELLED:
        label_ends(ax)
        return ax
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize="x-small",
        ncols=-(-len(curves) // 20),
        frameon=False,
    )
    return ax


def label_ends(ax: Any) -> None:
    """Labels each line at its end, moved up or down until none overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    left, bottom = ax.get_xlim()[0], ax.get_ylim()[0]
    ends = []
    for line in ax.get_lines():
        if line.get_label().startswith("_"):
            continue
        y = line.get_ydata()
        drawn = [bottom, *y[np.isfinite(y)]]  # None on a logarithmic axis: all 0.
        height = to_axes.transform((left, drawn[-1]))[1]
        ends.append((float(np.clip(height, 0.0, 1.0)), line))
    ends.sort(key=lambda end: end[0])
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    places = _spread([height for height, _ in ends], 1.2 * _SIZE / points)
    for (height, line), place in zip(ends, places, strict=True):
        ax.annotate(
            line.get_label(),
            xy=(1.0, height),
            xytext=(1.04, place),
            xycoords="axes fraction",
            color=line.get_color(),
            fontsize=_SIZE,
            va="center",
            arrowprops={
                **_LEADER,
                "color": line.get_color(),
                "linestyle": line.get_linestyle(),
            },
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves sorted heights as little as possible to at least this distance."""
    groups: list[list[float]] = []  # Neighbours that touch: their wishes, first at 0.
    start = lambda group: sum(group) / len(group)
    for height in heights:
        groups.append([height])
        while len(groups) > 1:
            *_, lower, upper = groups
            shift = gap * len(lower)
            if start(upper) >= start(lower) + shift:
                break
            lower += [wish - shift for wish in groups.pop()]
    return [start(group) + gap * k for group in groups for k in range(len(group))]
