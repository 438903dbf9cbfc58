"""Image compression: one model for every rate against a model for each, and JPEG.

The losses are the rate (bits per pixel) and the distortion (mean squared error of
values from 0 to 255). What is compared are bytes of a range coder whose decoder gives
back the encoder's images exactly, not estimates.
"""

import functools
import io
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image
from scipy.interpolate import PchipInterpolator

from benchmarks.harness import common, plots
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.tasks.compression import coder, task
from benchmarks.tasks.compression.task import Params, Size, Source, Statistics
from yoto_jax import conditional

RESUMABLE = True
METHODS = ("conditional", "fixed", "jpeg")
NAMES = {"conditional": "conditional", "fixed": "fixed", "jpeg": "JPEG"}
SUBSAMPLINGS = {"4:4:4": 0, "4:2:0": 2}
QUALITIES = (2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 70, 75, 80, 85, 90, 93, 96)
WANTED = (28.0, 30.0, 32.0, 34.0, 36.0)  # PSNR in dB
GRID_OF_PSNR = 200

Run = tuple[float | None, int, Params]  # weight (None: any), seed, parameters


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    source = task.load(size, options.data)
    stats = task.statistics(source.crops, size.channels)
    codec = coder.Codec(stats)
    learned = [method for method in methods if method != "jpeg"]
    name = options.benchmark if options.data is None else f"compression_{source.name}"
    path = options.out / f"{name}.json"
    units = common.Units(options, name)
    trained, records = train(learned, source, stats, size, options.seeds, units)
    for method in learned:
        records += code_records(method, codec, trained[method], source, size, units)
    if "jpeg" in methods:
        records += units.do("jpeg", lambda: jpeg_records(source.test))
    settings = {
        "seeds": options.seeds,
        "data": source.name,
        **size._asdict(),
        "test_images": len(source.test),
        "test_size": "{1}x{0}".format(*source.test.shape[1:3]),
        "fixed_parameters": task.count(stats, size, conditioned=False),
        "conditional_parameters": task.count(stats, size, conditioned=True),
    }
    result = common.write_json(path, common.meta(options, **settings), records)
    written = [path]
    if methods == METHODS:
        figure(result, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    if "conditional" in methods:
        written.append(path.with_name(f"{path.stem}_examples.png"))
        _, _, params = trained["conditional"][0]
        examples(codec, params, source, written[-1])
    common.show(table(result))
    if methods == METHODS:
        common.show(summary(result))
        for sentence in conclusions(result):
            common.say(f"- {sentence}")
    common.say(f"Written: {', '.join(map(str, written))}")


# Runs.


def train(
    methods: Sequence[str],
    source: Source,
    stats: Statistics,
    size: Size,
    seeds: int,
    units: common.Units,
) -> tuple[dict[str, list[Run]], list[Record]]:
    """All runs of the methods, and what one of them costs.

    Seed by seed, so that methods compared have the machine at the same times. Processor
    time is counted too, which other programs disturb less.
    """
    weights: dict[str, list[float | None]] = {
        "conditional": [None],
        "fixed": task.grid(size.points)[:: size.apart].tolist(),
    }
    trainers = {m: task.trainer(source, stats, size, m == "fixed") for m in methods}
    trained: dict[str, list[Run]] = {method: [] for method in methods}
    seconds: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    todo = [(s, m, w) for s in range(seeds) for m in methods for w in weights[m]]

    def timed(seed: int, method: str, weight: float | None) -> dict[str, Any]:
        start = time.perf_counter(), time.process_time()
        params, _ = trainers[method](seed, weight)
        end = time.perf_counter(), time.process_time()
        return {"params": params, "seconds": (end[0] - start[0], end[1] - start[1])}

    for seed, method, weight in common.track(todo, "training"):
        work = functools.partial(timed, seed, method, weight)
        found = units.do(_unit(method, seed, weight), work)
        trained[method].append((weight, seed, found["params"]))
        seconds[method].append(found["seconds"])
    records = []
    for method in methods:
        # The first run compiles.
        first, *others = np.array(seconds[method])
        typical = np.median(others, axis=0) if others else first
        measured = {
            "run_seconds": typical[0],
            "run_processor_seconds": typical[1],
            "compile_seconds": max(0.0, first[0] - typical[0]),
        }
        records += [
            common.record(method, metric, value, compute=len(weights[method]))
            for metric, value in measured.items()
        ]
    return trained, records


def _unit(method: str, seed: int, weight: float | None) -> str:
    return (
        f"{method}, seed {seed}, weight {weight if weight is None else f'{weight:g}'}"
    )


def code_records(
    method: str,
    codec: coder.Codec,
    runs: list[Run],
    source: Source,
    size: Size,
    units: common.Units,
) -> list[Record]:
    """Compress the test images with every model, at every weight that it is for."""
    asked = [
        (own, seed, params, weight)
        for own, seed, params in runs
        for weight in (task.grid(size.points) if own is None else [own])
    ]
    records, pixels = [], math.prod(source.test.shape[:3])

    def code(params: Params, weight: float) -> dict[str, float]:
        coded = coder.compress(codec, params, weight, source.test)
        return {
            "bpp": 8 * len(coded.data) / pixels,
            "entropy": coded.entropy / pixels,
            **errors(source.test, coded.images),
        }

    for _, seed, params, weight in common.track(asked, f"{method}: coding"):
        work = functools.partial(code, params, weight)
        measured = units.do(f"coding: {_unit(method, seed, weight)}", work)
        config = common.describe(distortion=weight)
        for metric, value in measured.items():
            records.append(
                common.record(method, metric, value, config=config, seed=seed)
            )
    return records


def errors(images: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    return {
        "mse": task.mse(images, reconstructed),
        "psnr": task.psnr(images, reconstructed),
    }


def jpeg_records(images: np.ndarray) -> list[Record]:
    records, pixels = [], math.prod(images.shape[:3])
    for name, quality in itertools.product(SUBSAMPLINGS, QUALITIES):
        size, file, decoded = jpeg(images, quality, name)
        measured = {
            "bpp": 8 * size / pixels,
            "bpp with headers": 8 * file / pixels,
            **errors(images, decoded),
        }
        config = common.describe(subsampling=name, quality=quality)
        for metric, value in measured.items():
            records.append(common.record("jpeg", metric, value, config=config))
    return records


def jpeg(
    images: np.ndarray, quality: int, subsampling: str
) -> tuple[int, int, np.ndarray]:
    """Bytes without and with headers, and the images that they decode to.

    In JPEG's favour: all images as one picture, so that there is one set of tables;
    from its bytes those of a picture of one colour are taken away, so that headers are
    free; Huffman tables are optimised; the smaller of baseline and progressive counts.
    """
    n, h, w, _ = images.shape
    tall = images.reshape(n * h, w, 3)
    flat = np.full_like(tall, 128)
    sizes = []
    for progressive in (False, True):
        settings = {
            "quality": quality,
            "subsampling": SUBSAMPLINGS[subsampling],
            "optimize": True,
            "progressive": progressive,
        }
        file = _jpeg_file(tall, settings)
        sizes.append((len(file) - len(_jpeg_file(flat, settings)), len(file)))
    decoded = np.asarray(Image.open(io.BytesIO(file)))
    stripped, whole = map(min, zip(*sizes, strict=True))
    return stripped, whole, decoded.reshape(images.shape)


def _jpeg_file(image: np.ndarray, settings: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


# What follows reads the stored result and nothing else.


def weights_of(result: Result, method: str) -> list[float]:
    """Weights of the distortion that were measured, ascending."""
    records = common.select(result["records"], method=method, metric="bpp")
    return sorted({_weight(r) for r in records})


def _weight(record: Record) -> float:
    return float(common.parse(record["config"])["distortion"])


def measured(result: Result, method: str, metric: str, weight: float) -> np.ndarray:
    """One number for each seed."""
    records = common.select(result["records"], method=method, metric=metric)
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
        for r in common.select(result["records"], method="jpeg")
        if common.parse(r["config"])["subsampling"] == subsampling
    ]
    return _ascending(
        common.values(some, metric="psnr"), common.values(some, metric=metric)
    )


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
                row.append(common.mean_sd(numbers, digits) if len(numbers) else "")
        if compared and weight in shared_weights(result):
            share = gap(result, weight) / objective(result, "fixed", weight)
            row.append(common.mean_sd(gap(result, weight), 4))
            row.append(common.mean_sd(share, 2, scale=100))
        elif compared:
            row += ["", ""]
        if jpeg_known(result):
            psnr = measured(result, methods[0], "psnr", weight).mean()
            bpp = math.exp(log_rate(jpeg_curves(result), psnr))
            row.append(f"{bpp:.3f}" if bpp == bpp else "")
        rows.append(row)
    return Table(columns, rows, _caption(result))


def jpeg_known(result: Result) -> bool:
    return bool(common.select(result["records"], method="jpeg"))


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
            common.mean_sd(against_jpeg(result, method), 1, scale=100),
        ]
        if method == "conditional":
            row.append(common.mean_sd(against_fixed(result), 1, scale=100))
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
            row.append("" if None in chosen else common.mean_sd(chosen, 3))
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
        f"PSNR it takes {common.mean_sd(rate)} % more bits (negative: fewer)."
    )


