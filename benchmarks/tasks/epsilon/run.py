"""YOTO from many initial weights: where the weights end, and what that costs."""

from typing import Any

from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.epsilon import methods
from benchmarks.tasks.epsilon.report import conclusions, ends, figure, table
from benchmarks.tasks.epsilon.train import train
from benchmarks.tasks.frontier import outcomes
from benchmarks.tasks.frontier.problem import SEEDS, Problem
from benchmarks.tasks.frontier.problems import make
from benchmarks.tasks.frontier.run import STAGE, description, stored

RESUMABLE = True
PRESETS = ("quick", "cpu")
FEW = 5
PROBLEMS = {
    "digits": (FEW, SEEDS),
    "missing_labels": (FEW, SEEDS),
    "segmentation": (FEW, SEEDS),
    "burgers": (STAGE, SEEDS),
}
"""The problems, of the frontier; how many seeds of each the arms are worth that only
show where weights end, and the contenders."""
GRIDS = ("digits",)
REFERENCES = ("equal", "share 1")
"""Methods of the frontier that are shown beside, with its search."""

Line = dict[str, Any]


def main(options: Options) -> None:
    options.refuse_data()
    if options.steps is not None:
        raise UsageError("the problems know their steps: drop --steps")
    names = chosen(options.extra.get("problems"), options.preset)
    lines: list[Line] = []
    about = {}
    for name in names:
        problem = make(name, options.preset)
        found = run(name, problem, options)
        lines += found
        if found:
            about[name] = description(name, problem)
    known = references(about, options)
    result = write_json(
        options.out / "epsilon.json",
        meta(
            options,
            seconds=sum(x["seconds"] for x in lines),
            few={name: PROBLEMS[name][0] for name in about},
            problems=about,
            references=known,
        ),
        [
            record(
                x["method"],
                "test",
                x["looks"]["test"][-1],
                seed=x["seed"],
                domain=x["problem"],
            )
            for x in lines
        ],
        runs=lines,
    )
    figure(result, options.out / "epsilon.png")
    show(table(result))
    show(ends(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'epsilon.json'}, {options.out / 'epsilon.png'}")


def chosen(names: str | None, preset: str = "cpu") -> tuple[str, ...]:
    """The problems that were asked for; by default all, or one to try them."""
    every = list(PROBLEMS)[: 1 if preset == "quick" else None]
    wanted = every if names is None else names.split(",")
    if unknown := sorted(set(wanted) - set(PROBLEMS)):
        raise UsageError(
            f"unknown problem {', '.join(map(repr, unknown))}: there are "
            f"{', '.join(PROBLEMS)}"
        )
    return tuple(name for name in PROBLEMS if name in wanted)


def run(name: str, problem: Problem, options: Options) -> list[Line]:
    """All lines of one problem."""
    own = Options(
        options.benchmark, preset=options.preset, out=options.out, resume=options.resume
    )
    units = Units(own, f"epsilon-{name}", problem=name)
    arms = methods.arms(problem.task, grid=name in GRIDS)
    few, seeds = (min(options.seeds, most) for most in PROBLEMS[name])
    chosen = options.choose(tuple(arms))
    contenders = [method for method in chosen if not arms[method].few]
    others = [method for method in chosen if arms[method].few]
    stages = [(range(few), [*contenders, *others])]
    if seeds > few:
        stages.append((range(few, seeds), contenders))
    known = {(x["method"], x["seed"]): x for x in stored(name, problem, options)}
    lines: list[Line] = []
    for stage, names in stages:
        for method in names:
            unit = f"{method}, seeds {stage[0]} to {stage[-1]}"
            if all((method, seed) in known for seed in stage):
                lines += [known[method, seed] for seed in stage]
                continue
            if options.extra.get("collect") and unit not in units:
                continue

            def work(
                method: str = method, stage: range = stage, unit: str = unit
            ) -> Any:
                say(f"{name}: {unit}")
                return train(problem, arms[method], stage)

            lines += [
                {"problem": name, "method": method, "seed": seed, **line}
                for seed, line in zip(stage, units.do(unit, work), strict=True)
            ]
    lines.sort(key=lambda line: (chosen.index(line["method"]), line["seed"]))
    return lines


def references(about: dict[str, Any], options: Options) -> dict[str, Any]:
    """Tests by problem, method and seed from the stored frontier, if it is the same."""
    from benchmarks.__main__ import RESULTS

    path = RESULTS / "frontier.json"
    if not path.is_file():
        return {}
    stored = read_json(path)
    lines, found = stored["runs"], {}
    for name, what in about.items():
        if stored["meta"]["problems"].get(name) != what:
            continue
        tests = {
            method: outcomes.outcome(lines, name, method).tests for method in REFERENCES
        }
        tests["search"] = outcomes.searched(lines, name).tests
        found[name] = {
            method: {str(seed): x for seed, x in of_seeds.items()}
            for method, of_seeds in tests.items()
        }
    return found
