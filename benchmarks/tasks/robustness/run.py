"""Bad batches: what one loss in a hundred gone wrong does to every weighting.

Three losses, 10,000 steps, a fault in one per cent of the losses. Every method runs
twice: with what Optax has (``optax.apply_if_finite`` around a clipped optimizer), and
with ``skip_outliers`` around weighting and optimizer. What counts are the weights at
the end, against those of the clean run on the same batches.
"""

import functools
import os
import time
from concurrent import futures

import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.tasks.robustness import task
from benchmarks.tasks.robustness.methods import LOST, PROTECTIONS, config_of
from benchmarks.tasks.robustness.report import conclusions, table

STEPS = {"quick": 300, "cpu": 10_000, "gpu": 10_000}
QUICK = ("yoto", "gradnorm", "upgrad", "every(imtl_g)", "layer 1, adamw, rho=20")
FLOOR = 0.01  # of the largest weight: deviations of smaller ones are relative to this


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(task.METHODS, QUICK)
    steps = options.steps or STEPS[options.preset]
    start, processor = time.perf_counter(), time.process_time()
    runs = [(method, protection) for method in methods for protection in PROTECTIONS]
    one = functools.partial(_run, steps=steps)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(one, *zip(*runs, strict=True))
        tracked = track(runs, "robustness")
        done = dict(zip(tracked, outcomes, strict=True))
    records: list[Record] = []
    for (method, protection), outcome in done.items():
        records += measure(method, protection, outcome)
    about = meta(
        options,
        steps=steps,
        probability=task.PROBABILITY,
        losses=len(task.NAMES),
        seconds=round(time.perf_counter() - start),
        processor_seconds=round(time.process_time() - processor),
    )
    path = options.out / "robustness.json"
    result = write_json(path, about, records)
    show(table(result))
    for sentence in conclusions(result):
        say(sentence)
    say(f"Results: {path}")


def _run(method: str, protection: str, steps: int) -> task.Outcome:
    return task.run(method, protection == "skip_outliers", steps)


def measure(method: str, protection: str, outcome: task.Outcome) -> list[Record]:
    """Records of every stream; what is not there is 0."""
    records = []
    for place, stream in enumerate(task.STREAMS):
        weights, earlier = outcome.weights[place], outcome.earlier[place]
        measured = {
            "weights": deviation(weights, outcome.weights[0]),
            "losses": deviation(outcome.losses[place], outcome.losses[0]),
            "state broke": outcome.state_broke[place],
            "training broke": outcome.training_broke[place],
            "skipped": outcome.skipped[place],
            "not stepped": outcome.not_stepped[place],
        }
        if stream == "clean":
            measured["weights earlier"] = deviation(earlier, weights)
            measured |= {
                f"weight {name}": weights[k] for k, name in enumerate(task.NAMES)
            }
        config = config_of(protection, stream)
        records += [
            record(method, metric, value, config=config)
            for metric, value in measured.items()
            if value != 0
        ]
    return records


def deviation(values: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative difference of an entry."""
    scale = np.maximum(np.abs(reference), FLOOR * np.abs(reference).max())
    worst = np.max(np.abs(values - reference) / scale)
    return float(min(worst, LOST)) if np.isfinite(worst) else LOST
