"""Loss-conditional style transfer: one network, a dial for each scale of the style.

One network is trained for all weights of four style losses at once, each example with
weights of its own that it is told. Set against it are networks of the same kind trained
for one weighting each. Contents for testing are cut from where no training content is.
"""

import functools
import os
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.style import task
from benchmarks.tasks.style.examples import examples
from benchmarks.tasks.style.methods import (
    LONGER,
    SUPPORT,
    WALKS,
    WEIGHTINGS,
    Array,
    Size,
    Weights,
    places_of,
    stacked,
    walk,
)
from benchmarks.tasks.style.report import conclusions, figure, table, tables
from benchmarks.tasks.style.task import LOSSES, STYLES, Task
from yoto_jax import conditional

RESUMABLE = True
LEARNING_RATE = 3e-3
METHODS = ("fixed", "conditional", "longer")


SIZES = {
    "quick": Size(24, 2, 8, 1, 10, (16, 4), points=7),
    "cpu": Size(40, 4, 32, 3, 1000, (512, 24)),
    "gpu": Size(64, 16, 96, 6, 20_000, (4096, 64)),
}


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    size = SIZES[options.preset]
    steps = options.steps or size.steps
    photographs = task.load(options.data)
    made = task.make_task(photographs, size.side, counts=size.counts)
    name = "style" if options.data is None else f"style_{options.data.name}"
    units = Units(options, name)
    trained = train_all(made, size, methods, options.seeds, steps, units)
    seconds = units.seconds
    records = measure_all(made, size, trained)
    settings = size._replace(steps=steps)._asdict()
    result = write_json(
        options.out / f"{name}.json",
        meta(
            options,
            seeds=options.seeds,
            seconds=round(seconds),
            parameters=parameters(size),
            data="scikit-learn" if options.data is None else options.data.name,
            **settings,
        ),
        records,
    )
    figure(result, options.out / f"{name}.png")
    shown = [m for m in ("longer", "conditional") if m in methods]
    if shown:
        params = jax.tree.map(lambda x: x[0], trained[shown[0]])
        examples(made, size, params, options.out / f"{name}_examples.png")
    for each in (table(result), *tables(result).values()):
        show(each)
    for sentence in conclusions(result):
        say(sentence)
    say(f"Written: {options.out / name}.json and .png")


# Training.


def train_all(
    made: Task,
    size: Size,
    methods: tuple[str, ...],
    seeds: int,
    steps: int,
    units: Units,
) -> dict[str, Any]:
    """Parameters (seeds, ...) by method, of fixed ones (seeds, weightings, ...)."""
    runs: dict[str, tuple[Weights, float, int]] = {}
    if "longer" in methods:  # first: the others fit around it
        runs["longer"] = (WEIGHTINGS["all middle"], 1.0, LONGER * steps)
    if "conditional" in methods:
        runs["conditional"] = (WEIGHTINGS["all middle"], 1.0, steps)
    if "fixed" in methods:
        fixed = {f"fixed, {w}": (x, 0.0, steps) for w, x in WEIGHTINGS.items()}
        runs |= fixed
    keys = jax.random.split(jax.random.key(0), seeds)
    one = functools.partial(train, made.losses, size)
    every_seed = jax.jit(jax.vmap(one, in_axes=(None, 0, None, None, None)))
    contents = jnp.asarray(made.train)
    if missing := [run for name, run in runs.items() if name not in units]:
        program = every_seed.lower(contents, keys, *missing[0]).compile()

    def finish(name: str) -> Any:
        return units.do(name, lambda: program(contents, keys, *runs[name]))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(finish, track(list(runs), "style"))
        trained = dict(zip(runs, outcomes, strict=True))
    if "fixed" in methods:
        every = [trained.pop(name) for name in fixed]
        trained["fixed"] = jax.tree.map(lambda *x: np.stack(x, axis=1), *every)
    return trained


