"""PPO with every weighting that takes its losses: policy, value and entropy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, record, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.ppo import task
from benchmarks.tasks.ppo.methods import (
    CONSTANTS,
    LOSSES,
    PRIMARY,
    RETURN,
    SHARES,
    WHOLE,
)
from benchmarks.tasks.ppo.report import conclusions, figure, table

RESUMABLE = True
ENVIRONMENTS = ("CartPole-v1",)
SIZES = {
    "quick": task.Size(3, 4, 16, 1, 2, 16, 1e-3),
    "cpu": task.Size(500, 8, 64, 4, 4, 64, 3e-3),
    "gpu": task.Size(1000, 64, 64, 4, 4, 128, 1e-3),
}
QUICK = ("published", "share .1", "yoto", "upgrad")
LAST = 0.1  # of the updates: the episodes that count
UNFIT = ("static", "equal", "random", "ntk", "causal", "modo", "sdmgrad")
"""Constants are rows of their own; the others are for residuals, for time, or need a
second batch."""


def main(options: Options) -> None:
    options.refuse_data()
    size = SIZES[options.preset]
    if options.steps is not None:
        size = size._replace(updates=options.steps)
    made = weightings()
    chosen = options.choose(tuple(made), QUICK)
    units = Units(options)
    records: list[Record] = []
    for name in ENVIRONMENTS:
        environment = task.gym(name)
        for method in chosen:
            work = functools.partial(
                run, environment, size, method, made[method], name, options.seeds
            )
            records += units.do(f"{name}, {method}", work)
    settings = {"seeds": options.seeds, **size._asdict()}
    about = meta(options, **settings | {"seconds": units.seconds})
    result = write_json(options.out / "ppo.json", about, records)
    figure(result, options.out / "ppo.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'ppo.json'}, {options.out / 'ppo.png'}")


def weightings() -> dict[str, yoto.LossWeighting]:
    """The rows of the table, by name."""
    constant = lambda weights: yoto.weightings.static(
        dict(zip(LOSSES, weights, strict=True))
    )
    balance = functools.partial(yoto.weightings.grad_norm_balance, PRIMARY)
    fit = {
        name: method.example(PRIMARY)
        for name, method in yoto.weightings.methods().items()
        if name not in UNFIT and method.requires != "downstream"
    }
    return (
        {name: constant(weights) for name, weights in CONSTANTS.items()}
        | {name: balance(share=share) for name, share in SHARES.items()}
        | fit
    )


def run(
    environment: task.Environment,
    size: task.Size,
    method: str,
    weighting: yoto.LossWeighting,
    domain: str,
    seeds: int,
) -> list[Record]:
    """Train with all seeds side by side, and measure."""
    say(f"{domain}: {method}")
    train = functools.partial(task.train, environment, size, weighting)
    finished, curves = jax.jit(jax.vmap(train))(jnp.arange(seeds))
    episodes, total = np.asarray(curves.episodes), np.asarray(curves.total)
    last = max(1, round(LAST * size.updates))
    counts = {
        name: np.asarray(optax.tree.get(finished.weights, name))
        for name in ("num_updates", "num_skipped")
    }
    skipped = counts["num_skipped"] / np.maximum(1, sum(counts.values()))
    records = []
    for seed in range(seeds):
        measured: dict[str, Any] = {
            RETURN: mean_return(episodes[seed, -last:], total[seed, -last:]),
            WHOLE: mean_return(episodes[seed], total[seed]),
            "skipped": skipped[seed],
        }
        for k, name in enumerate(LOSSES):
            measured[f"weight:{name}"] = curves.weights[seed, -1, k]
        records += [
            record(method, metric, value, seed=seed, domain=domain)
            for metric, value in measured.items()
        ]
    return records


def mean_return(episodes: np.ndarray, total: np.ndarray) -> float:
    """Over the episodes that ended; nan if none did."""
    return total.sum() / episodes.sum() if episodes.sum() else float("nan")
