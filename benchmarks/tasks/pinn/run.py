"""A physics-informed network: weightings against fixed and searched weights.

Burgers' equation, three losses. All methods train the same network from the same
initialisations on the same points with the same optimizer. They run in turns, a stretch
of steps each, so that whatever else the machine does slows all of them alike.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, describe, record, rounded, write_json
from benchmarks.harness.searches import VALIDATED, WORST
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.tasks.pinn import task
from benchmarks.tasks.pinn.methods import CONDITIONS, FIXED, METHODS, PERIOD, Make
from benchmarks.tasks.pinn.report import conclusions, figure, table

PyTree = Any

RESUMABLE = True
LEARNING_RATE = 5e-3  # at the start of a cosine decay to 0
STRETCHES = 25
RATIOS = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Size:
    """What a preset decides."""

    steps: int
    width: int
    depth: int
    inside: tuple[int, int]
    edge: int
    ratios: tuple[float, ...]


SIZES = {
    "quick": Size(10, 8, 2, (4, 8), 8, (1.0, 10.0)),
    "cpu": Size(10_000, 32, 4, (16, 32), 64, RATIOS),
    "gpu": Size(100_000, 128, 4, (64, 64), 256, RATIOS),
}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    size = SIZES[options.preset]
    steps = options.steps or size.steps
    runs = choose_runs(methods, size.ratios)
    # Methods take turns in the time of a seed, so that is what is done or not.
    units = Units(options, methods=methods)
    trained = train(runs, size, steps, options.seeds, units)
    records = [
        *timing_records(methods, trained),
        *(
            record
            for seed, method in itertools.product(range(options.seeds), methods)
            for record in method_records(method, seed, size.ratios, trained)
        ),
    ]
    history = [
        history_of(method, seed, size.ratios, trained)
        for method, seed in itertools.product(methods, range(options.seeds))
    ]
    settings = {
        "steps": steps,
        "seeds": options.seeds,
        "width": size.width,
        "depth": size.depth,
        "points": {"inside": math.prod(size.inside), "edge": size.edge},
        "learning_rate": LEARNING_RATE,
        "every": PERIOD,
        "ratios": size.ratios,
    }
    result = write_json(
        options.out / "pinn.json",
        meta(options, **settings),
        records,
        history=history,
    )
    figure(result, options.out / "pinn.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'pinn.json'}, {options.out / 'pinn.png'}")


# Runs.


class Run(NamedTuple):
    """What is trained once for every seed. Runs of one program differ in ratios."""

    program: str
    ratios: tuple[float, float]


class Curve(NamedTuple):
    """One run of one seed, at the end of every stretch."""

    error: list[float]
    validation: list[float]
    weights: list[dict[str, float]]  # means over the stretch
    losses: list[dict[str, float]]


class Trained(NamedTuple):
    steps: int
    stretch: int
    curves: dict[tuple[Run, int], Curve]
    seconds: dict[str, list[list[float]]]  # by program: of its runs, for every round
    compile_seconds: dict[str, float]


def grid(ratios: tuple[float, ...]) -> list[Run]:
    """Weights of the two conditions relative to the equation."""
    return [Run("static", pair) for pair in itertools.product(ratios, repeat=2)]


EQUAL = Run("static", (1.0, 1.0))


def choose_runs(methods: tuple[str, ...], ratios: tuple[float, ...]) -> list[Run]:
    """The equal weights are a point of the grid: they need not run twice."""
    runs = [Run(m, (1.0, 1.0)) for m in methods if m not in FIXED]
    if "static" in methods:
        runs.append(EQUAL)
    if "tuned" in methods:
        runs += [run for run in grid(ratios) if run not in runs]
    return runs


def train(runs: list[Run], size: Size, steps: int, seeds: int, units: Units) -> Trained:
    """Train all runs, a stretch of each in turn."""
    stretches = next(n for n in range(STRETCHES, 0, -1) if steps % n == 0)
    stretch = steps // stretches
    programs: dict[str, tuple] = {}

    def compile_all() -> dict[str, float]:
        seconds = {}
        for program in dict.fromkeys(run.program for run in runs):
            started = time.perf_counter()
            functions = program_of(METHODS[program].make, size, steps, stretch)
            programs[program] = compiled(*functions)
            seconds[program] = time.perf_counter() - started
        return seconds

    def of_seed(seed: int) -> dict[str, Any]:
        if not programs:  # Compiled, and timed, before the interruption.
            compile_all()
        return train_seed(runs, programs, seed, stretches)

    compile_seconds = units.do("programs", compile_all)
    curves: dict[tuple[Run, int], Curve] = {}
    seconds: dict[str, list[list[float]]] = {program: [] for program in compile_seconds}
    for seed in range(seeds):
        found = units.do(f"seed {seed}", functools.partial(of_seed, seed))
        for run, curve in zip(runs, found["curves"], strict=True):
            curves[run, seed] = Curve(*curve)
        for program, of_program in found["seconds"].items():
            seconds[program] += of_program
    return Trained(steps, stretch, curves, seconds, compile_seconds)


def train_seed(
    runs: list[Run], programs: dict[str, tuple], seed: int, stretches: int
) -> dict[str, Any]:
    """Train all runs of one seed: a curve for each, and seconds by program."""
    test, validation = task.references()
    measure = jax.jit(
        lambda model: (
            task.relative_error(model, test),
            task.relative_error(model, validation),
        )
    )
    curves = {run: Curve([], [], [], []) for run in runs}
    seconds: dict[str, list[list[float]]] = {program: [] for program in programs}
    carries = {
        run: programs[run.program][0](seed, jnp.array(run.ratios)) for run in runs
    }
    for done in track(range(stretches), f"pinn, seed {seed}"):
        for program in programs:
            seconds[program].append([])
        first = (seed * stretches + done) % len(
            runs
        )  # Nobody always runs after the same other one.
        for run in runs[first:] + runs[:first]:
            ratios = jnp.array(run.ratios)
            jax.block_until_ready((carries[run], ratios))
            started = time.perf_counter()
            carries[run], (weights, losses) = jax.block_until_ready(
                programs[run.program][1](carries[run], seed, ratios)
            )
            seconds[run.program][-1].append(time.perf_counter() - started)
            curve = curves[run]
            error, validation_error = measure(carries[run].model)
            curve.error.append(float(error))
            curve.validation.append(float(validation_error))
            curve.weights.append({n: float(w.mean()) for n, w in weights.items()})
            curve.losses.append({n: float(x.mean()) for n, x in losses.items()})
    return {"curves": list(curves.values()), "seconds": seconds}


class Carry(NamedTuple):
    step: jax.Array
    model: PyTree
    optimizer: optax.OptState
    weighting: Any


def program_of(make: Make, size: Size, steps: int, stretch: int) -> tuple:
    """Functions that start a run, and that train it for a stretch."""
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def keys_of(seed: jax.Array) -> jax.Array:
        """For the initialisation and for the points."""
        return jax.random.split(jax.random.key(seed))

    def start(seed: jax.Array, ratios: jax.Array) -> Carry:
        model = task.init_model(keys_of(seed)[0], size.width, size.depth)
        state = make(ratios).init(dict.fromkeys(task.LOSSES, 0.0))
        return Carry(jnp.zeros((), jnp.int32), model, tx.init(model), state)

    def advance(carry: Carry, seed: jax.Array, ratios: jax.Array) -> Any:
        weighting = make(ratios)

        def step(carry: Carry, _: None) -> Any:
            key = jax.random.fold_in(keys_of(seed)[1], carry.step)
            batch = task.draw_batch(key, size.inside, size.edge)
            value_and_grad = yoto.value_and_grad(
                task.losses, weighting, statistics=statistics(weighting)
            )
            losses, grads, state = value_and_grad(carry.model, carry.weighting, batch)
            updates, optimizer = tx.update(grads, carry.optimizer)
            model = optax.apply_updates(carry.model, updates)
            weights = optax.tree.get(state, "loss_weights")
            return Carry(carry.step + 1, model, optimizer, state), (weights, losses)

        return jax.lax.scan(step, carry, length=stretch)

    return start, advance


def compiled(start: Callable[..., Carry], advance: Callable[..., Any]) -> tuple:
    started = jax.jit(start).lower(0, jnp.ones(2)).compile()
    stretch = jax.jit(advance, donate_argnums=0)
    return started, stretch.lower(started.out_info, 0, jnp.ones(2)).compile()


def statistics(weighting: yoto.LossWeighting) -> dict[str, Any] | None:
    """The tangent kernel, for a weighting that needs it."""
    needed = "ntk_diagonal" in weighting.needs
    return {"ntk_diagonal": task.ntk_diagonal} if needed else None


# Records.


def chosen(
    method: str, seed: int, ratios: tuple[float, ...], trained: Trained
) -> dict[str, Run]:
    """The runs of a method that stand for it, by configuration.

    Only ``VALIDATED`` is a choice that somebody could make; it looks at validation
    points alone. ``WORST`` looks at the test and describes the grid.
    """
    if method == "static":
        return {_describe(EQUAL): EQUAL}
    if method != "tuned":
        return {METHODS[method].config: Run(method, (1.0, 1.0))}
    runs = grid(ratios)
    last = lambda run: trained.curves[run, seed].validation[-1]
    tested = lambda run: trained.curves[run, seed].error[-1]
    return {
        VALIDATED: min(runs, key=_finite(last)),
        WORST: max(runs, key=_finite(tested)),
    } | {_describe(run): run for run in runs}


def _finite(error: Callable[[Run], float]) -> Callable[[Run], float]:
    """A run that went astray is the worst of all."""

    def of(run: Run) -> float:
        found = error(run)
        return found if math.isfinite(found) else math.inf

    return of


def _describe(run: Run) -> str:
    return describe(**dict(zip(CONDITIONS, run.ratios, strict=True)))


def method_records(
    method: str, seed: int, ratios: tuple[float, ...], trained: Trained
) -> Iterator[Record]:
    """All that was measured of a method with one seed."""
    for config, run in chosen(method, seed, ratios, trained).items():
        curve = trained.curves[run, seed]
        found = {
            "error": curve.error[-1],
            "validation error": curve.validation[-1],
            **{f"weight:{name}": w for name, w in curve.weights[-1].items()},
            **{f"loss:{name}": x for name, x in curve.losses[-1].items()},
        }
        if EQUAL in (run for run, _ in trained.curves):
            found["error at equal time"] = at_equal_time(curve, run, trained)
        cost = len(grid(ratios)) if config == VALIDATED else 1
        for metric, value in found.items():
            yield record(method, metric, value, config=config, seed=seed, compute=cost)


def relative_times(program: str, trained: Trained) -> np.ndarray:
    """Time of a stretch relative to fixed weights, for every round."""
    times = np.median(trained.seconds[program], axis=1)
    return times / np.median(trained.seconds["static"], axis=1)


def at_equal_time(curve: Curve, run: Run, trained: Trained) -> float:
    """The error when fixed weights have finished all their steps.

    A method that took less time has finished as well.
    """
    slower = max(1.0, float(np.median(relative_times(run.program, trained))))
    step = trained.stretch * np.arange(1, len(curve.error) + 1)
    return float(np.interp(trained.steps / slower, step, curve.error))


def timing_records(methods: tuple[str, ...], trained: Trained) -> Iterator[Record]:
    """Seconds per step: medians over rounds, which the other runs shared."""
    for method in methods:
        program = "static" if method in FIXED else method
        each_step = np.array(trained.seconds[program]) / trained.stretch
        found = {
            "step_seconds": np.median(each_step),
            "compile_seconds": trained.compile_seconds[program],
        }
        if "static" in trained.seconds:
            quartiles = np.quantile(relative_times(program, trained), (0.5, 0.25, 0.75))
            names = ("relative_time", "relative_time:25%", "relative_time:75%")
            found |= dict(zip(names, quartiles, strict=True))
        for metric, value in found.items():
            yield record(method, metric, value)


def history_of(
    method: str, seed: int, ratios: tuple[float, ...], trained: Trained
) -> dict[str, Any]:
    """Errors, weights and losses over time, of the first of the chosen runs."""
    run = next(iter(chosen(method, seed, ratios, trained).values()))
    curve = trained.curves[run, seed]

    def by_name(points: list[dict[str, float]]) -> dict[str, list[float]]:
        return {name: [rounded(p[name]) for p in points] for name in points[0]}

    return {
        "method": method,
        "seed": seed,
        "step": [trained.stretch * (i + 1) for i in range(len(curve.error))],
        "error": [rounded(error) for error in curve.error],
        "weights": by_name(curve.weights),
        "losses": by_name(curve.losses),
    }
