"""What is shown of the style transfer, from the stored result alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.style.methods import (
    HIGH,
    LONGER,
    LOW,
    MIDDLE,
    WALKS,
    WEIGHTINGS,
    Weights,
    places_of,
    stacked,
    walk,
)
from benchmarks.tasks.style.task import LOSSES, STYLES
from yoto_jax import conditional


def _losses(result: Result, method: str, dial: str, names: Sequence[str]) -> Weights:
    """Losses (seeds, n) at the weightings of these names."""
    of = select(result["records"], method=method, domain=dial)
    rows = {
        loss: [values(of, metric=loss, config=name) for name in names]
        for loss in LOSSES
    }
    return {loss: np.stack(each, axis=1) for loss, each in rows.items()}


def _has(result: Result, method: str) -> bool:
    return bool(select(result["records"], method=method))


def totals(result: Result, method: str) -> np.ndarray:
    """Weighted mean of the losses (seeds, n) at the weightings."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    sums = np.sum(list(weights.values()), axis=0)
    return _weighted(_losses(result, method, "", names), weights) / sums


def _weighted(losses: Weights, weights: Weights) -> np.ndarray:
    return np.sum([weights[loss] * losses[loss] for loss in LOSSES], axis=0)


def gaps(result: Result, method: str) -> np.ndarray:
    """By how much a method is above the networks for one weighting, relative."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    reference = _losses(result, "fixed", "", names)
    measured = _losses(result, method, "", names)
    gap = jax.vmap(conditional.gap, in_axes=(0, 0, None))
    above = np.asarray(gap(measured, reference, weights))
    return above / _weighted(reference, weights)


def elsewhere(result: Result) -> np.ndarray:
    """Likewise if the network for the middle is used for all weightings."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    losses = _losses(result, "fixed", "", names)
    matrix = np.stack(
        [
            conditional.cross_matrix({k: v[seed] for k, v in losses.items()}, weights)
            for seed in range(result["meta"]["seeds"])
        ]
    )
    own = np.diagonal(matrix, axis1=1, axis2=2)
    return matrix[:, :, names.index("all middle")] / own - 1


CONDITIONAL = ("conditional", "longer")


def _present(result: Result) -> list[str]:
    return [method for method in CONDITIONAL if _has(result, method)]


def _title(method: str) -> str:
    return f"conditional, {LONGER}x steps" if method == "longer" else method


def table(result: Result) -> Table:
    """The weighted mean of the losses at each weighting, and the gaps."""
    present, fixed = _present(result), _has(result, "fixed")
    columns = ["weighting"]
    cells = []
    if fixed:
        columns += ["fixed", "fixed for all middle"]
        cells.append([mean_sd(x, 3) for x in totals(result, "fixed").T])
        cells.append([_percent(x) for x in elsewhere(result).T])
    for method in present:
        columns.append(_title(method))
        total = [mean_sd(x, 3) for x in totals(result, method).T]
        if fixed:
            gap = gaps(result, method).T
            total = [f"{t} ({_percent(g)})" for t, g in zip(total, gap, strict=True)]
        cells.append(total)
    runs = len(WEIGHTINGS)
    meta = result["meta"]
    caption = (
        f"Weighted mean of content and four style losses on held-out contents, over "
        f"{meta['seeds']} seeds. A style loss is 1 for contents as they are, content "
        f"is 1 for a uniform grey. Fixed: {runs} networks, each trained for its "
        f"weighting, {runs} runs of {meta['steps']} steps. Conditional: one network, "
        f"1 run ({LONGER}x: {LONGER} runs). In percent: above the fixed "
        f'networks; "fixed for all middle" is one of them used at every '
        f"weighting. High is {HIGH:g}, low {LOW:g}, middle {MIDDLE:g}; content "
        f"1. {meta['parameters']} parameters each. All training: {meta['seconds']} s, "
        f"{meta['device']} ({meta['cpu_count']} cores)."
    )
    rows = [[n, *c] for n, *c in zip(WEIGHTINGS, *cells, strict=True)]
    return Table(columns, rows, caption)


def _percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():+.0f} %"


def tables(result: Result) -> dict[str, Table]:
    return {"style-losses": losses_table(result), "style-dials": dials_table(result)}


