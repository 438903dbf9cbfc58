"""What is shown of the image codecs, from the stored result alone."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.interpolate import PchipInterpolator

from benchmarks.harness import plots
from benchmarks.harness.results import Record, Result, parse, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.compression.methods import (
    GRID_OF_PSNR,
    METHODS,
    QUALITIES,
    SUBSAMPLINGS,
    WANTED,
)
from yoto_jax import conditional


def weights_of(result: Result, method: str) -> list[float]:
    """Weights of the distortion that were measured, ascending."""
    records = select(result["records"], method=method, metric="bpp")
    return sorted({_weight(r) for r in records})


def _weight(record: Record) -> float:
    return float(parse(record["config"])["distortion"])


def measured(result: Result, method: str, metric: str, weight: float) -> np.ndarray:
    """One number for each seed."""
    records = select(result["records"], method=method, metric=metric)
    return np.array(
        [r["value"] for r in records if r["config"] and _weight(r) == weight]
    )


def curve(
    result: Result, method: str, seed: int, weights: list[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """PSNR, ascending, and bits per pixel of a method's models of one seed."""
    weights = weights or weights_of(result, method)
    psnr, bpp = (
        np.array([measured(result, method, metric, w)[seed] for w in weights])
        for metric in ("psnr", "bpp")
    )
    return _ascending(psnr, bpp)


def jpeg_curve(
    result: Result, subsampling: str, metric: str = "bpp"
) -> tuple[np.ndarray, np.ndarray]:
    some = [
        r
        for r in select(result["records"], method="jpeg")
        if parse(r["config"])["subsampling"] == subsampling
    ]
    return _ascending(values(some, metric="psnr"), values(some, metric=metric))