def train(
    losses: Any,
    size: Size,
    contents: Array,
    key: Array,
    center: Weights,
    spread: Array,
    steps: Array,
) -> Any:
    """Parameters of a network.

    Args:
      losses: Of images and contents.
      size: Of the network and the batch.
      contents: To draw from.
      key: The seed.
      center: The weighting, of scalars.
      spread: 0: it stays there; 1: weights are drawn for each example.
      steps: How many. It and the spread are no constants, so that runs of all kinds
        share one program.
    """
    net = task.Transfer(size.width, size.blocks)
    adam = optax.flatten(
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    )

    def draw(key: Array) -> tuple[Array, Array, Weights]:
        keys = jax.random.split(key, 4)
        some = contents[jax.random.choice(keys[0], len(contents), (size.batch,))]
        mirrored = jax.random.bernoulli(keys[1], 0.5, (size.batch, 1, 1, 1))
        some = jnp.where(mirrored, some[:, :, ::-1], some)
        drawn = SUPPORT.sample(keys[2], size.batch, method="stratified")
        weights = jax.tree.map(
            lambda c, w: c ** (1 - spread) * w**spread, center, drawn
        )
        return some, task.draw_noise(keys[3], some), weights

    def objective(params: Any, some: Array, noise: Array, weights: Weights) -> Array:
        encoded = conditional.encode(weights, SUPPORT)
        values = losses(net.apply(params, some, noise, encoded), some)
        # Divided by the sum: else a step would be about those with high weights alone.
        return conditional.conditional_loss(values, weights, normalize="sum")

    def step(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        gradient = jax.grad(objective)(params, *draw(jax.random.fold_in(key, i)))
        updates, state = adam.update(gradient, state)
        rate = LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    some, noise, weights = draw(key)
    params = net.init(key, some, noise, conditional.encode(weights, SUPPORT))
    return jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))[0]


def parameters(size: Size) -> int:
    """How many a network has."""
    net = task.Transfer(size.width, size.blocks)
    contents = jnp.zeros((1, size.side, size.side, 3))
    noise = jnp.zeros((1, size.side, size.side, task.NOISE))
    encoded = jnp.zeros((1, len(STYLES)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), contents, noise, encoded)
    return sum(x.size for x in jax.tree.leaves(shapes))


# Measuring.


def measure_all(made: Task, size: Size, trained: dict[str, Any]) -> list[Record]:
    """Every loss on the contents for testing, at every weighting."""
    contents = jnp.asarray(made.test)
    noise = task.draw_noise(jax.random.key(1), contents)
    net = task.Transfer(size.width, size.blocks)

    def losses_of(pair: tuple[Any, Weights]) -> Weights:
        params, weights = pair
        encoded = conditional.encode(jax.tree.map(jnp.atleast_1d, weights), SUPPORT)
        values = made.losses(net.apply(params, contents, noise, encoded), contents)
        return jax.tree.map(jnp.mean, values)

    pairs = jax.jit(lambda params, weights: jax.lax.map(losses_of, (params, weights)))

    def measure(params: Any, weights: Weights) -> Weights:
        """Losses (seeds, n), of parameters with axes (seeds, n), at weights (n,)."""
        seeds, n = jax.tree.leaves(params)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(seeds * n, *x.shape[2:]), params)
        values = pairs(flat, {k: np.tile(w, seeds) for k, w in weights.items()})
        return {k: np.asarray(v).reshape(seeds, n) for k, v in values.items()}

    weightings = ("", list(WEIGHTINGS), stacked(list(WEIGHTINGS)))
    places = places_of(size.points)
    walks = [(dial, places, walk(dial, size.points)) for dial in WALKS]
    records = []
    for method, params in trained.items():
        if method == "fixed":
            records += _records(method, *weightings[:2], measure(params, weightings[2]))
            continue
        for dial, names, weights in (weightings, *walks):
            same = _repeat(params, len(names))
            records += _records(method, dial, names, measure(same, weights))
    return records


def _repeat(params: Any, n: int) -> Any:
    """Parameters (seeds, n, ...), the same for all weightings."""
    return jax.tree.map(lambda x: np.repeat(x[:, None], n, axis=1), params)


def _records(method: str, dial: str, names: list[str], values: Weights) -> list[Record]:
    """Of losses (seeds, n); the domain is the walk, empty for the weightings."""
    return [
        record(
            method,
            loss,
            values[loss][seed, i],
            config=name,
            seed=seed,
            domain=dial,
            compute=LONGER if method == "longer" else 1,
        )
        for i, name in enumerate(names)
        for loss in LOSSES
        for seed in range(len(values[loss]))
    ]