def losses_table(result: Result) -> Table:
    """Every loss at each weighting, of the fixed networks and the conditional ones."""
    methods = [m for m in ("fixed", *CONDITIONAL) if _has(result, m)]
    names = list(WEIGHTINGS)
    rows = []
    for i, name in enumerate(names):
        for method in methods:
            losses = _losses(result, method, "", names)
            cells = [mean_sd(losses[loss][:, i], 3) for loss in LOSSES]
            rows.append([f"{name}: {_title(method)}", *cells])
    return Table(["weighting", *LOSSES], rows, "Lower is better.")


def dials_table(result: Result) -> Table:
    """What turning up each dial does to the loss that it is for."""
    columns = ["dial", "method", "loss at the lowest", "at the highest"]
    columns += ["rank correlation", "pairs that violate", "content at the highest"]
    rows = []
    for dial in WALKS:
        for method in _present(result):
            turned = turn(result, method, dial)
            own, content = turned["own"], turned["content"]
            rows.append(
                [
                    dial,
                    _title(method),
                    mean_sd(own[:, 0], 3),
                    mean_sd(own[:, -1], 3),
                    mean_sd(turned["correlation"], 2),
                    f"{100 * turned['violations'].mean():.0f} %",
                    mean_sd(content[:, -1], 3),
                ]
            )
    caption = (
        f"One weight rises from {LOW:g} to {HIGH:g} in {result['meta']['points']} "
        "steps, the other styles stay low; all: they rise together, and the loss is "
        "their mean. Rank correlation of weight and loss: -1 is right. Pairs of "
        "weightings violate if the loss is higher where the weight is."
    )
    return Table(columns, rows, caption)


def turn(result: Result, method: str, dial: str) -> dict[str, np.ndarray]:
    """What a dial does: losses (seeds, points), correlation and violations (seeds,)."""
    points = result["meta"]["points"]
    places = places_of(points)
    losses, weights = _losses(result, method, dial, places), walk(dial, points)
    chosen = STYLES if dial == "all" else (dial,)
    own = np.mean([losses[loss] for loss in chosen], axis=0)
    violations = jax.vmap(conditional.monotonicity_violations, in_axes=(0, None))
    above = np.asarray(violations(losses, weights)) > TOLERANCE
    pairs = np.triu_indices(points, 1)
    return {
        "own": own,
        "content": losses["content"],
        "correlation": np.array([rank_correlation(x) for x in own]),
        "violations": above[:, *pairs].mean(axis=1),
    }


TOLERANCE = 1e-4  # what rounding of the records can make of nothing


def rank_correlation(values: np.ndarray) -> float:
    """Spearman's, of values with their order."""
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    present, fixed = _present(result), _has(result, "fixed")
    for method in present if fixed else []:
        gap = gaps(result, method).mean(axis=0)
        ours, theirs = (totals(result, m).mean(axis=0) for m in (method, "fixed"))
        runs = LONGER if method == "longer" else 1
        worst = int(gap.argmax())
        sentences.append(
            f"{_title(method).capitalize()}, {runs} run{'s' if runs > 1 else ''} "
            f"instead of {len(gap)}: the weighted loss, averaged over the weightings, "
            f"is {ours.mean():.3f} against {theirs.mean():.3f} of networks trained for "
            f"each ({100 * (ours.mean() / theirs.mean() - 1):+.0f} %), below theirs at "
            f"{int((gap < 0).sum())} of {len(gap)}. The largest excess relative to "
            f"theirs is {100 * gap[worst]:+.0f} % ({list(WEIGHTINGS)[worst]}, "
            f"{ours[worst]:.3f} against {theirs[worst]:.3f}), the median "
            f"{100 * np.median(gap):+.0f} %."
        )
    if fixed:
        wrong = elsewhere(result).mean(axis=0)
        others = np.delete(wrong, list(WEIGHTINGS).index("all middle"))
        sentences.append(
            "One fixed network, that for the middle, used at the other weightings: "
            f"median {100 * np.median(others):+.0f} % relative to theirs, at worst "
            f"{100 * others.max():+.0f} %."
        )
    for method in present:
        turns = {dial: turn(result, method, dial) for dial in WALKS}
        correlations = {d: t["correlation"].mean() for d, t in turns.items()}
        listed = ", ".join(f"{d} {c:.2f}" for d, c in correlations.items())
        violations = np.mean([t["violations"] for t in turns.values()])
        names = list(WEIGHTINGS)
        matrix = conditional.cross_matrix(
            {k: v.mean(axis=0) for k, v in _losses(result, method, "", names).items()},
            stacked(names),
        )
        calibrated = int((np.argmin(matrix, axis=1) == np.arange(len(names))).sum())
        sentences.append(
            f"{_title(method).capitalize()}: rank correlation of a weight with the "
            f"loss that it is for: {listed} (-1 is right); {100 * violations:.0f} % of "
            f"the pairs of weightings violate monotonicity. At {calibrated} of "
            f"{len(names)} weightings the best setting of the dials, among these, is "
            "the one that was asked for."
        )
    return sentences


