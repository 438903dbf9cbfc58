"""The runs of a contest and its searches, and their records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import searches, timing
from benchmarks.harness.contest import (
    BUDGETS,
    CONSTANT_PREDICTION,
    DRAWN,
    NONE,
    PLAIN,
    RULES,
    SOFTMAX,
    SWEEP,
    Contest,
    timed,
)
from benchmarks.harness.options import Options
from benchmarks.harness.results import Record, describe, record
from benchmarks.harness.runs import Finished, Run, Runs, settings
from benchmarks.harness.searches import MEDIAN, VALIDATED, WORST, Ratios
from benchmarks.harness.training import Task


def contend(
    contest: Contest,
    options: Options,
    chosen: Sequence[str],
    rounds_of: Mapping[str, int],
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Train and measure these methods: records, and weights and losses over time.

    ``rounds_of`` tells how many rounds of steps a preset times unless told otherwise.
    """
    rounds = options.extra.get("rounds")
    rounds = rounds_of[options.preset] if rounds is None else rounds
    budgets = {
        name: method.search(0).budget if method.search else 1
        for name, method in contest.methods.items()
        if name in chosen
    }
    planned = options.seeds * sum(budgets.values())
    records: list[Record] = []
    history: list[dict[str, Any]] = []
    runs = Runs(
        contest.task, contest.rules, options.out, resume=options.resume, planned=planned
    )
    for name in chosen:
        method = contest.methods[name]
        if method.search:
            records += search(contest, name, runs, options.seeds)
            continue
        config = settings(**(method.config or {}))
        wanted = [Run(method.rule, seed, config) for seed in range(options.seeds)]
        for seed, done in enumerate(runs.finish(wanted, name)):
            records += run_records(contest.unseen, name, "", seed, done, done.cost)
            if name in DRAWN or name.startswith("rho-"):
                history.append({"method": name, "seed": seed, **done.history})
    if rounds:
        records += costs(contest, chosen, rounds)
    return records, history


def search(contest: Contest, name: str, runs: Runs, seeds: int) -> list[Record]:
    """All runs of a search, seeds side by side, and what each way of choosing takes."""
    tried, found = try_out(contest, name, runs, seeds)
    tests = np.array(
        [
            [contest.better * unseen_mean(contest, d) for d in of_seed]
            for of_seed in found
        ]
    )
    if all(points == tried[0] for points in tried):
        # Which point is the best or the worst is a question about all seeds.
        tests = np.tile(tests.mean(axis=0), (seeds, 1))
    records = []
    for seed in range(seeds):
        for ratios, done in zip(tried[seed], found[seed], strict=True):
            config = config_of(contest.task, ratios)
            records += [
                r
                for r in run_records(contest.unseen, name, config, seed, done)
                if r["metric"] in (contest.metric, "validation")
            ]
        validation = [done.values["validation", None] for done in found[seed]]
        for (config, n), i in choices(validation, tests[seed]).items():
            cost = 1 if config in (MEDIAN, WORST) else n
            records += run_records(
                contest.unseen, name, config, seed, found[seed][i], cost
            )
    return records


def try_out(
    contest: Contest, name: str, runs: Runs, seeds: int
) -> tuple[list[list[Ratios]], list[list[Finished]]]:
    """Search with every seed to the end: points tried and their runs, by seed."""
    make = contest.methods[name].search
    assert make is not None
    asking = [make(seed) for seed in range(seeds)]
    tried: list[list[Ratios]] = [[] for _ in asking]
    found: list[list[Finished]] = [[] for _ in asking]
    while any(asked := [s.ask() for s in asking]):
        wanted = [
            Run(SOFTMAX, seed, settings(ratios=ratios, learn=0.0))
            # One point of all seeds after the other: they share a group of lanes.
            for i in range(max(map(len, asked)))
            for seed, points in enumerate(asked)
            for ratios in points[i : i + 1]
        ]
        for run, done in zip(wanted, runs.finish(wanted, name), strict=True):
            tried[run.seed].append(dict(run.config)["ratios"])
            found[run.seed].append(done)
        for s, points, finished in zip(asking, asked, found, strict=True):
            if points:
                latest = finished[len(finished) - len(points) :]
                s.tell([done.values["validation", None] for done in latest])
    return tried, found


def choices(
    validation: Sequence[float], tests: Sequence[float]
) -> dict[tuple[str, int], int]:
    """The run that each way of choosing takes, by its label and the runs it looks at.

    Validation also chooses among the first few runs, as a smaller budget would have.
    """
    total = len(validation)
    chosen = {
        (config, total): i
        for config, i in searches.selections(validation, tests).items()
    }
    for n in BUDGETS:
        if n < total:
            first = searches.selections(validation[:n], tests[:n])
            chosen[f"{VALIDATED}, {n} runs", n] = first[VALIDATED]
    return chosen


def config_of(task: Task, ratios: Ratios) -> str:
    return describe(
        **{
            name: 0.0 if ratio <= NONE else ratio
            for name, ratio in zip(task.auxiliary, ratios, strict=True)
        }
    )


def run_records(
    unseen: Sequence[str],
    name: str,
    config: str,
    seed: int,
    done: Finished,
    cost: float = 1,
) -> list[Record]:
    """All that was measured of one run."""
    return [
        record(
            name,
            metric,
            value,
            config=config,
            seed=seed,
            domain=domain,
            unseen=domain in unseen,
            compute=cost,
        )
        for (metric, domain), value in done.values.items()
    ]


def constant_records(
    unseen: Sequence[str], found: dict[tuple[str, str], float]
) -> list[Record]:
    """What predicting without looking is worth, by metric and domain."""
    return [
        record(
            CONSTANT_PREDICTION,
            metric,
            value,
            domain=domain,
            unseen=domain in unseen,
            compute=0,
        )
        for (metric, domain), value in found.items()
    ]


def unseen_mean(contest: Contest, done: Finished) -> float:
    return float(np.mean([done.values[contest.metric, d] for d in contest.unseen]))


def costs(contest: Contest, chosen: Sequence[str], rounds: int) -> list[Record]:
    """Time of a step of each rule, relative to one with constant weights."""
    config = {"ratios": (0.1,) * len(contest.task.auxiliary)}
    used = {timed(contest.methods[name].rule) for name in chosen} | {PLAIN}
    rules = {
        name: (rule, config if name == SOFTMAX else {})
        for name, rule in contest.rules.items()
        if name in used
    }
    rules |= {f"{PLAIN} again": (RULES[PLAIN], {})}
    ratios = timing.step_ratios(contest.task, rules, PLAIN, rounds)
    measured = {(name, "step_ratio"): seen for name, seen in ratios.items()}
    speed = timing.sweep_speed(contest.task, RULES[SOFTMAX], config, SWEEP, rounds)
    measured[f"{SWEEP} side by side", "speed"] = speed
    return [
        record(name, f"{metric}:{what}", np.percentile(seen, at))
        for (name, metric), seen in measured.items()
        for what, at in (("median", 50), ("low", 25), ("high", 75))
    ]
