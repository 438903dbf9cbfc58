"""Choices learned with the model, against all architectures trained one by one.

Each architecture is a lane of one program. What the searches choose is judged by the
architecture's mean accuracy over all seeds that were trained for themselves: so the
retraining is one of the same kind for all, and no search is lucky in it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, describe, record, rounded, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.choices import task
from benchmarks.tasks.choices.methods import (
    FIXED,
    METHODS,
    ONE_BY_ONE,
    RANDOM,
    RUNS,
    SCHEDULES,
    SMALLER,
    SOURCES,
    WAYS,
    config_of,
    name_of,
    random_config,
)
from benchmarks.tasks.choices.report import conclusions, figure, table

PyTree = Any

RESUMABLE = True
SIZES = {
    "quick": task.Size(60, 40, 40, 4, 8, 4, 1, 1e-2, 2),
    "cpu": task.Size(2000, 1000, 4000, 1000, 64, 32, 2, 1e-2, 20),
    "gpu": task.Size(4000, 2000, 8000, 10_000, 128, 64, 3, 1e-2, 20),
}
QUICK = (name_of("held-out", "straight_through"),)
TWICE = 2  # seeds of which the architectures are trained for twice the steps, too


def main(options: Options) -> None:
    options.refuse_data()
    size = SIZES[options.preset]
    if options.steps is not None:
        steps = options.steps
        points = next(n for n in range(size.points, 0, -1) if steps % n == 0)
        size = size._replace(steps=steps, points=points)
    methods = options.choose(METHODS, QUICK)
    units = Units(options, size=list(size))
    data = task.data_of(size)
    alone = _alone(size, data, options.seeds, units)
    records, regret = one_by_one(alone)
    records += _twice(size, data, min(TWICE, options.seeds), units)
    records += random_search(alone["validation"], regret)
    inside = smaller_space()
    less = regrets(alone["validation"].mean(0), alone["test"].mean(0), inside)
    records += random_search(alone["validation"][:, inside], less[inside], smaller=True)
    history: list[dict[str, Any]] = []
    for source in SOURCES:
        for way in WAYS:
            if name_of(source, way) in methods:
                work = functools.partial(
                    _search, size, data, source, way, options.seeds
                )
                found = units.do(name_of(source, way), work)
                records += searched(source, way, found, regret)
                history += _history(source, way, found, size)
                work = functools.partial(
                    _search, size, data, source, way, options.seeds, smaller=True
                )
                found = units.do(f"{name_of(source, way)}, smaller", work)
                records += searched(source, way, found, less, smaller=True)
    records += units.do("costs", functools.partial(costs, size, data))
    settings = size._asdict() | {"seeds": options.seeds, "seconds": units.seconds}
    result = write_json(
        options.out / "choices.json",
        meta(options, **settings),
        records,
        history=history,
    )
    figure(result, options.out / "choices.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'choices.json'}, {options.out / 'choices.png'}")


# All architectures.


def _alone(
    size: task.Size, data: task.Data, seeds: int, units: Units
) -> dict[str, np.ndarray]:
    """Accuracies of all architectures by part of the data, [seeds, architectures]."""
    train = _lanes(size)

    def of_seed(seed: int) -> dict[str, np.ndarray]:
        say(f"all architectures, seed {seed}")
        trained = train(data, jnp.int32(seed), task.one_hot())
        return jax.tree.map(np.asarray, trained.after | {"curve": trained.curve})

    found = [
        units.do(f"architectures, seed {seed}", functools.partial(of_seed, seed))
        for seed in range(seeds)
    ]
    return {name: np.stack([x[name] for x in found]) for name in found[0]}


def _lanes(size: task.Size) -> Any:
    train = functools.partial(task.train_one, size)
    return jax.jit(jax.vmap(train, in_axes=(None, None, 0)))


def architecture(place: int) -> str:
    return describe(**dict(zip(task.CHOICES, task.ARCHITECTURES[place], strict=True)))


def one_by_one(alone: dict[str, np.ndarray]) -> tuple[list[Record], np.ndarray]:
    """Records of all architectures, and the regret of each."""
    records = [
        record(ONE_BY_ONE, part, value, config=architecture(place), seed=seed)
        for part in ("train", "validation", "test")
        for (seed, place), value in np.ndenumerate(alone[part])
    ]
    half = alone["curve"].shape[-1] // 2
    for (seed, place), value in np.ndenumerate(alone["curve"][..., half - 1]):
        records.append(
            record(
                ONE_BY_ONE,
                "validation, half way",
                value,
                config=architecture(place),
                seed=seed,
            )
        )
    return records, regrets(alone["validation"].mean(0), alone["test"].mean(0))


def regrets(
    validation: np.ndarray, test: np.ndarray, inside: np.ndarray | None = None
) -> np.ndarray:
    """Of each architecture: the test of the one that validates best, minus its own.

    The best one is among those ``inside``, if they are given.
    """
    inside = np.arange(len(test)) if inside is None else inside
    return test[inside[np.argmax(validation[inside])]] - test


def smaller_space() -> np.ndarray:
    """Places of the architectures that have the options that are given."""
    names = list(task.CHOICES)
    return np.array(
        [
            place
            for place, options in enumerate(task.ARCHITECTURES)
            if all(options[names.index(n)] == option for n, option in FIXED.items())
        ]
    )


def _twice(size: task.Size, data: task.Data, seeds: int, units: Units) -> list[Record]:
    """Does it level off? All architectures, trained for twice the steps."""
    train = _lanes(size._replace(steps=2 * size.steps))

    def of_seed(seed: int) -> np.ndarray:
        say(f"all architectures, twice the steps, seed {seed}")
        return np.asarray(train(data, jnp.int32(seed), task.one_hot()).after["test"])

    return [
        record(ONE_BY_ONE, "test, twice", value, config=architecture(place), seed=seed)
        for seed in range(seeds)
        for place, value in enumerate(
            units.do(f"twice, seed {seed}", functools.partial(of_seed, seed))
        )
    ]


def random_search(
    validation: np.ndarray, regret: np.ndarray, smaller: bool = False
) -> list[Record]:
    """The expected regret of the best by validation of n, for every n; exact.

    Of n architectures drawn without replacement out of N, that of rank r is the best
    with probability C(N - r, n - 1) / C(N, n).
    """
    records = []
    for seed, scores in enumerate(validation):
        ranked = regret[np.argsort(-scores, kind="stable")]
        total = len(ranked)
        for n in range(1, total + 1):
            chance = np.array(
                [math.comb(total - r, n - 1) for r in range(1, total + 1)], float
            ) / math.comb(total, n)
            value = chance @ ranked
            config = random_config(n, smaller)
            records.append(
                record(RANDOM, "regret", value, config=config, seed=seed, compute=n)
            )
    return records


# Choices that are learned.


def _search(
    size: task.Size,
    data: task.Data,
    source: str,
    way: Any,
    seeds: int,
    smaller: bool = False,
) -> dict[str, Any]:
    """All seeds and schedules side by side; [seeds, schedules] of everything."""
    say(f"choices: {name_of(source, way)}{', smaller space' if smaller else ''}")
    schedules = (SMALLER,) if smaller else SCHEDULES
    temperatures = jnp.array([schedule.temperature for schedule in schedules])
    decays = jnp.array([schedule.decay for schedule in schedules])
    fixed = FIXED if smaller else None
    run = functools.partial(task.search, size, data, source, way, fixed=fixed)
    each = jax.vmap(jax.vmap(run, in_axes=(None, 0, 0)), in_axes=(0, None, None))
    trained = jax.jit(each)(jnp.arange(seeds), temperatures, decays)
    return jax.tree.map(np.asarray, trained)._asdict()


def searched(
    source: str,
    way: str,
    found: dict[str, Any],
    regret: np.ndarray,
    smaller: bool = False,
) -> list[Record]:
    """Records of one way to choose, for every schedule and seed."""
    schedules = (SMALLER,) if smaller else SCHEDULES
    records = []
    for (seed, k), place in np.ndenumerate(found["architecture"]):
        measured = {"architecture": place, "regret": regret[place]}
        for when in ("before", "after"):
            for part, values in found[when].items():
                measured[f"{when}: {part}"] = values[seed, k]
        for choice, curves in found["probabilities"].items():
            measured[f"certainty: {choice}"] = curves[seed, k, -1].max()
        records += [
            record(
                name_of(source, way),
                metric,
                value,
                config=config_of(schedules[k].name, smaller),
                seed=seed,
                compute=RUNS[source],
            )
            for metric, value in measured.items()
        ]
    return records


def _history(
    source: str, way: str, found: dict[str, Any], size: task.Size
) -> list[dict[str, Any]]:
    """Probabilities of the options over the steps, means over seeds."""
    points = size.steps // size.points * np.arange(1, size.points + 1)
    return [
        {
            "method": name_of(source, way),
            "schedule": schedule.name,
            "step": points.tolist(),
            "probabilities": {
                choice: [[rounded(p) for p in row] for row in curves[:, k].mean(0)]
                for choice, curves in found["probabilities"].items()
            },
        }
        for k, schedule in enumerate(SCHEDULES)
    ]


def costs(size: task.Size, data: task.Data) -> list[Record]:
    """Floating-point operations of a gradient, by the compiler's count.

    Of the mixture, of the hardened network, and of one whose index is an array.
    """
    model = task.init_model(jax.random.key(0), size)
    batch = jax.tree.map(lambda x: x[: size.batch], data.train)
    soft = task.decided(task.init_choices())

    def flops(choices: PyTree) -> float:
        grad = jax.jit(jax.grad(task.cross_entropy))
        return grad.lower(model, choices, batch).compile().cost_analysis()["flops"]

    each = [flops(task.hard(architecture)) for architecture in task.balanced()]
    found = {"mixture": flops(soft), "architecture": float(np.mean(each))}
    return [record(f"gradient of the {what}", "flops", n) for what, n in found.items()]
