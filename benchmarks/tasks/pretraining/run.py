"""Self-supervised pretraining: weights that follow few labels against a search.

VICReg has three losses. Every method trains the same encoder with the same seeds,
batches and views. A search chooses by cross-validation on the few labelled training
images; alignment (GraP) is steered by the same labels in its only run. The test images
choose nothing.
"""

import functools
import itertools
from typing import Any

import numpy as np

import yoto_jax as yoto
from benchmarks.harness import searches
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import (
    Record,
    describe,
    record,
    thinned_curves,
    write_json,
)
from benchmarks.harness.searches import ORACLE, VALIDATED
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.pretraining import task
from benchmarks.tasks.pretraining.methods import (
    ALIGNED,
    CLOSED,
    EQUAL,
    FIXED,
    GRAP,
    PLAIN,
    PROBE,
    SEARCHES,
)
from benchmarks.tasks.pretraining.report import conclusions, figure, summary, table

RESUMABLE = True
STEPS = {"quick": 10, "cpu": 1000, "gpu": 10_000}
DRAWS = {"quick": 3, "cpu": 20, "gpu": 20}
ROUNDS = {"quick": 2, "cpu": 15, "gpu": 15}
GRID = tuple((1.0, v, c) for v, c in itertools.product((0.1, 1, 10), (0.01, 0.1, 1)))
"""Weights of invariance, variance and covariance."""

HISTORY_POINTS = 100

weightings = yoto.weightings
_aligned = functools.partial(task.Method, shared=True, downstream=True)
_shared = functools.partial(task.Method, shared=True)


def _grap(_: Any) -> yoto.LossWeighting:
    """With the settings of the published runs."""
    return weightings.grap(
        task.DOWNSTREAM,
        regularization=1.0,
        gramian_decay=0.0,
        norm_decay=0.99,
        warmup=100,
    )


