"""Figure of recorded conflicts between gradients."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from yoto_jax.monitoring._conflicts import Conflicts, check_conflicts
from yoto_jax.monitoring._plot import STYLES, label_ends

_NUMBERED = 12  # With more losses than this, colours alone.
_TOLD = 20  # Names on an axis; of more losses, every second one, and so on.
_CURVES = 8  # Of so many pairs or losses; the others are left out.


def plot_conflicts(conflicts: Conflicts, *, axes: Sequence[Any] | None = None) -> Any:
    """Plots mean cosines as a matrix, and cosines and shares over steps.

    Numbers stand in the matrix for up to 12 losses. Of more than eight pairs, those
    with the lowest mean cosine are drawn over steps; of more than eight losses, those
    with the largest mean shares. A downstream loss has no share.

    Args:
      conflicts: From :func:`conflicts` or :func:`measure_conflicts`.
      axes: Three Matplotlib axes to draw on: matrix, cosines, shares. New ones in one
        row by default.

    Returns:
      The three axes.

    Raises:
      ModuleNotFoundError: Matplotlib is not installed.
      TypeError: ``conflicts`` is something else, such as the state.
      ValueError: There is nothing to draw yet, or ``axes`` are not three.

    Examples:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> gramian = np.array([[[1.0, -0.5], [-0.5, 1.0]]] * 2)
      >>> weights = {"depth": np.ones(2), "camera": np.ones(2)}
      >>> seen = monitoring.Conflicts(np.array([0, 10]), gramian, weights)
      >>> axes = monitoring.plot_conflicts(seen)
      >>> print([ax.get_title() for ax in axes])
      ['mean cosine', 'cosine', 'share of the update']
    """
    check_conflicts(conflicts)
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_conflicts needs Matplotlib: pip install 'yoto_jax[monitoring]'"
        ) from error
    if not len(conflicts.steps):
        raise ValueError("nothing to draw: no gradients have been looked at yet.")
    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    if np.shape(axes) != (3,):
        raise ValueError(
            "axes must be three, for the matrix, cosines and shares, got "
            f"{np.shape(axes)}."
        )
    matrix, cosines, shares = axes
    _draw_matrix(matrix, conflicts)
    by_pair = {f"{a}, {b}": x for (a, b), x in conflicts.cosines.items()}
    means = {name: _mean(x) for name, x in by_pair.items()}
    _draw_curves(cosines, conflicts.steps, by_pair, means, "cosine", "lowest")
    cosines.set_ylim(-1.05, 1.05)
    by_name = {
        name: x for name, x in conflicts.shares.items() if name != conflicts.downstream
    }
    means = {name: -abs(_mean(x)) for name, x in by_name.items()}
    title = "share of the update"
    _draw_curves(shares, conflicts.steps, by_name, means, title, "largest")
    _limit_to_most(shares)
    for ax in (cosines, shares):
        label_ends(ax)
    return axes


def _draw_matrix(ax: Any, seen: Conflicts) -> None:
    names = list(seen.loss_weights)
    values = np.full((len(names), len(names)), np.nan)
    for (a, b), x in seen.cosines.items():
        i, j = names.index(a), names.index(b)
        values[i, j] = values[j, i] = _mean(x)
    ax.set_facecolor("0.9")  # Where nothing is known, and on the diagonal.
    image = ax.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, ticks=[-1, 0, 1])
    size = "small" if len(names) <= _NUMBERED else "xx-small"
    told = range(0, len(names), -(-len(names) // _TOLD))
    labels = [names[k] for k in told]
    ax.set_xticks(told, labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(told, labels)
    ax.tick_params(labelsize=size, length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("mean cosine", fontsize="medium")
    if len(names) > _NUMBERED:
        return
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value) > 0.6
            ax.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize="medium" if len(names) <= 6 else "x-small",
            )


def _draw_curves(
    ax: Any,
    steps: np.ndarray,
    curves: dict[str, np.ndarray],
    rank: dict[str, float],
    title: str,
    which: str,
) -> None:
    """Curves over steps, the few with the lowest rank."""
    known = [name for name, x in curves.items() if np.isfinite(x).any()]
    chosen = sorted(known, key=rank.__getitem__)[:_CURVES]
    for k, name in enumerate(chosen):
        y = curves[name]
        alone = len(steps) == 1 or np.isfinite(y).sum() < 2
        ax.plot(
            steps,
            y,
            STYLES[k // 10 % len(STYLES)],
            color=f"C{k % 10}",
            marker="o" if alone else None,
            label=name,
        )
    if len(chosen) < len(known):
        title = f"{title}: the {len(chosen)} {which} of {len(known)}"
    ax.axhline(0, color="0.4", linewidth=0.8, zorder=1, label="_zero")
    if len(steps) > 1:
        ax.set_xlim(steps[0], steps[-1])
    ax.set_xlabel("step")
    ax.set_title(title, fontsize="medium")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _limit_to_most(ax: Any) -> None:
    """Limits to what is seen in most steps: shares of a tiny update are huge."""
    drawn = [line.get_ydata() for line in ax.get_lines() if line.get_label()[0] != "_"]
    values = np.concatenate([np.zeros(1), *drawn])
    low, high = np.quantile(values[np.isfinite(values)], [0.01, 0.99])
    margin = 0.08 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + margin)


def _mean(x: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Of a pair never together.
        return float(np.nanmean(x))
