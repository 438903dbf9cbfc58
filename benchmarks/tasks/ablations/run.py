"""What in YOTO does what: its parts switched off and turned up, on the depth task."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import contest, contest_runs
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, describe, write_json
from benchmarks.harness.runs import Finished, Run, Runs, settings
from benchmarks.harness.terminal import say, show
from benchmarks.tasks.ablations.methods import (
    EPSILON_RHO,
    METRIC,
    NAMES,
    REPLAYED,
    VARIANTS,
)
from benchmarks.tasks.ablations.report import figure, losses_table, table
from benchmarks.tasks.depth import task

RESUMABLE = True
DEFAULT = {"ratios": (0.1, 0.1)}

RHOS = tuple(10.0**x for x in range(-4, 5))
EPSILONS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
EXTRA = (2, 4, 6)  # further losses
METHODS = ("parts", "equal", "rho", "epsilon", "losses", "aligned")
"""What can be measured apart; together they are the table and the figure."""


def main(options: Options) -> None:
    options.refuse_data()
    options.choose(METHODS)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    quick = options.preset == "quick"
    records, history = ablate(options, size, quick)
    path = options.out / "ablations.json"
    result = write_json(
        path,
        meta(options, seeds=options.seeds, **size._asdict()),
        records,
        history=history,
    )
    if options.methods is None:  # else what they are compared with is missing
        figure(result, path.with_suffix(".png"))
        show(table(result))
        show(losses_table(result))
    say(f"Written: {path}")


# Runs.


@dataclasses.dataclass
class Notes:
    """What has been measured so far."""

    seeds: range
    records: list[Record] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(
        self, runs: Runs, method: str, config: str, wanted: list[Run]
    ) -> list[Finished]:
        """Train these runs and note what is measured of them."""
        finished = runs.finish(wanted, f"{method} {config}")
        for run, done in zip(wanted, finished, strict=True):
            self.records.extend(_records(method, config, run.seed, done))
        return finished


def learned(seed: int, **config: Any) -> Run:
    return Run(contest.SOFTMAX, seed, settings(**(DEFAULT | config)))


def constant(seed: int, ratios: tuple[float, ...]) -> Run:
    config = settings(ratios=ratios, learn=False)
    return Run(contest.SOFTMAX, seed, config)


def ablate(
    options: Options, size: task.Size, quick: bool
) -> tuple[list[Record], list[dict[str, Any]]]:
    chosen = options.choose(METHODS)
    steered = "aligned" in chosen and not quick  # its programs take long to compile
    rhos = RHOS[::4] if quick else RHOS
    epsilons = EPSILONS[::5] if quick else EPSILONS
    extra = EXTRA[-1:] if quick else EXTRA
    of_each = 2 if quick else 3  # methods for each number of losses
    once = len(rhos) + len(VARIANTS) + len(REPLAYED) + (1 if quick else 2)
    runs = open_runs(options, size, options.seeds * once + len(epsilons) ** 2)
    notes = Notes(range(options.seeds))
    alone: dict[str, Callable[[], Any]] = {
        "parts": lambda: vary_parts(notes, runs),
        "equal": lambda: notes.add(
            runs, "equal", "", [constant(seed, (1.0, 1.0)) for seed in notes.seeds]
        ),
        "rho": lambda: vary_rho(notes, runs, rhos),
        "epsilon": lambda: vary_epsilon(notes, runs, epsilons),
    }
    for part, measure in alone.items():
        if part in chosen:
            measure()
    for count in extra if steered or "losses" in chosen else ():
        of_more = open_runs(options, size, of_each * options.seeds, count)
        add_losses(notes, of_more, count, "losses" in chosen, steered)
    if steered:
        add_losses(notes, runs, 0, False, steered)
    return notes.records, notes.history


def open_runs(options: Options, size: task.Size, planned: int, extra: int = 0) -> Runs:
    """Runs of the task with so many further losses."""
    name = f"ablations_{len(task.AUXILIARY) + extra}_losses" if extra else "ablations"
    made = dataclasses.replace(task.make(size, extra)[0], name=name)
    return Runs(
        made, contest.RULES, options.out, resume=options.resume, planned=planned
    )


def vary_parts(notes: Notes, runs: Runs) -> None:
    """Every variant, and some of their final weights as constant ones."""
    for name, (_, config) in VARIANTS.items():
        wanted = [learned(seed, **config) for seed in notes.seeds]
        finished = notes.add(runs, name, "", wanted)
        notes.history += [
            {"method": name, "seed": seed, **done.history}
            for seed, done in zip(notes.seeds, finished, strict=True)
        ]
        if name in REPLAYED:
            wanted = [
                constant(seed, final_ratios(done))
                for seed, done in zip(notes.seeds, finished, strict=True)
            ]
            notes.add(runs, f"{name} replayed", "", wanted)


def vary_rho(notes: Notes, runs: Runs, rhos: Sequence[float]) -> None:
    for rho in rhos:
        wanted = [learned(seed, rho=rho) for seed in notes.seeds]
        notes.add(runs, "rho", describe(rho=rho), wanted)


def vary_epsilon(notes: Notes, runs: Runs, epsilons: Sequence[float]) -> None:
    """All pairs of initial weights with the first seed, side by side."""
    pairs = list(itertools.product(epsilons, repeat=2))
    wanted = [learned(0, ratios=pair, rho=EPSILON_RHO) for pair in pairs]
    finished = runs.finish(wanted, "epsilon")
    for pair, run, done in zip(pairs, wanted, finished, strict=True):
        config = describe(camera=pair[0], invariance=pair[1])
        notes.records += _records("epsilon", config, run.seed, done)


def add_losses(
    notes: Notes, runs: Runs, extra: int, unsteered: bool, steered: bool
) -> None:
    """So many further losses: methods that are not steered, and one that is."""
    k = len(task.AUXILIARY) + extra
    config = describe(auxiliary=k)
    if unsteered:
        wanted = [learned(seed, ratios=(0.1,) * k) for seed in notes.seeds]
        notes.add(runs, "K yoto", config, wanted)
        wanted = [constant(seed, (1.0,) * k) for seed in notes.seeds]
        notes.add(runs, "K equal", config, wanted)
    if steered:
        wanted = [Run("aligned", seed) for seed in notes.seeds]
        notes.add(runs, "K aligned", config, wanted)


def final_ratios(done: Finished) -> tuple[float, ...]:
    weights = {n: done.values[f"weight:{n}", None] for n in NAMES}
    return tuple(weights[n] / weights[task.PRIMARY] for n in task.AUXILIARY)


def _records(method: str, config: str, seed: int, done: Finished) -> list[Record]:
    return [
        r
        for r in contest_runs.run_records(task.UNSEEN, method, config, seed, done)
        if r["metric"] in (METRIC, "validation") or r["domain"] is None
    ]
