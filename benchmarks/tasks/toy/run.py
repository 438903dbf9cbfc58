"""Two losses of two parameters: where each method meets the Pareto front, if it does.

The problem of Liu et al. (2021), with the first loss ten times smaller as in Navon et
al. (2022): a valley with steep walls and losses of different scale, from five starts.
Every method steps with Adam along its weighted gradient. On the front that gradient is
zero for some methods; where it is only small, Adam still makes full steps along it.
"""

import os
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.toy.report import figure, table
from benchmarks.tasks.toy.task import STARTS, Array, front, losses_of, start_of

Build = Callable[[Array], yoto.LossWeighting]

RESUMABLE = True
LOWER_BOUNDS = (-2.1, -21.0)
LEARNING_RATE = 1e-3
STEPS = {"quick": 500, "cpu": 50_000, "gpu": 50_000}
POINTS = 100  # of a trajectory, for the figure


def above_bounds(weighting: yoto.LossWeighting) -> yoto.LossWeighting:
    """For weightings of positive losses: shows them the losses above their bounds."""

    def update(losses: tuple[Array, ...], state: Any, **statistics: Array) -> Any:
        shifted = jax.tree.map(jnp.subtract, losses, LOWER_BOUNDS)
        return weighting.update(shifted, state, **statistics)

    return weighting._replace(update=update)


w = yoto.weightings
LEFT_OUT = {
    "static": "its weights are the user's",
    "causal": "for losses in the order of time",
    "ntk": "for residuals at many points",
    "modo": "as moco, without noise",
    "sdmgrad": "needs two batches a step",
    "ntk_surrogate": "for mean squares of residuals",
    "lr_annealing": "for the residual of an equation",
    "inverse_dirichlet": "for gradients of more entries than two",
    "geometric": "as scale_invariant, but for the length of the gradient",
    "imtl_l": "as uncertainty, but for the length of the gradient",
    "dwa": "for averages of epochs",
    "softadapt": "for averages of epochs",
    "relobralo": "for averages of epochs",
    "cov": "for batches that differ",
    "slaw": "for batches that differ",
    "grap": "no loss steers the others",
    "grap_closed_form": "no loss steers the others",
    "softmax_alignment": "no loss steers the others",
    "auto_lambda": "no loss steers the others",
}
OWN: dict[str, Build] = {
    "equal": lambda key: w.equal(reduction="sum"),
    "random": lambda key: w.random(key=key),
    "yoto": lambda key: w.yoto(None),
    "stch": lambda key: w.stch(ideal=LOWER_BOUNDS),
    "epo": lambda key: w.epo(ideal=LOWER_BOUNDS),
    "famo": lambda key: w.famo(lower_bounds=LOWER_BOUNDS, gamma=0.0),
    "cagrad": lambda key: w.cagrad(c=0.4),
}


def usual(method: yoto.weightings.Method) -> Build:
    """With its defaults, above the lower bounds if it needs positive losses."""
    if method.accepts == "any":
        return lambda key: method.example()
    return lambda key: above_bounds(method.example())


METHODS: dict[str, Build] = {
    name: OWN.get(name) or usual(method)
    for name, method in w.methods().items()
    if name not in LEFT_OUT
}
STOCHASTIC = ("random",)  # PCGrad and GradVac draw an order: of two losses there is one


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    steps = options.steps or STEPS[options.preset]
    records: list[Record] = []
    trajectories = []
    units = Units(options)
    one = lambda method: units.do(method, lambda: run(method, options.seeds, steps))
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(one, methods)  # Each takes one core, hardly more.
        every = dict(zip(track(methods, "toy"), outcomes, strict=True))
    seconds = units.seconds
    for method, paths in every.items():
        records += measure(method, paths[:, :, -1])
        drawn = np.round(paths[0], 2).tolist()
        trajectories.append({"method": method, "paths": drawn})
    result = write_json(
        options.out / "toy.json",
        meta(options, steps=steps, seeds=options.seeds, seconds=round(seconds)),
        records,
        trajectories=trajectories,
    )
    figure(result, options.out / "toy.png")
    show(table(result))
    say(f"Written: {options.out / 'toy.json'}, {options.out / 'toy.png'}")


def distance(x: np.ndarray) -> np.ndarray:
    """From points (..., 2) to the nearest one of the front."""
    x1 = np.linspace(-7, 7, 2801)
    curve = np.stack([x1, front(x1)], axis=-1)
    return np.linalg.norm(x[..., None, :] - curve, axis=-1).min(axis=-1)


# Runs.


def run(method: str, seeds: int, steps: int) -> np.ndarray:
    """Trajectories (seeds, starts, points, 2); one seed if there is no randomness."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), seeds if method in STOCHASTIC else 1)
        descend = lambda key, start: trajectory(METHODS[method](key), start, steps)
        every_start = jax.vmap(descend, in_axes=(None, 0))
        every_seed = jax.vmap(every_start, in_axes=(0, None))
        return np.asarray(jax.jit(every_seed)(keys, jnp.array(STARTS)))


def trajectory(weighting: yoto.LossWeighting, start: Array, steps: int) -> Array:
    """Points (POINTS + 1, 2) of a run, evenly spread from its start to its end."""
    tx = optax.adam(LEARNING_RATE)

    def step(_: Array, carry: tuple) -> tuple:
        x, tx_state, state = carry
        losses, jacobian = losses_of(x), jax.jacobian(losses_of)(x)
        weights, state = weighting.update(
            tuple(losses), state, **_statistics(weighting, jacobian)
        )
        direction = jnp.stack(jax.tree.leaves(weights)) @ jacobian
        updates, tx_state = tx.update(direction, tx_state, x)
        x = optax.apply_updates(x, updates)
        if weighting.observe_step is not None:
            state = weighting.observe_step(tuple(losses_of(x)), state)
        return x, tx_state, state

    def stretch(carry: tuple, length: Array) -> tuple[tuple, Array]:
        carry = jax.lax.fori_loop(0, length, step, carry)
        return carry, carry[0]

    lengths = jnp.diff(jnp.array(np.linspace(0, steps, POINTS + 1).astype(int)))
    carry = (start, tx.init(start), weighting.init(tuple(losses_of(start))))
    _, points = jax.lax.scan(stretch, carry, lengths)
    return jnp.concatenate([start[None], points])


def _statistics(weighting: yoto.LossWeighting, jacobian: Array) -> dict[str, Array]:
    known = {
        "gramian": jacobian @ jacobian.T,
        "norms": jnp.linalg.norm(jacobian, axis=1),
        "max_abs": jnp.abs(jacobian).max(axis=1),
        "mean_abs": jnp.abs(jacobian).mean(axis=1),
    }
    return {name: known[name] for name in weighting.needs if name in known}


def measure(method: str, ends: np.ndarray) -> list[Record]:
    """Records of the points (seeds, starts, 2) that the runs of a method end at."""
    records = []
    for seed, points in enumerate(ends):
        measured = {
            "x1": points[:, 0],
            "x2": points[:, 1],
            "distance to front": distance(points),
        }
        records += [
            record(
                method,
                metric,
                numbers[i],
                config=start_of(STARTS[i]),
                seed=seed if method in STOCHASTIC else None,
            )
            for i in range(len(STARTS))
            for metric, numbers in measured.items()
        ]
    return records
