"""Image compression: one model for every rate against a model for each, and JPEG.

The losses are the rate (bits per pixel) and the distortion (mean squared error of
values from 0 to 255). What is compared are bytes of a range coder whose decoder gives
back the encoder's images exactly, not estimates.
"""

import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, describe, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.compression import coder, task
from benchmarks.tasks.compression.examples import examples
from benchmarks.tasks.compression.jpeg import jpeg
from benchmarks.tasks.compression.methods import METHODS, QUALITIES, SUBSAMPLINGS
from benchmarks.tasks.compression.report import (
    conclusions,
    figure,
    summary,
    table,
)
from benchmarks.tasks.compression.task import Params, Size, Source, Statistics

RESUMABLE = True
NAMES = {"conditional": "conditional", "fixed": "fixed", "jpeg": "JPEG"}

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
    units = Units(options, name)
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
    result = write_json(path, meta(options, **settings), records)
    written = [path]
    if methods == METHODS:
        figure(result, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    if "conditional" in methods:
        written.append(path.with_name(f"{path.stem}_examples.png"))
        _, _, params = trained["conditional"][0]
        examples(codec, params, source, written[-1])
    show(table(result))
    if methods == METHODS:
        show(summary(result))
        for sentence in conclusions(result):
            say(f"- {sentence}")
    say(f"Written: {', '.join(map(str, written))}")


# Runs.


def train(
    methods: Sequence[str],
    source: Source,
    stats: Statistics,
    size: Size,
    seeds: int,
    units: Units,
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

    for seed, method, weight in track(todo, "training"):
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
            record(method, metric, value, compute=len(weights[method]))
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
    units: Units,
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

    for _, seed, params, weight in track(asked, f"{method}: coding"):
        work = functools.partial(code, params, weight)
        measured = units.do(f"coding: {_unit(method, seed, weight)}", work)
        config = describe(distortion=weight)
        for metric, value in measured.items():
            records.append(record(method, metric, value, config=config, seed=seed))
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
        config = describe(subsampling=name, quality=quality)
        for metric, value in measured.items():
            records.append(record("jpeg", metric, value, config=config))
    return records
