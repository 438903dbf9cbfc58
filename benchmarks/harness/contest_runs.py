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
    Method,
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
    planned = options.seeds * sum(_budget(contest.methods[name]) for name in chosen)
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
        wanted = [single(method, seed) for seed in range(options.seeds)]
        for seed, done in enumerate(runs.finish(wanted, name)):
            records += run_records(contest.unseen, name, "", seed, done, done.cost)
            if name in DRAWN or name.startswith("rho-"):
                history.append({"method": name, "seed": seed, **done.history})
    if rounds:
        records += costs(contest, chosen, rounds)
    return records, history


def single(method: Method, seed: int) -> Run:
    """The one run of a method that does not search."""
    return Run(method.rule, seed, settings(**(method.config or {})))


def _budget(method: Method) -> int:
    """How many runs of one seed a method takes at most."""
    return method.search(0).budget if method.search else 1


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
        records += point_records(contest, name, seed, tried[seed], found[seed])
        records += choice_records(contest, name, seed, tests[seed], found[seed])
    return records


def point_records(
    contest: Contest,
    name: str,
    seed: int,
    tried: Sequence[Ratios],
    found: Sequence[Finished],
) -> list[Record]:
    """What the searches go by and are judged by, of every point of one seed."""
    return [
        r
        for ratios, done in zip(tried, found, strict=True)
        for r in run_records(
            contest.unseen, name, config_of(contest.task, ratios), seed, done
        )
        if r["metric"] in (contest.metric, "validation")
    ]


def choice_records(
    contest: Contest,
    name: str,
    seed: int,
    tests: Sequence[float],
    found: Sequence[Finished],
) -> list[Record]:
    """All that was measured of the runs that the ways of choosing take."""
    records = []
    for (config, n), i in choices(validation_of(found), tests).items():
        cost = 1 if config in (MEDIAN, WORST) else n
        records += run_records(contest.unseen, name, config, seed, found[i], cost)
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
        wanted = in_turns(asked)
        for run, done in zip(wanted, runs.finish(wanted, name), strict=True):
            tried[run.seed].append(dict(run.config)["ratios"])
            found[run.seed].append(done)
        for one, points, finished in zip(asking, asked, found, strict=True):
            if points:
                one.tell(validation_of(finished[len(finished) - len(points) :]))
    return tried, found


def validation_of(finished: Sequence[Finished]) -> list[float]:
    """What searches go by."""
    return [done.values["validation", None] for done in finished]


def in_turns(asked: Sequence[Sequence[Ratios]]) -> list[Run]:
    """One point of all seeds after the other: they share a group of lanes."""
    return [
        Run(SOFTMAX, seed, settings(ratios=ratios, learn=False))
        for i in range(max(map(len, asked)))
        for seed, points in enumerate(asked)
        for ratios in points[i : i + 1]
    ]


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
