"""One conditional model against a grid of models: fronts of two competing tasks.

Two overlapping digits have to be named by a network too narrow for both. A grid trains
one model per weighting of the two losses; a conditional model is trained once, for all
weightings. All are compared on source digits that no training saw, for the same number
of training steps in total and for the same number per model.
"""

import os
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, describe, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.pareto import task
from benchmarks.tasks.pareto.methods import (
    GRID,
    METHODS,
    MODELS,
    RAYS,
    REFERENCES,
    weightings,
)
from benchmarks.tasks.pareto.report import conclusions, figure, table
from benchmarks.tasks.pareto.task import TASKS
from yoto_jax import conditional

RESUMABLE = True
DOMAINS = ("validation", "test")


class Size(NamedTuple):
    """What a preset runs.

    Attributes:
      steps: Of one training run.
      budgets: How many runs' steps a method may take in all.
      pairs: Images in each evaluation.
    """

    steps: int
    budgets: tuple[int, ...]
    pairs: int


SIZES = {
    "quick": Size(20, (1, MODELS), 200),
    "cpu": Size(1500, (1, 3, MODELS), 4000),
    "gpu": Size(10_000, (1, 3, MODELS), 10_000),
}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    size = SIZES[options.preset]
    steps = options.steps or size.steps
    data = task.load(size.pairs)
    runs = [(method, budget) for budget in size.budgets[::-1] for method in methods]
    units = Units(options)

    def one(method: str, budget: int) -> Points:
        work = lambda: run(method, budget, options.seeds, steps, data)
        return units.do(f"{method}, {budget}", work)

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(one, *zip(*runs, strict=True))  # each takes about one core
        points = dict(zip(track(runs, "pareto"), outcomes, strict=True))
    records = [r for method in methods for r in size_records(method, data.train)]
    for method, budget in runs:
        records += measure(method, budget, points)
    result = write_json(
        options.out / "pareto.json",
        meta(
            options,
            steps=steps,
            seeds=options.seeds,
            batch=task.BATCH,
            widths=list(task.WIDTHS),
            references=REFERENCES,
            source_digits=len(data.train.labels),
            test_images=size.pairs,
        ),
        records,
        fronts=[
            front
            for (method, budget), found in points.items()
            for front in stored(method, budget, found["test"][weightings(method)])
        ],
    )
    figure(result, options.out / "pareto.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'pareto.json'}, {options.out / 'pareto.png'}")


# Runs.

Points = dict[str, dict[int, Any]]
"""By domain and number of weightings: metrics by task, arrays (seeds, weightings)."""


def run(method: str, budget: int, seeds: int, steps: int, data: task.Data) -> Points:
    """Train a method for all seeds, and measure it."""
    how = METHODS[method]
    domains = {"validation": data.validation, "test": data.test}
    if how is None:
        models = weightings(method)
        params = task.train(
            None,
            jnp.repeat(jnp.arange(seeds), models),
            jax.tree.map(lambda w: jnp.tile(w, seeds), task.rays(models)),
            max(1, budget * steps // models),
            data.train,
        )
        by_seed = lambda x: np.reshape(x, (seeds, models))
        return {
            domain: {models: jax.tree.map(by_seed, task.evaluate(params, batch))}
            for domain, batch in domains.items()
        }
    unused = dict.fromkeys(TASKS, jnp.zeros(seeds))
    params = task.train(how, jnp.arange(seeds), unused, budget * steps, data.train)
    every = jax.tree.map(lambda *x: np.concatenate(x), *map(task.rays, (MODELS, RAYS)))
    points: Points = {}
    for domain, batch in domains.items():
        found = jax.device_get(task.sweep(params, batch, every))
        points[domain] = {
            MODELS: jax.tree.map(lambda x: x[:, :MODELS], found),
            RAYS: jax.tree.map(lambda x: x[:, MODELS:], found),
        }
    return points


# Records.


def size_records(method: str, source: task.Digits) -> list[Record]:
    """Parameters of one model, and what one of its training steps costs."""
    how = METHODS[method]
    shapes = jax.eval_shape(
        lambda: task.init(jax.random.key(0), task.encoding_size(how))
    )
    measured = {
        "parameters": task.parameters(shapes),
        "cost of a step": task.flops(how, source) / task.flops(None, source),
    }
    return [record(method, name, value) for name, value in measured.items()]


def measure(
    method: str, budget: int, points: dict[tuple[str, int], Points]
) -> list[Record]:
    """All numbers of one method with one budget."""
    records = []
    for domain, by_count in points[method, budget].items():
        for n, found in by_count.items():
            grid = points.get((GRID, max(b for _, b in points)))
            for seed in range(len(found["ce"][TASKS[0]])):
                of_seed = lambda tree, seed=seed: jax.tree.map(lambda x: x[seed], tree)
                measured = quality(of_seed(found))
                if n == MODELS:
                    measured |= calibration(of_seed(found)["ce"])
                    if grid is not None:
                        measured |= excess(
                            of_seed(found)["ce"], of_seed(grid[domain][n])["ce"]
                        )
                records += [
                    record(
                        method,
                        metric,
                        value,
                        config=describe(weightings=n),
                        seed=seed,
                        domain=domain,
                        compute=budget,
                    )
                    for metric, value in measured.items()
                ]
    return records


def quality(found: Any) -> dict[str, Any]:
    """What a set of points (n,) is worth."""
    reaches = [found["ce"][name] < REFERENCES["ce"] for name in TASKS]
    return {
        "hypervolume": conditional.hypervolume(found["ce"], REFERENCES["ce"]),
        "hypervolume of errors": conditional.hypervolume(
            found["error"], REFERENCES["error"]
        ),
        "on the front": conditional.pareto_front(found["ce"]).sum(),
        "within the reference": np.logical_and(*reaches).sum(),
    } | {f"lowest {name}": found["ce"][name].min() for name in TASKS}


def calibration(losses: Any) -> dict[str, Any]:
    """Whether each weighting is served best by the model that was told it."""
    weights = task.rays(MODELS)
    matrix = np.asarray(conditional.cross_matrix(losses, weights))
    own = np.diagonal(matrix)
    best = np.arange(MODELS) == matrix.argmin(axis=1)
    violations = conditional.monotonicity_violations(losses, weights)
    return {
        "row minima on the diagonal": best.mean(),
        "regret": (own - matrix.min(axis=1)).mean(),
        "largest violation of monotonicity": violations.max(),
    }


def excess(losses: Any, of_grid: Any) -> dict[str, float]:
    """Weighted losses above those of the grid with a full run per model."""
    gap = np.asarray(conditional.gap(losses, of_grid, task.rays(MODELS)))
    return {"mean gap": gap.mean(), "largest gap": gap.max()}


def stored(method: str, budget: int, found: Any) -> list[dict[str, Any]]:
    """The points of each seed, for the figure."""
    rounded = lambda x: [float(f"{v:.4g}") for v in x]
    return [
        {
            "method": method,
            "runs": budget,
            "seed": seed,
            **{name: rounded(found["ce"][name][seed]) for name in TASKS},
            **{f"{name} error": rounded(found["error"][name][seed]) for name in TASKS},
        }
        for seed in range(len(found["ce"][TASKS[0]]))
    ]