# Figures.

COLORS = dict(
    zip(
        LOSSES,
        (plots.BLACK, plots.SKY, plots.BLUE, plots.GREEN, plots.VERMILION),
        strict=True,
    )
)


def figure(result: Result, path: Path) -> None:
    """All losses as each dial turns up, and the networks for one weighting."""
    drawing = Figure(figsize=(15, 4.3), dpi=90, layout="constrained")
    panels = drawing.subplots(1, len(WALKS), sharey=True)
    for panel, dial in zip(panels, WALKS, strict=True):
        for method in _present(result):
            _draw_walk(panel, result, method, dial)
        if _has(result, "fixed"):
            _draw_fixed(panel, result, dial)
        panel.set_xscale("log")
        panel.set_xlabel("all style weights" if dial == "all" else f"weight of {dial}")
        panel.set_title(scale(dial, " "), fontsize=11)
    panels[0].set_ylabel("loss on held-out contents")
    panels[0].set_ylim(bottom=0)
    look = dict(color=plots.GREY)
    for method, line in _lines(result).items():
        panels[-1].plot([], [], label=f"{_title(method)}, one network", **line, **look)
    if _has(result, "fixed"):
        label = "fixed, one network a point"
        panels[-1].plot([], [], "o", markeredgecolor="white", label=label, **look)
    handles, labels = panels[-1].get_legend_handles_labels()
    drawing.legend(
        handles, labels, loc="outside lower center", ncols=len(handles), frameon=False
    )
    plots.save(drawing, path)


def scale(dial: str, between: str) -> str:
    which = {STYLES[0]: "(finest)", STYLES[-1]: "(coarsest)"}.get(dial)
    return f"{dial}{between}{which}" if which else dial


def _lines(result: Result) -> dict[str, dict[str, Any]]:
    """Looks of the conditional networks: the one with most steps is solid."""
    *others, best = _present(result) or [""]
    looks = {method: dict(lw=1.2, ls=(0, (4, 2))) for method in others}
    return looks | ({best: dict(lw=2, ls="-")} if best else {})


def _draw_walk(panel: Axes, result: Result, method: str, dial: str) -> None:
    points = result["meta"]["points"]
    rising = np.geomspace(LOW, HIGH, points)
    line = _lines(result)[method]
    for loss, each in _losses(result, method, dial, places_of(points)).items():
        look = dict(color=COLORS[loss], alpha=_alpha(loss, dial), **line)
        label = loss if line["ls"] == "-" else None
        panel.plot(rising, each.mean(axis=0), label=label, **look)
        if label and _alpha(loss, dial) == 1:
            band = each.min(axis=0), each.max(axis=0)
            panel.fill_between(rising, *band, color=COLORS[loss], alpha=0.15, lw=0)


def _alpha(loss: str, dial: str) -> float:
    """Faint: what the dial is not for."""
    return 1.0 if loss in ("content", dial) or dial == "all" else 0.3


def _draw_fixed(panel: Axes, result: Result, dial: str) -> None:
    """Those that lie on the walk, with the standard deviation over seeds."""
    places = {"all low": LOW, f"{dial} high": HIGH}
    if dial == "all":
        places["all middle"] = MIDDLE
    for loss, each in _losses(result, "fixed", "", list(places)).items():
        if _alpha(loss, dial) == 1:
            panel.errorbar(
                list(places.values()),
                each.mean(axis=0),
                each.std(axis=0, ddof=min(1, len(each) - 1)),
                fmt="o",
                ms=6,
                color=COLORS[loss],
                markeredgecolor="white",
                zorder=3,
            )
