"""Every way of weighting losses on every problem, against a search of 15 runs."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import searches
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import read_json, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.training import Rule, operations
from benchmarks.harness.units import Units
from benchmarks.tasks.frontier import methods, splits
from benchmarks.tasks.frontier.outcomes import (
    BAYESIAN,
    CEILING,
    contenders,
    kept,
    last,
    picked,
    records_of,
    verdicts,
)
from benchmarks.tasks.frontier.problem import SEEDS, Problem
from benchmarks.tasks.frontier.problems import FROM_FOLDER, PROBLEMS, make
from benchmarks.tasks.frontier.report import conclusions, figure, summary, table
from benchmarks.tasks.frontier.train import choosing, train

RESUMABLE = True
PRESETS = ("quick", "cpu")
QUICK_PROBLEMS = ("digits",)
QUICK = ("equal", methods.SEARCH, "yoto", "share 1")
STAGE = 3
"""Seeds that every method has; only contenders have more."""

Line = dict[str, Any]


def main(options: Options) -> None:
    if options.steps is not None:
        raise UsageError("the problems know their steps: drop --steps")
    if options.seeds > SEEDS:
        raise UsageError(f"there are data for {SEEDS} seeds at most")
    asked = options.extra.get("problems")
    if asked is None and options.preset == "quick":
        asked = ",".join((*QUICK_PROBLEMS, *(FROM_FOLDER if options.data else ())))
    names = chosen(asked, options.data)
    lines = [kept(line) for name in names for line in run(name, options)]
    seconds = sum(line["seconds"] for line in lines)  # of earlier results, too
    about = {name: description(name, _made(name, options)) for name in names}
    result = write_json(
        options.out / "frontier.json",
        meta(options, seconds=seconds, stage=STAGE, problems=about),
        records_of(lines, about),
        runs=lines,
        verdicts=verdicts(lines, about),
    )
    figure(result, options.out / "frontier.png")
    show(table(result))
    show(summary(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'frontier.json'}, {options.out / 'frontier.png'}")


def chosen(names: str | None, folder: Path | None = None) -> tuple[str, ...]:
    """The problems that were asked for; by default all that there are data for."""
    there = [name for name in PROBLEMS if folder or name not in FROM_FOLDER]
    wanted = there if names is None else names.split(",")
    if unknown := sorted(set(wanted) - set(PROBLEMS)):
        raise UsageError(
            f"unknown problem {', '.join(map(repr, unknown))}: there are "
            f"{', '.join(PROBLEMS)}"
        )
    if missing := sorted(set(wanted) - set(there)):
        raise UsageError(f"{', '.join(missing)} needs a folder of images: --data DIR")
    if folder and not set(wanted) & set(FROM_FOLDER):
        raise UsageError(f"{', '.join(wanted)}: no data folder is read, drop --data")
    return tuple(name for name in PROBLEMS if name in wanted)


def _made(name: str, options: Options) -> Problem:
    return make(name, options.preset, _folder(name, options))


def _folder(name: str, options: Options) -> Path | None:
    """The folder of a problem that reads one."""
    return options.data if name in FROM_FOLDER else None


def description(name: str, problem: Problem) -> dict[str, Any]:
    """What is known of a problem before it is trained."""
    return {
        "unit": problem.unit,
        "margin": problem.margin,
        "validated_on": problem.validated_on,
        "half": PROBLEMS[name],
        "losses": list(problem.task.names),
        "steps": problem.task.steps,
        "learning_rate": problem.task.learning_rate,
        "bounds": [list(pair) for pair in problem.bounds],
    }


def run(name: str, options: Options) -> list[Line]:
    """All lines of one problem."""
    problem = _made(name, options)
    own = _without_methods(options, _folder(name, options))
    units = Units(own, f"frontier-{name}", problem=name)
    collect = bool(options.extra.get("collect"))
    earlier = stored(name, problem, options)
    work = Work(name, problem, units, earlier, collect)
    first = range(min(options.seeds, STAGE))
    known = {line["method"] for line in earlier}
    every = options.choose(rows(problem, known), QUICK)
    lines = [line for method in every for line in work.do(method, first)]
    if options.seeds > STAGE:
        rest = range(STAGE, options.seeds)
        for method in [*contenders(lines, name), CEILING]:
            if method in every:
                lines += work.do(method, rest)
    return lines


def _without_methods(options: Options, folder: Path | None) -> Options:
    """What the files of a problem depend on: more seeds or methods go on with them."""
    return Options(
        options.benchmark,
        preset=options.preset,
        data=folder,
        out=options.out,
        resume=options.resume,
    )


def stored(name: str, problem: Problem, options: Options) -> list[Line]:
    """Lines of an earlier result with ``--resume``, if the problem is the same.

    A table that takes many hours grows from one stored result to the next.
    """
    path = options.out / f"{options.benchmark}.json"
    if not (options.resume and path.is_file()):
        return []
    result = read_json(path)
    if result["meta"]["problems"].get(name) != description(name, problem):
        return []
    return [line for line in result["runs"] if line["problem"] == name]


def rows(problem: Problem, known: Collection[str] = ()) -> tuple[str, ...]:
    """All methods of a problem, in the order of the table.

    Gaussian processes are there where PyTorch is, or if they are ``known`` already.
    """
    constants = methods.CONSTANTS + ((methods.PUBLISHED,) if problem.published else ())
    ceiling = (CEILING,) if isinstance(problem.task.data, splits.Data) else ()
    return (
        *constants,
        methods.SEARCH,
        *methods.LEARNED,
        *methods.every_entry(problem),
        *(
            name
            for name in BAYESIAN
            if BAYESIAN[name] != "gp" or searches.has_gp() or name in known
        ),
        *ceiling,
    )


class Work:
    """Trains what is neither in the file nor in an earlier result."""

    def __init__(
        self,
        name: str,
        problem: Problem,
        units: Units,
        known: Sequence[Line],
        collect: bool = False,
    ):
        """``known`` are lines of an earlier result; ``collect`` trains nothing."""
        self.collect = collect
        self.name, self.problem, self.units = name, problem, units
        self.entries = methods.every_entry(problem)
        self.known: dict[tuple[str, int], list[Line]] = {}
        for line in known:
            self.known.setdefault((line["method"], line["seed"]), []).append(line)

    def do(self, method: str, seeds: Sequence[int]) -> list[Line]:
        """The lines of a method for these seeds, a line for each run."""
        lines = [x for seed in seeds for x in self.known.get((method, seed), ())]
        left = [seed for seed in seeds if (method, seed) not in self.known]
        return lines + (self._made(method, left) if left else [])

    def _made(self, method: str, seeds: Sequence[int]) -> list[Line]:
        task = self.problem.task
        if method == methods.SEARCH:
            lines = []
            for seed in seeds:
                points = searches.random(
                    self.problem.bounds, methods.BUDGET, seed
                ).ask()
                configs = [methods.fixed(point) for point in points]
                lines += self._train(
                    method, methods.SOFTMAX, configs, [seed] * len(points)
                )
            return lines
        if method in BAYESIAN:
            return self._bayesian(method, seeds)
        if method == CEILING:
            best = picked(self.do(methods.SEARCH, seeds), self.name, max)
            if not best:  # None of the search is there to be collected.
                return []
            configs = [methods.fixed(line["ratios"]) for line in best.values()]
            return self._train(method, methods.SOFTMAX, configs, list(best))
        if method in (*methods.CONSTANTS, methods.PUBLISHED):
            config = methods.constant(task, method, self.problem.published)
            return self._same(method, methods.SOFTMAX, config, seeds)
        if method in methods.LEARNED:
            config = methods.learned(task, method)
            return self._same(method, methods.SOFTMAX, config, seeds)
        return self._same(method, self.entries[method].rule, {}, seeds)

    def _bayesian(self, method: str, seeds: Sequence[int]) -> list[Line]:
        """Points that depend on those before them: seeds side by side."""
        bounds, sampler = self.problem.bounds, BAYESIAN[method]
        of_seeds = [
            searches.Bayesian(sampler, bounds, methods.BUDGET, seed) for seed in seeds
        ]
        lines: list[Line] = []
        for run in range(methods.BUDGET):
            configs = [methods.fixed(*search.ask()) for search in of_seeds]
            found = self._train(
                method, methods.SOFTMAX, configs, list(seeds), f", run {run}"
            )
            if not found:  # Not all of them are there to be collected.
                return []
            for search, line in zip(of_seeds, found, strict=True):
                search.tell([last(line, "validation")])
            lines += found
        return lines

    def _same(
        self, method: str, rule: Rule, config: dict[str, Any], seeds: Sequence[int]
    ) -> list[Line]:
        return self._train(method, rule, [config] * len(seeds), list(seeds))

    def _train(
        self,
        method: str,
        rule: Rule,
        configs: list[dict[str, Any]],
        seeds: list[int],
        suffix: str = "",
    ) -> list[Line]:
        unit = f"{method}, seeds {min(seeds)} to {max(seeds)}{suffix}"
        if self.collect and unit not in self.units:
            return []
        entry = self.entries.get(method)
        kind = "constant" if entry is None else entry.kind
        if method in methods.LEARNED:
            kind = "library"

        def work() -> list[Line]:
            say(f"{self.name}: {unit}")
            problem = self.problem
            if method == CEILING:
                problem = problem._replace(task=splits.together(problem.task))
            found = train(problem, rule, configs, seeds)
            return [{"runs": self._runs(method, rule), **line} for line in found]

        return [
            {
                "problem": self.name,
                "method": method,
                "kind": kind,
                "ratios": list(config.get("ratios", ())) if kind == "constant" else [],
                "seed": seed,
                "runs": 1.0 if entry is None else entry.runs,
                **{name: x for name, x in done.items() if x is not None},
            }
            for config, seed, done in zip(
                configs, seeds, self.units.do(unit, work), strict=True
            )
        ]

    def _runs(self, method: str, rule: Rule) -> float | None:
        """What a step costs, if that has to be counted."""
        entry = self.entries.get(method)
        if entry is None or entry.runs is not None:
            return None
        task, plain = self.problem.task, methods.SOFTMAX
        equal = methods.constant(task, "equal", None)
        unit = operations(task, plain, equal)
        step = operations(task, rule.training, {})
        return (step + choosing(self.problem, rule) / task.steps) / unit
