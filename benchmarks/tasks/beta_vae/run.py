"""One conditional beta-VAE for all betas, against one VAE trained for each of seven.

After the first experiment of Dosovitskiy and Djolonga (2020), in which the weight of
the KL divergence spans 0.125 to 512, at a size for a CPU. All models of one width take
the same number of steps on the same batches; the seven fixed ones together take seven
times as many. The likelihood is a Gaussian with a learned standard deviation for every
pixel, as for natural images there: the pixels are grey levels, and Bernoulli logits
could get no nearer to them than their entropy.

What was chosen (learning rate, normalisation of the loss weights, where to put FiLM)
was chosen on validation images; all results are of test images, or of training images
where it says so. The loss weights are not normalised, as in the original. ``sum`` and
``geometric`` are the same model with normalised ones, ``long`` is one trained for as
many steps as all fixed models together, all three at width 1; ``cost`` times forward
passes and training steps, best alone on an idle machine.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import (
    Record,
    Result,
    describe,
    read_json,
    record,
    write_json,
)
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.beta_vae import task
from benchmarks.tasks.beta_vae.examples import examples
from benchmarks.tasks.beta_vae.methods import (
    ARMS_OF_COST,
    FORWARD_IMAGES,
    LOSSES,
    METHODS,
    MIDDLE,
    TRAINED,
)
from benchmarks.tasks.beta_vae.report import (
    conclusions,
    figure,
    table,
    tables,
    widths_of,
)
from yoto_jax import conditional

RESUMABLE = True
VARIANTS = ("sum", "geometric", "long")  # at the middle width only
WIDTHS = {"quick": (1,), "cpu": (0.5, 1, 2, 4), "gpu": (0.5, 1, 2, 4, 8)}
STEPS = {"quick": 30, "cpu": 8000, "gpu": 80_000}
EVALUATED = {"quick": 128, "cpu": 1024, "gpu": 1024}  # images of each split, at most

COST_WIDTHS = {"quick": (1,), "cpu": (1, 4, 16), "gpu": (1, 4, 16)}
ROUNDS = {"quick": 2, "cpu": 41, "gpu": 41}


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    data = task.load(options.data)
    suffix = "" if options.data is None else f"_{options.data.name}"
    path = options.out / f"beta_vae{suffix}.json"
    units = Units(options, path.stem)
    records, params = train_all(options, methods, data, units)
    if "cost" in methods:
        records += costs(data, options, units)
    about = meta(options, **_settings(options, data, units))
    result = write_json(path, *_merged(path, options, methods, about, records))
    report(result, params, data, path, WIDTHS[options.preset][-1])


def train_all(
    options: Options, methods: Sequence[str], data: task.Data, units: Units
) -> tuple[list[Record], dict[str, Any]]:
    """Records of the trained methods, and the parameters of the widest of each."""
    quick = options.preset == "quick"
    steps = options.steps or STEPS[options.preset]
    most = EVALUATED[options.preset]
    records: list[Record] = []
    params: dict[str, Any] = {}
    for method in methods:
        if method not in TRAINED or (quick and method in VARIANTS):
            continue
        widths = (MIDDLE,) if method in VARIANTS else WIDTHS[options.preset]
        for width in track(widths, method):
            work = functools.partial(
                finish, method, width, data, options.seeds, steps, most
            )
            found = units.do(f"{method}, {width}", work)
            params[method] = found["params"]  # of the last, which is the widest
            records += found["records"]
    return records, params


def _settings(options: Options, data: task.Data, units: Units) -> dict[str, Any]:
    """What the results depend on."""
    return {
        "data": data.name,
        "images": [len(data.train), len(data.validation), len(data.test)],
        "steps": options.steps or STEPS[options.preset],
        "seeds": options.seeds,
        "batch": task.BATCH,
        "groups": task.GROUPS,
        "rate": data.rate,
        "warm_up": task.WARM_UP,
        "latent": task.LATENT,
        "hidden": task.HIDDEN,
        "rounds": ROUNDS[options.preset],
        "seconds": round(units.seconds),
    }


def report(
    result: Result, params: dict[str, Any], data: task.Data, path: Path, widest: float
) -> None:
    """Draw the figures, print the tables."""
    if widths_of(result, "conditional") and widths_of(result, "fixed"):
        figure(result, path.with_suffix(".png"))
    if {"fixed", "conditional"} <= params.keys():
        drawn = path.with_name(f"{path.stem}_examples.png")
        examples(params, data, widest, drawn)
    for shown in (table(result), *tables(result).values()):
        if shown.rows:
            show(shown)
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {path} and figures beside it")


def _merged(
    path: Path,
    options: Options,
    methods: Sequence[str],
    meta: dict[str, Any],
    records: list[Record],
) -> tuple[dict[str, Any], list[Record]]:
    """What was not asked for stays as it was measured before."""
    if options.methods is None or not path.is_file():
        return meta, records
    before = read_json(path)
    asked = lambda r: (
        ("cost" if r["method"] in ARMS_OF_COST else r["method"]) in methods
    )
    stay = [r for r in before["records"] if not asked(r)]
    if not stay:
        return meta, records
    again = dict(before["meta"].get("again", {}))
    again[",".join(methods)] = {
        k: meta[k] for k in ("command", "commit", "date", "seconds")
    }
    return before["meta"] | {"again": again}, stay + records


# Training and measuring.


def train(
    method: str, width: float, data: task.Data, seeds: int, steps: int
) -> task.Trained:
    if method == "long":
        steps *= len(task.BETAS)
    normalize = method if method in ("sum", "geometric") else task.NORMALIZE
    setting = task.Setting(round(task.HIDDEN * width), steps, normalize)
    betas = jnp.array(task.BETAS) if method == "fixed" else None
    return task.train(setting, data, seeds, betas)


def finish(
    method: str, width: float, data: task.Data, seeds: int, steps: int, most: int
) -> dict[str, Any]:
    """What is kept of a method at a width: parameters, for examples, and records."""
    trained = train(method, width, data, seeds, steps)
    records = measure(method, width, trained, data, most)
    return {"params": trained.params, "records": records}


def measure(
    method: str, width: float, trained: task.Trained, data: task.Data, most: int
) -> list[Record]:
    """Both losses for every seed and beta; of validation images to choose by."""
    splits = {"test": data.test, "train": data.train}
    if width == MIDDLE:
        splits["validation"] = data.validation
    betas = task.BETAS if method == "fixed" else task.GRID
    compute = len(task.BETAS) if method == "long" else 1
    note = functools.partial(record, method, compute=compute)
    records = []
    for split, images in splits.items():
        images = images[:most]
        if method == "fixed":
            losses = task.measure_fixed(trained.params, images, data.floor)
        else:
            grid = jnp.array(betas)
            losses = task.measure_conditional(trained.params, images, grid, data.floor)
        for name in LOSSES:
            for seed, of_seed in enumerate(np.asarray(losses[name])):
                for beta, value in zip(betas, of_seed, strict=True):
                    config = describe(width=width, beta=beta)
                    records.append(
                        note(name, value, config=config, seed=seed, domain=split)
                    )
    stacked = 2 if method == "fixed" else 1
    leaves = jax.tree.leaves(trained.params)
    sizes = {
        "parameters": sum(np.prod(leaf.shape[stacked:]) for leaf in leaves),
        "run_seconds": trained.seconds,
        "compile_seconds": trained.compile_seconds,
    }
    config = describe(width=width)
    return records + [note(k, value, config=config) for k, value in sizes.items()]


# What conditioning costs in time.


def costs(data: task.Data, options: Options, units: Units) -> list[Record]:
    quick = options.preset == "quick"
    rounds = ROUNDS[options.preset]
    records = []
    for width in COST_WIDTHS[options.preset]:
        kinds = {"forward": forward_arms}
        if not quick:  # They compile for seconds.
            kinds["step"] = step_arms
        for what, make in kinds.items():
            work = functools.partial(cost, what, make, width, data, rounds)
            records += units.do(f"cost: {what}, {width}", work)
    return records


def cost(
    what: str, make: Callable[..., Any], width: float, data: task.Data, rounds: int
) -> list[Record]:
    """Times of the arms of one kind and width, in turns."""
    calls = {arm: start() for arm, start in make(width, data).items()}
    times = interleaved(calls, rounds)
    records = []
    for arm, taken in times.items():
        records += time_records(f"cost: {arm}", what, width, taken, times["fixed"])
    return records


Call = Callable[[], Any]


def forward_arms(width: float, data: task.Data) -> dict[str, Callable[[], Call]]:
    """Reconstructing many images at once, with one beta for all or one for each."""
    hidden, pixels = round(task.HIDDEN * width), data.train.shape[1]
    x = jnp.resize(data.test, (FORWARD_IMAGES, pixels))
    program = jax.jit(lambda p, x, c: task.codec(p, c, data.floor).reconstruct(x))
    plain, conditioned = (task.init(0, pixels, hidden, film) for film in (False, True))
    one = conditional.encode({"reconstruction": 1.0, "kl": 2.0}, task.SUPPORT)
    each = jnp.broadcast_to(one, (FORWARD_IMAGES, *one.shape))
    arm = lambda *inputs: functools.partial(functools.partial, program, *inputs)
    return {
        "fixed": arm(plain, x, None),
        "fixed again": arm(plain, x, None),
        "one beta": arm(conditioned, x, one),
        "beta per image": arm(conditioned, x, each),
    }


def step_arms(width: float, data: task.Data) -> dict[str, Callable[[], Call]]:
    """Training steps, called one by one, each arm with a carry of its own."""
    hidden, pixels = round(task.HIDDEN * width), data.train.shape[1]
    key, i = jax.random.key(0), jnp.asarray(1)

    def arm(
        groups: int, beta: jax.Array | None, biases: bool = True
    ) -> Callable[[], Call]:
        setting = task.Setting(hidden, STEPS["cpu"], groups=groups)
        one = task.training_step(setting, data, beta)
        step = jax.jit(functools.partial(one, key), donate_argnums=0)

        def make() -> Call:
            params = task.init(0, pixels, hidden, beta is None, biases)
            carry = (params, task.optimizer(setting, data).init(params))

            def run() -> Any:
                nonlocal carry
                carry = step(carry, i)
                return carry

            return run

        return make

    fixed = arm(task.GROUPS, jnp.asarray(2.0))
    return {
        "fixed": fixed,
        "fixed again": fixed,
        "beta per group": arm(task.GROUPS, None),
        "beta per group, no biases": arm(task.GROUPS, None, biases=False),
        "beta per image": arm(task.BATCH, None),
    }


def interleaved(
    arms: dict[str, Call], rounds: int, at_least: float = 0.01
) -> dict[str, list[float]]:
    """Seconds of a call of each arm, in turn: what slows down, slows all of them."""

    def seconds(call: Call, n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            last = call()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / n

    for call in arms.values():
        seconds(call, 3)
    n = max(3, round(at_least / min(seconds(call, 5) for call in arms.values())))
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        order = list(arms) if turn % 2 else list(arms)[::-1]
        for arm in order:
            times[arm].append(seconds(arms[arm], n))
    return times


def time_records(
    method: str, what: str, width: float, times: list[float], beside: list[float]
) -> list[Record]:
    """Median time, and quartiles of its ratio to that of the fixed model beside it."""
    first, median, third = np.percentile(np.divide(times, beside), [25, 50, 75])
    config = describe(width=width)
    measured = {
        f"{what}: microseconds": 1e6 * statistics.median(times),
        f"{what}: ratio": median,
        f"{what}: ratio, first quartile": first,
        f"{what}: ratio, third quartile": third,
    }
    return [record(method, k, v, config=config) for k, v in measured.items()]