def seconds_of(result: Result, method: str) -> tuple[float, float]:
    """Seconds of a run, processor time on a CPU, and the number of runs."""
    cpu = result["meta"]["platform"] == "cpu"
    metric = "run_processor_seconds" if cpu else "run_seconds"
    (found,) = common.select(result["records"], method=method, metric=metric)
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
        f"Against JPEG at equal PSNR: {common.mean_sd(stripped, scale=100)} % bits, "
        f"{common.mean_sd(whole, scale=100)} % if JPEG's headers count."
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
        common.values(result["records"], method=method, metric="bpp")
        / common.values(result["records"], method=method, metric="entropy")
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


def examples(codec: coder.Codec, params: Params, source: Source, path: Path) -> None:
    """An image at three rates, above what JPEG makes of it with as many bytes."""
    image = most_detailed(source.test)
    pixels, jpegs = math.prod(image.shape[:3]), every_jpeg(image)
    tall = image.shape[1] / image.shape[2]
    drawing = Figure(figsize=(11, 5.4 * tall + 0.8), dpi=110, layout="compressed")
    panels = drawing.subplots(2, 4)
    panels[0, 0].imshow(image[0], interpolation="nearest")
    panels[0, 0].set_title("original, 24 bpp")
    panels[1, 0].axis("off")
    for column, weight in enumerate(task.grid(7)[[0, 2, 4]], start=1):
        coded = coder.compress(codec, params, weight, image)
        size, decoded = jpeg_of_size(image, jpegs, len(coded.data))
        for panel, name, data, shown in (
            (panels[0, column], "conditional", len(coded.data), coded.images),
            (panels[1, column], "JPEG", size, decoded),
        ):
            panel.imshow(shown[0], interpolation="nearest")
            panel.set_title(
                f"{name}: {8 * data / pixels:.2f} bpp, {task.psnr(image, shown):.1f} dB"
            )
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    drawing.savefig(path)


def most_detailed(images: np.ndarray) -> np.ndarray:
    """The image [1, h, w, 3] that JPEG needs the most bytes for."""
    sizes = [jpeg(images[i : i + 1], 75, "4:4:4")[0] for i in range(len(images))]
    return images[int(np.argmax(sizes))][None]


def every_jpeg(image: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Bytes without headers, and what they decode to."""
    settings = itertools.product(range(1, 96, 2), SUBSAMPLINGS)
    sizes, _, decoded = zip(*(jpeg(image, *s) for s in settings), strict=True)
    return list(zip(sizes, decoded, strict=True))


def jpeg_of_size(
    image: np.ndarray, jpegs: list[tuple[int, np.ndarray]], size: int
) -> tuple[int, np.ndarray]:
    """The best of at most this many bytes, or else the smallest."""
    fitting = [x for x in jpegs if x[0] <= size]
    if not fitting:
        return min(jpegs, key=lambda x: x[0])
    return max(fitting, key=lambda x: task.psnr(image, x[1]))