LEARNED = {
    GRAP: _aligned(_grap),
    PLAIN: _aligned(_grap, weigh_heads=False),
    CLOSED: _aligned(
        lambda _: weightings.grap_closed_form(
            task.DOWNSTREAM,
            gramian_decay=0.99,
            norm_decay=0.99,
            warmup=100,
        )
    ),
    "gradnorm": _shared(lambda _: weightings.gradnorm()),
    "dwa": task.Method(lambda _: weightings.dwa(window=50)),
    "mgda": _shared(lambda _: weightings.mgda()),
    "pcgrad": _shared(lambda _: weightings.pcgrad()),
}
METHODS = (*ALIGNED, *FIXED, *SEARCHES, *(m for m in LEARNED if m not in ALIGNED))


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    steps = options.steps or STEPS[options.preset]
    setup, data = task.load(options.data)
    draws = DRAWS[options.preset]
    records: list[Record] = []
    history: list[dict[str, Any]] = []
    path = options.out / _file_name(setup)
    units = Units(options, path.stem)
    for method in methods:
        work = functools.partial(
            finish, method, setup, data, options.seeds, steps, draws
        )
        found = units.do(method, work)
        records += found["records"]
        history += found["history"]
    work = functools.partial(costs, methods, setup, data, options, steps)
    records += units.do(f"costs of {', '.join(methods)}", work)
    settings = {
        "data": setup.name,
        "training_images": len(data.labels),
        "labelled_images": len(data.labelled),
        "test_images": len(data.test_labels),
        "classes": data.classes,
        "steps": steps,
        "seeds": options.seeds,
        "batch": setup.batch,
    }
    result = write_json(path, meta(options, **settings), records, history=history)
    figure(result, path.with_suffix(".png"))
    show(table(result), summary(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {path}, {path.with_suffix('.png')}")


def _file_name(setup: task.Task) -> str:
    suffix = "" if setup is task.DIGITS else f"_{setup.name}"
    return f"pretraining{suffix}.json"


# Runs.


def constant_weights(method: str, seeds: int, draws: int) -> np.ndarray:
    """The weights [seeds, runs, 3] of the runs of a method; ones if it learns them."""
    if method == "random":
        return np.stack([random_weights(seed, draws) for seed in range(seeds)])
    weights = GRID if method == "grid" else [FIXED.get(method, (1.0, 1.0, 1.0))]
    return np.tile(np.array(weights), (seeds, 1, 1))


def random_weights(seed: int, draws: int) -> np.ndarray:
    """Log-uniform from 0.01 to 100 times the weight of the invariance."""
    rng = np.random.default_rng([seed, 2**31])
    ratios = 10.0 ** rng.uniform(-2, 2, (draws, 2))
    return np.concatenate([np.ones((draws, 1)), ratios], axis=1)


def run(
    method: str,
    setup: task.Task,
    data: task.Data,
    seeds: int,
    steps: int,
    draws: int,
) -> tuple[task.Outcome, list[Record]]:
    """Train and measure all runs of a method."""
    weights = constant_weights(method, seeds, draws)
    rule = LEARNED.get(method, task.FIXED)
    total = weights.shape[1]
    # One after the other, with all seeds: so all share the one compiled program.
    outcomes = [
        task.train(
            setup, data, rule, weights[:, [i]], steps, f"{method} {i + 1}/{total}"
        )
        for i in range(total)
    ]
    measured = _concatenated([measure(setup, data, o) for o in outcomes])
    records = []
    for seed in range(seeds):
        for i in range(total):
            config = config_of(weights[seed, i]) if rule is task.FIXED else ""
            records += _run_records(method, config, seed, i, measured)
        if method in SEARCHES:
            for config, i in selections(measured, seed).items():
                cost = total if config in (VALIDATED, ORACLE) else 1
                records += _run_records(method, config, seed, i, measured, cost)
    seconds = sum(outcome.run_seconds for outcome in outcomes) / seeds
    records.append(record(method, "run_seconds", seconds, compute=total))
    return outcomes[0], records


def finish(method: str, *how: Any) -> dict[str, Any]:
    """What is kept of a method."""
    outcome, records = run(method, *how)
    history = thinned(method, outcome) if method in ALIGNED else []
    return {"records": records, "history": history}


def config_of(weights: np.ndarray) -> str:
    return describe(**dict(zip(task.LOSSES, weights, strict=True)))


Measured = dict[str, np.ndarray]
"""Values [seeds, runs] by metric."""


def measure(setup: task.Task, data: task.Data, outcome: task.Outcome) -> Measured:
    measured = task.probe(setup, data, outcome.model)
    shares = effective(outcome.weights)
    last = max(1, outcome.losses[task.LOSSES[0]].shape[-1] // 20)
    for name in task.LOSSES:
        measured[f"weight:{name}"] = shares[name][..., -last:].mean(-1)
        measured[f"loss:{name}"] = outcome.losses[name][..., -last:].mean(-1)
    return measured


def effective(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights brought to the sum 1, which is all that Adam sees of them."""
    total = sum(np.abs(weights[name]) for name in task.LOSSES)
    return {name: weights[name] / np.maximum(total, 1e-30) for name in task.LOSSES}


def _concatenated(parts: list[Measured]) -> Measured:
    return {
        metric: np.concatenate([part[metric] for part in parts], axis=1)
        for metric in parts[0]
    }


def _run_records(
    method: str, config: str, seed: int, i: int, measured: Measured, cost: float = 1
) -> list[Record]:
    return [
        record(method, metric, of_runs[seed, i], config=config, seed=seed, compute=cost)
        for metric, of_runs in measured.items()
    ]


def selections(measured: Measured, seed: int) -> dict[str, int]:
    """Which run of a search each way of choosing takes."""
    return searches.selections(measured["validation"][seed], measured[PROBE][seed])


def costs(
    methods: tuple[str, ...],
    setup: task.Task,
    data: task.Data,
    options: Options,
    steps: int,
) -> list[Record]:
    """What a step of each method costs, relative to one with constant weights."""
    rules = {EQUAL: task.FIXED} | {m: LEARNED[m] for m in methods if m in LEARNED}
    rounds = task.step_seconds(
        setup, data, rules, options.seeds, steps, ROUNDS[options.preset]
    )
    seen = list(rounds)
    # The fastest round is the one that others on the machine disturbed the least.
    fastest = {m: min(seconds[m] for seconds in seen) for m in rules}
    return [
        record(m, "step_ratio", fastest[m if m in rules else EQUAL] / fastest[EQUAL])
        for m in methods
    ]


def thinned(method: str, outcome: task.Outcome) -> list[dict[str, Any]]:
    """Effective weights and losses over time, averaged over stretches of steps."""
    kinds = {"weights": effective(outcome.weights), "losses": outcome.losses}

    def of_seed(seed: int) -> dict[str, Any]:
        curves = {
            kind: {name: curve[seed, 0] for name, curve in named.items()}
            for kind, named in kinds.items()
        }
        return thinned_curves(curves, HISTORY_POINTS)

    seeds = range(len(outcome.weights[task.LOSSES[0]]))
    return [{"method": method, "seed": seed, **of_seed(seed)} for seed in seeds]
