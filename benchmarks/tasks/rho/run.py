"""The strength of the regulariser: what rho and epsilon do to the loss weights.

A study of digits under shift that looks at training and validation images alone. It is
the evidence for the default rho of the library.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.digits import task
from benchmarks.tasks.rho.methods import EPSILON, EPSILONS, METHODS, Entropy, config_of
from benchmarks.tasks.rho.report import conclusions, figure, table

RESUMABLE = True
STEPS = {  # AdamW moves a logit by a learning rate a step: it takes longer to arrive.
    "quick": {"adamw": 20, "sgdw": 20},
    "cpu": {"adamw": 6000, "sgdw": 2000},
    "gpu": {"adamw": 60_000, "sgdw": 20_000},
}
Optimizer = Callable[..., optax.GradientTransformation]
OPTIMIZERS: dict[str, Optimizer] = {"adamw": yoto.adamw, "sgdw": yoto.sgdw}
LEARNING_RATES = {"adamw": 1e-3, "sgdw": 0.2}
RHOS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 20, 30, 100, 200)
QUICK_RHOS = (0, 1, 20)


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(METHODS)
    steps = {m: options.steps or STEPS[options.preset][m] for m in methods}
    rhos = QUICK_RHOS if options.preset == "quick" else RHOS
    pairs = list(itertools.product(EPSILONS, rhos))
    fewer = [(EPSILON, rho) for rho in rhos]
    data = task.load()
    records = task.regulariser_records("all") + task.regulariser_records("auxiliary")
    units = Units(options)

    def done(
        method: str, entropy: Entropy, pairs: list[Any], grid: tuple[Any, ...]
    ) -> list[Record]:
        size = (options.seeds, steps[method])
        work = lambda: list(run(method, entropy, pairs, grid, data, *size))
        return units.do(f"{method}, {entropy}", work)

    for method in methods:
        records += done(method, "all", pairs, task.GRID)
        records += done(method, "auxiliary", fewer, ())
    settings = {
        "steps": steps,
        "seeds": options.seeds,
        "batch": task.BATCH,
        "learning_rates": LEARNING_RATES,
        "rhos": rhos,
    }
    result = write_json(options.out / "rho.json", meta(options, **settings), records)
    figure(result, options.out / "rho.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'rho.json'}, {options.out / 'rho.png'}")


# Runs.


def run(
    method: str,
    entropy: Entropy,
    pairs: Sequence[tuple[float, float]],
    grid: Sequence[tuple[float, ...]],
    data: task.Data,
    seeds: int,
    steps: int,
) -> Iterator[Record]:
    """Learn the weights for pairs of epsilon and rho, with the grid alongside."""

    def optimizer(rho: jax.Array) -> optax.GradientTransformation:
        return OPTIMIZERS[method](
            LEARNING_RATES[method], hyperparameter_decay=rho, entropy=entropy
        )

    runs = task.learned(pairs, seeds)
    configs = [config_of(rho, epsilon, entropy) for epsilon, rho in pairs]
    if grid:
        fixed = task.fixed(jnp.array(grid), seeds)
        runs = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), runs, fixed)
        configs += map(task.describe_ratios, grid)
    description = f"{method}, entropy over {entropy} losses"
    outcome = task.train(data.train, optimizer, runs, steps, description)
    domains = task.validation_domains(data.validation)
    measured: task.Measured = {}
    for name, weights in outcome.weights.items():
        measured[f"weight:{name}", None] = weights[..., -1]
    for name, accuracy in task.accuracy(outcome.model, domains).items():
        measured["accuracy", f"validation {name}"] = accuracy
    for seed, (i, config) in itertools.product(range(seeds), enumerate(configs)):
        yield from task.run_records(method, config, seed, i, measured)