def _ascending(psnr: np.ndarray, bpp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by PSNR, without points that others beat in both."""
    order = np.argsort(psnr)
    psnr, bpp = psnr[order], bpp[order]
    best = np.minimum.accumulate(bpp[::-1])[::-1]  # of those at least as good
    kept = np.append(best[:-1] < best[1:], True) & (bpp == best)
    return psnr[kept], bpp[kept]


def log_rate(curves: Iterable[tuple[np.ndarray, np.ndarray]], at: Any) -> np.ndarray:
    """Logarithm of the least rate that a PSNR takes; NaN where no curve goes."""
    at = np.asarray(at, float)
    found = [np.full(at.shape, np.nan)]
    for psnr, bpp in curves:
        if len(psnr) < 2:
            continue
        inside = PchipInterpolator(psnr, np.log(bpp), extrapolate=False)
        found.append(inside(at))
    return np.fmin.reduce(found)


Curves = list[tuple[np.ndarray, np.ndarray]]


def bd_rate(ours: Curves, theirs: Curves) -> float:
    """Bjontegaard's rate: mean difference at equal PSNR, as a share of theirs.

    Over the PSNR that both reach, of logarithms of rates, which are interpolated by
    piecewise cubic polynomials.
    """
    ends = [[(psnr[0], psnr[-1]) for psnr, _ in curves] for curves in (ours, theirs)]
    low = max(min(low for low, _ in some) for some in ends)
    high = min(max(high for _, high in some) for some in ends)
    at = np.linspace(low, high, GRID_OF_PSNR)
    difference = log_rate(ours, at) - log_rate(theirs, at)
    if high <= low or np.isnan(difference).all():
        return math.nan
    return float(np.expm1(np.nanmean(difference)))


def jpeg_curves(result: Result, metric: str = "bpp") -> Curves:
    return [jpeg_curve(result, name, metric) for name in SUBSAMPLINGS]


def seeds_of(result: Result) -> range:
    return range(result["meta"]["seeds"])


def objective(result: Result, method: str, weight: float) -> np.ndarray:
    """Rate + weight * distortion of each seed."""
    return (
        losses(result, method, weight)["rate"]
        + weight * (losses(result, method, weight)["distortion"])
    )


def losses(result: Result, method: str, weight: float) -> dict[str, np.ndarray]:
    return {
        "distortion": measured(result, method, "mse", weight),
        "rate": measured(result, method, "bpp", weight),
    }


def gap(result: Result, weight: float) -> np.ndarray:
    """Of the conditional model to the one for this weight, for each seed."""
    ours, theirs = (losses(result, m, weight) for m in ("conditional", "fixed"))
    ones = np.ones_like(ours["rate"])
    weights = {"distortion": weight * ones, "rate": ones}
    return np.asarray(conditional.gap(ours, theirs, weights))


def shared_weights(result: Result) -> list[float]:
    ours, theirs = (weights_of(result, m) for m in ("conditional", "fixed"))
    return [w for w in ours if w in theirs]


def table(result: Result) -> Table:
    """A row for each weight."""
    methods = [m for m in METHODS[:2] if weights_of(result, m)]
    compared = len(methods) == 2
    columns = ["weight of the distortion"]
    for method in methods:
        columns += [f"{method}: bpp", "PSNR"]
    columns += ["gap in the objective", "gap (%)"] if compared else []
    columns += ["JPEG at this PSNR: bpp"] if jpeg_known(result) and methods else []
    rows = []
    for weight in weights_of(result, methods[0]) if methods else []:
        row = [f"{weight:.3g}"]
        for method in methods:
            for metric, digits in (("bpp", 3), ("psnr", 2)):
                numbers = measured(result, method, metric, weight)
                row.append(mean_sd(numbers, digits) if len(numbers) else "")
        if compared and weight in shared_weights(result):
            share = gap(result, weight) / objective(result, "fixed", weight)
            row.append(mean_sd(gap(result, weight), 4))
            row.append(mean_sd(share, 2, scale=100))
        elif compared:
            row += ["", ""]
        if jpeg_known(result):
            psnr = measured(result, methods[0], "psnr", weight).mean()
            bpp = math.exp(log_rate(jpeg_curves(result), psnr))
            row.append(f"{bpp:.3f}" if bpp == bpp else "")
        rows.append(row)
    return Table(columns, rows, _caption(result))


def jpeg_known(result: Result) -> bool:
    return bool(select(result["records"], method="jpeg"))


def _caption(result: Result) -> str:
    meta = result["meta"]
    return (
        f"{meta['test_images']} test images of {meta['test_size']} pixels "
        f"({meta['data']}) in one stream of a range coder, decoded and checked; mean ± "
        f"standard deviation over {meta['seeds']} seeds, {meta['steps']} steps, "
        f"{meta['device']} ({meta['cpu_count']} cores). Objective: bits per pixel + "
        "weight x mean squared error (values from 0 to 255). JPEG: the better of 4:4:4 "
        "and 4:2:0, headers not counted."
    )


def summary(result: Result) -> Table:
    """A row for each method."""
    columns = [
        "method",
        "training runs",
        "seconds",
        "rate against JPEG (%)",
        "rate against fixed (%)",
        "worst and mean gap (%)",
    ]
    rows = []
    for method in METHODS[:2]:
        seconds, runs = seconds_of(result, method)
        row = [
            "one conditional model" if method == "conditional" else "a model a weight",
            f"{runs:g}",
            f"{seconds * runs:.1f}",
            mean_sd(against_jpeg(result, method), 1, scale=100),
        ]
        if method == "conditional":
            row.append(mean_sd(against_fixed(result), 1, scale=100))
            shares = gap_shares(result).mean(axis=1)
            row.append(f"{100 * shares.max():.1f}, {100 * shares.mean():.1f}")
        rows.append([*row, *[""] * (len(columns) - len(row))])
    caption = (
        "Rates at equal PSNR on the test images (Bjontegaard's mean over the PSNR that "
        "both reach; negative: fewer bits), mean ± standard deviation over "
        f"{result['meta']['seeds']} seeds. Seconds of training for one repetition "
        "(on a CPU: processor time), compilation apart. Gap: of the objective to the "
        "model trained for that weight."
    )
    return Table(columns, rows, caption)


def against_jpeg(result: Result, method: str, metric: str = "bpp") -> list[float]:
    rival = jpeg_curves(result, metric)
    return [bd_rate([curve(result, method, s)], rival) for s in seeds_of(result)]


def against_fixed(result: Result) -> list[float]:
    # At the same weights, so that both curves are interpolated alike.
    weights = shared_weights(result)
    both = (
        [[curve(result, method, s, weights)] for method in ("conditional", "fixed")]
        for s in seeds_of(result)
    )
    return [bd_rate(*curves) for curves in both]


def gap_shares(result: Result) -> np.ndarray:
    """Gaps relative to the objectives of fixed models, [weights, seeds]."""
    return np.array(
        [gap(result, w) / objective(result, "fixed", w) for w in shared_weights(result)]
    )


def selections(result: Result) -> Table:
    """The smallest rate with a PSNR that is wanted, of what each method offers."""
    rows = []
    for wanted in WANTED:
        row = [f"{wanted:g} dB"]
        for method in METHODS[:2]:
            chosen = [smallest(result, method, s, wanted) for s in seeds_of(result)]
            row.append("" if None in chosen else mean_sd(chosen, 3))
        offers = [{"psnr": psnr, "bpp": bpp} for psnr, bpp in jpeg_curves(result)]
        found = [b for b in (_smallest(offer, wanted) for offer in offers) if b]
        rows.append([*row, f"{min(found):.3f}" if found else ""])
    columns = ["PSNR of at least", "conditional: bpp", "fixed: bpp", "JPEG: bpp"]
    ours, theirs = (len(weights_of(result, m)) for m in METHODS[:2])
    caption = (
        "`conditional.select(..., minimize='bpp', at_least={'psnr': ...})`: the "
        f"conditional model was asked for {ours} weights, fixed models are there for "
        f"{theirs}, JPEG for {len(QUALITIES)} qualities in two subsamplings. An "
        "encoder has the image, so it may choose so. Empty: out of reach."
    )
    return Table(columns, rows, caption)


def smallest(result: Result, method: str, seed: int, wanted: float) -> float | None:
    weights = weights_of(result, method)
    offer = {
        metric: np.array([measured(result, method, metric, w)[seed] for w in weights])
        for metric in ("psnr", "bpp")
    }
    return _smallest(offer, wanted)


def _smallest(offer: dict[str, np.ndarray], wanted: float) -> float | None:
    if offer["psnr"].max() < wanted:
        return None
    index = conditional.select(offer, minimize="bpp", at_least={"psnr": wanted})
    return float(offer["bpp"][index])


def tables(result: Result) -> dict[str, Table]:
    return {"compression-selections": selections(result)}


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    return [
        _quality(result),
        _cost(result),
        _calibration(result),
        _jpeg_sentence(result),
        _coder_sentence(result),
    ]


def _quality(result: Result) -> str:
    shares = 100 * gap_shares(result)
    means = shares.mean(axis=1)
    ahead, rivals = int((means < 0).sum()), len(means)
    worst = shared_weights(result)[int(means.argmax())]
    rate = 100 * np.array(against_fixed(result))
    return (
        f"One conditional model against {rivals} fixed ones: its objective is "
        f"{means.mean():+.1f} % on average, {means.max():+.1f} % at worst (at weight "
        f"{worst:.3g}), and lower than theirs at {ahead} of {rivals} weights; at equal "
        f"PSNR it takes {mean_sd(rate)} % more bits (negative: fewer)."
    )


def seconds_of(result: Result, method: str) -> tuple[float, float]:
    """Seconds of a run, processor time on a CPU, and the number of runs."""
    cpu = result["meta"]["platform"] == "cpu"
    metric = "run_processor_seconds" if cpu else "run_seconds"
    (found,) = select(result["records"], method=method, metric=metric)
    return found["value"], found["compute"]


def _cost(result: Result) -> str:
    (ours, _), (theirs, runs) = (seconds_of(result, m) for m in METHODS[:2])
    meta = result["meta"]
    extra = meta["conditional_parameters"] / meta["fixed_parameters"] - 1
    return (
        f"It is trained once, for as many steps as each fixed model; its steps take "
        f"{ours / theirs:.2f} times as long as theirs, and the {runs:g} fixed models "
        f"together {runs * theirs / ours:.1f} times as long as it. Conditioning adds "
        f"{100 * extra:.0f} % to the parameters."
    )


def _calibration(result: Result) -> str:
    weights = np.array(weights_of(result, "conditional"))
    ones, hits, further = np.ones_like(weights), [], 0
    for seed in seeds_of(result):
        found = [losses(result, "conditional", w) for w in weights]
        of_seed = {k: np.array([x[k][seed] for x in found]) for k in found[0]}
        asked = {"distortion": weights, "rate": ones}
        matrix = np.asarray(conditional.cross_matrix(of_seed, asked))
        off = np.abs(matrix.argmin(axis=1) - np.arange(len(weights)))
        hits.append(int((off == 0).sum()))
        further = max(further, int(off.max()))
    return (
        f"Asked for a weight, it should be better there than when asked for another: "
        f"so it is for {np.mean(hits):.1f} of {len(weights)} weights on average over "
        f"seeds; the best is at most {further} places away on the grid."
    )


def _jpeg_sentence(result: Result) -> str:
    stripped = against_jpeg(result, "conditional")
    whole = against_jpeg(result, "conditional", "bpp with headers")
    crossing = _crossing(result)
    text = (
        f"Against JPEG at equal PSNR: {mean_sd(stripped, scale=100)} % bits, "
        f"{mean_sd(whole, scale=100)} % if JPEG's headers count."
    )
    if crossing is not None:
        text += f" JPEG without headers takes fewer bits below {crossing:.1f} dB."
    return text


def _crossing(result: Result) -> float | None:
    """The highest PSNR up to which JPEG takes fewer bits, None if it nowhere does."""
    ours = [curve(result, "conditional", s) for s in seeds_of(result)]
    low, high = max(c[0][0] for c in ours), min(c[0][-1] for c in ours)
    at = np.linspace(low, high, GRID_OF_PSNR)
    mean = np.mean([log_rate([c], at) for c in ours], axis=0)
    behind = mean > log_rate(jpeg_curves(result), at)
    return float(at[np.flatnonzero(behind)[-1]]) if behind.any() else None


def _coder_sentence(result: Result) -> str:
    ratios = [
        values(result["records"], method=method, metric="bpp")
        / values(result["records"], method=method, metric="entropy")
        for method in METHODS[:2]
    ]
    excess = 100 * (np.concatenate(ratios) - 1)
    return (
        f"Bytes of the range coder against the entropy model's estimate: "
        f"{excess.mean():+.2f} % ({excess.min():+.2f} to {excess.max():+.2f}); all "
        f"{len(excess)} streams decoded to the encoder's symbols and images."
    )


# Figures.

STYLES = {
    "conditional": (plots.BLUE, "o"),
    "fixed": (plots.ORANGE, "s"),
    "4:4:4": (plots.GREY, "-"),
    "4:2:0": (plots.GREY, "--"),
}


def figure(result: Result, path: Path) -> None:
    """Rates and distortions, gaps, and rates relative to JPEG."""
    drawing = Figure(figsize=(13, 4.9), dpi=110, layout="constrained")
    panels = drawing.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _draw_curves(panels[0], result)
    _draw_gaps(panels[1], result)
    _draw_savings(panels[2], result)
    plots.save(drawing, path)


def _legend_below(panel: Axes) -> None:
    """Where it covers no curve, whatever the results."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    panel.legend(frameon=False, ncols=2, columnspacing=1.2, **place)


def _draw_curves(panel: Axes, result: Result) -> None:
    top = 0.0
    for method in ("conditional", "fixed"):
        color, marker = STYLES[method]
        weights = weights_of(result, method)
        psnr, bpp = (
            [measured(result, method, metric, w).mean() for w in weights]
            for metric in ("psnr", "bpp")
        )
        label = "one conditional model" if method == "conditional" else None
        label = label or f"{len(weights)} fixed models"
        line = "-" if method == "conditional" else "none"
        panel.plot(
            bpp, psnr, marker=marker, color=color, linestyle=line, ms=5, label=label
        )
        top = max(top, *bpp)
    for name in SUBSAMPLINGS:
        psnr, bpp = jpeg_curve(result, name)
        shown = bpp < 1.15 * top
        color, line = STYLES[name]
        panel.plot(
            bpp[shown], psnr[shown], color=color, linestyle=line, label=f"JPEG {name}"
        )
    panel.set(
        xlabel="rate (bits per pixel)",
        ylabel="PSNR (dB)",
        title="Rate and distortion, test images",
    )
    _legend_below(panel)


def _draw_gaps(panel: Axes, result: Result) -> None:
    weights, shares = shared_weights(result), 100 * gap_shares(result)
    panel.axhline(0, color=plots.ORANGE, label="fixed model")
    for seed in seeds_of(result):
        label = "conditional, a seed" if seed == 0 else None
        panel.plot(weights, shares[:, seed], ".", color=plots.SKY, label=label)
    panel.plot(
        weights, shares.mean(axis=1), "-o", color=plots.BLUE, label="conditional, mean"
    )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(weights))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([f"{w:.2g}" for w in weights])
    panel.set(
        xlabel="weight of the distortion",
        ylabel="gap in rate + weight x distortion (%)",
        title="Conditional against fixed",
    )
    _legend_below(panel)


def _draw_savings(panel: Axes, result: Result) -> None:
    for method in ("conditional", "fixed"):
        curves = [curve(result, method, s) for s in seeds_of(result)]
        low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
        at = np.linspace(low, high, GRID_OF_PSNR)
        rival = log_rate(jpeg_curves(result), at)
        relative = 100 * np.expm1([log_rate([c], at) - rival for c in curves])
        color, _ = STYLES[method]
        name = "one conditional model" if method == "conditional" else "fixed models"
        plots.band(panel, at, relative, color, name)
    panel.axhline(0, color=plots.GREY, label="JPEG, headers free")
    panel.set(
        xlabel="PSNR (dB)",
        ylabel="bits relative to JPEG's (%)",
        title="Rate at equal PSNR",
    )
    _legend_below(panel)
