"""A learning rate that is learned, against tuned, scheduled and other learned ones.

Every run has as many gradient evaluations as any other. The tuned constant, and the
tuned peak of the schedule, are those that validate best, over all seeds.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, record, rounded, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.frontier.problem import TEST, VALIDATION
from benchmarks.tasks.learning_rate import task
from benchmarks.tasks.learning_rate.guards import Guard
from benchmarks.tasks.learning_rate.methods import (
    ARMS,
    GUARDS,
    METHODS,
    PROBLEMS,
    UNGUARDED,
    config_of,
)
from benchmarks.tasks.learning_rate.report import conclusions, figure, table

RESUMABLE = True
PRESETS = ("quick", "cpu")
POINTS = 20  # stretches that losses and factors are averaged over

Line = dict[str, Any]


def main(options: Options) -> None:
    options.refuse_data()
    if (options.steps or 0) % POINTS:
        raise UsageError(f"learning_rate takes multiples of {POINTS} steps")
    chosen = options.choose(tuple(METHODS))
    quick = options.preset == "quick"
    all_problems = tuple(PROBLEMS)[: 1 if quick else None]
    steps = {
        problem: options.steps or (POINTS if quick else task.STEPS[problem])
        for problem in all_problems
    }
    units = Units(options)
    lines: list[Line] = []
    for problem in all_problems:
        own = [m for m in chosen if m not in GUARDS or problem not in UNGUARDED]
        parts = []
        for seeds in blocks(options.seeds, task.AT_ONCE.get(problem)):
            work = functools.partial(
                run, problem, own, seeds, steps[problem], options.preset
            )
            unit = f"{problem}, {','.join(own)}, seeds {seeds[0]} to {seeds[-1]}"
            parts.append(units.do(unit, work))
        lines += joined(parts)
    settings = {"steps": steps, "seeds": options.seeds, "rates": task.USUAL}
    about = meta(options, **settings | {"seconds": rounded(units.seconds)})
    path = options.out / "learning_rate.json"
    result = write_json(path, about, records_of(lines), runs=lines)
    figure(result, options.out / "learning_rate.png")
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {path}, learning_rate.png")


def blocks(seeds: int, at_once: int | None) -> list[range]:
    """The seeds, those that train in one program together."""
    size = at_once or seeds
    return [range(k, min(k + size, seeds)) for k in range(0, seeds, size)]


def joined(parts: Sequence[Sequence[Line]]) -> list[Line]:
    """The same lanes with the seeds of all parts, in their order."""
    made = []
    for lines in zip(*parts, strict=True):
        line = dict(lines[0])
        for name, value in line.items():
            if isinstance(value, list):
                line[name] = [score for part in lines for score in part[name]]
        made.append(line)
    return made


Names = list[tuple[str, str, float]]
"""Method, arm and factor of every lane."""


def lanes_of(methods: Iterable[str], usual: float) -> tuple[Names, task.Groups]:
    """What the lanes are, and what they train with."""
    names, groups = [], {}
    for program in task.PROGRAMS:
        own = [
            (method, arm, factor)
            for method in methods
            for arm in ARMS
            for factor in METHODS[method].factors
            if METHODS[method].program == program
            and (method not in GUARDS or arm == "equal")
        ]
        if own:
            lanes = [_lane(*name, usual) for name in own]
            stack = lambda *x: jnp.asarray(x, jnp.float32)
            groups[program] = jax.tree.map(stack, *lanes)
            names += own
    return names, groups


def _lane(method: str, arm: str, factor: float, usual: float) -> task.Lanes:
    guard = Guard(**dict(METHODS[method].guard))
    scheduled = METHODS[method].scheduled
    return task.Lanes(factor * usual, scheduled, arm == "learned", guard)


def run(
    problem: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    preset: str,
) -> list[Line]:
    """Train and measure all lanes of a problem.

    Returns:
      A line for each lane: its scores, and the logarithm of the factor that it has
      learned if it learns one, for each seed.
    """
    started = time.process_time()
    names, groups = lanes_of(methods, task.USUAL[problem])
    outcome = task.train(problem, preset, groups, seeds, steps, POINTS)
    lines = []
    for lane, (method, arm, factor) in enumerate(names):
        measured = {
            "validation": outcome.scores[VALIDATION][:, lane],
            "test": outcome.scores[TEST][:, lane],
        }
        if np.any(outcome.log_scale[:, lane]):
            measured["log_scale"] = outcome.log_scale[:, lane, -1]
        lane_of = {"problem": problem, "method": method, "arm": arm, "factor": factor}
        values = {name: list(map(rounded, x)) for name, x in measured.items()}
        lines.append(lane_of | values)
    took = time.process_time() - started
    count = len(names) * len(seeds)
    say(f"{problem}: {count} runs, {took:.0f} s of processor")
    return lines


def records_of(lines: Sequence[Line]) -> list[Record]:
    """The test scores."""
    return [
        record(
            line["method"],
            "test",
            score,
            config=config_of(line["arm"], line["factor"]),
            seed=seed,
            domain=line["problem"],
        )
        for line in lines
        for seed, score in enumerate(line["test"])
    ]
