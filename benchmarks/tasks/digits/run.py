"""Digits under shift: one run with learned loss weights against a search for them.

Every method trains the same model on the same data with the same seeds. Searches
choose on the validation images at the strengths of training. The test images, at
strengths never trained on, choose nothing.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import yoto_jax as yoto
from benchmarks.harness import contest, contest_runs, searches, timing
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import (
    Record,
    describe,
    record,
    rounded,
    thinned_curves,
    write_json,
)
from benchmarks.harness.rules import Weighted
from benchmarks.harness.runs import Run, Runs
from benchmarks.harness.searches import ORACLE, VALIDATED
from benchmarks.harness.terminal import say, show
from benchmarks.harness.training import Rule, Task, operations, schedule
from benchmarks.harness.units import Units
from benchmarks.tasks.digits import portfolio, task
from benchmarks.tasks.digits.methods import CONDITIONAL, LEARNED, WEIGHTED
from benchmarks.tasks.digits.report import conclusions, figure, summary, table
from yoto_jax import racing
from yoto_jax.weightings._grad_norm_balance import WARMUP

RESUMABLE = True
BY_RULE = (*WEIGHTED, *CONDITIONAL)
METHODS = ("yoto", "paper", "equal", *BY_RULE, "portfolio", "race", "grid", "random")
SEARCHES = ("grid", "random")
STEPS = {"quick": 20, "cpu": 4000, "gpu": 40_000}

LEARNING_RATE = 5e-3  # at its peak
CUTS = ((0.2, 3), (0.5, 1))  # of the race
RANDOM_DRAWS = len(task.GRID)
BOUNDS = (0.01, 100.0)  # of random search
CONDITIONED = ((0.1, 10.0),) * len(task.AUXILIARY)  # those of the grid
ROUNDS = {"quick": 1, "cpu": 9, "gpu": 9}  # of timing
QUICK = ("yoto", "equal", "share", "grid")
PAPER_RHO = 20.0
HISTORY_POINTS = 100


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(METHODS, QUICK)
    steps = options.steps or STEPS[options.preset]
    data = task.load()
    records = task.regulariser_records("all")
    history = []
    units = Units(options)
    for method in (m for m in methods if m not in BY_RULE):
        work = functools.partial(finish, method, data, options.seeds, steps)
        found = units.do(method, work)
        records += found["records"]
        history += found["history"]
    if asked := [m for m in methods if m in BY_RULE]:
        work = functools.partial(run_by_rule, asked, data, options, steps)
        records += units.do(", ".join(asked), work)
    settings = {"steps": steps, "seeds": options.seeds, "batch": task.BATCH}
    result = write_json(
        options.out / "digits.json",
        meta(options, **settings),
        records,
        history=history,
    )
    figure(result, options.out / "digits.png")
    show(table(result), summary(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {options.out / 'digits.json'}, {options.out / 'digits.png'}")


# Runs.


def configurations(method: str, seeds: int) -> task.Configurations:
    """The runs of a method, the same for all seeds but for random search."""
    if method in LEARNED:
        default = _default(yoto.adamw, "hyperparameter_decay")
        rho = PAPER_RHO if method == "paper" else default
        return task.learned([(_default(yoto.init_loss_logits, "epsilon"), rho)], seeds)
    ratios = {
        "equal": jnp.ones((1, len(task.AUXILIARY))),
        "grid": jnp.array(task.GRID),
        "race": jnp.array(task.GRID),
        "random": jnp.stack([random_ratios(seed) for seed in range(seeds)]),
    }
    return task.fixed(ratios[method], seeds)


def _default(function: Any, argument: str) -> float:
    return inspect.signature(function).parameters[argument].default


def random_ratios(seed: int) -> jax.Array:
    """Log-uniform ratios from 0.01 to 100, drawn from a key of their own."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31)
    shape = (RANDOM_DRAWS, len(task.AUXILIARY))
    low, high = np.log10(BOUNDS)
    return 10.0 ** jax.random.uniform(key, shape, minval=low, maxval=high)


@functools.cache
def optimizer(steps: int) -> task.Transformation:
    """AdamW with a warm-up and a cosine, given rho."""
    rate = schedule(LEARNING_RATE, steps)
    return lambda rho: yoto.adamw(rate, hyperparameter_decay=rho)


def run(
    method: str, data: task.Data, seeds: int, steps: int
) -> tuple[task.Outcome, list[Record]]:
    """Train and measure all runs of a method."""
    if method == "portfolio":
        return run_portfolio(data, seeds, steps)
    runs = configurations(method, seeds)
    if method == "race":
        return run_race(runs, data, steps)
    cost = runs.rho.shape[1]
    outcome = task.train(data.train, optimizer(steps), runs, steps, method)
    measured = measure(outcome, data)
    records = []
    for seed in range(seeds):
        for i in range(cost):
            config = _describe(method, runs, seed, i)
            records += task.run_records(method, config, seed, i, measured)
        if method in SEARCHES:
            for config, i in selections(measured, seed).items():
                compute = cost if config in (VALIDATED, ORACLE) else 1
                records += task.run_records(method, config, seed, i, measured, compute)
    return outcome, records + time_records(method, outcome, seeds, cost)


def run_race(
    runs: task.Configurations, data: task.Data, steps: int
) -> tuple[task.Outcome, list[Record]]:
    """Race all configurations, and measure the winner of each seed."""
    seeds, arms = runs.rho.shape
    plan = racing.plan(steps, arms, CUTS)
    outcome, winners = task.race(data, optimizer(steps), runs, plan, "race")
    measured = measure(outcome, data)
    records = []
    for seed in range(seeds):
        config = task.describe_ratios(winners.epsilon[seed, 0])
        records += task.run_records("race", config, seed, 0, measured, plan.runs)
    return outcome, records + time_records("race", outcome, seeds, plan.runs)


def run_portfolio(
    data: task.Data, seeds: int, steps: int
) -> tuple[task.Outcome, list[Record]]:
    """Race the library's portfolio, and measure the winner of each seed."""
    race = portfolio.Race(data, steps, LEARNING_RATE)
    outcome, winners = race.run(seeds)
    measured = measure(outcome, data)
    made = task.as_task(data, steps, seeds, LEARNING_RATE)
    plain = operations(made, contest.rules(CONDITIONED)[contest.PLAIN], {})
    looks = looking(made, plain)
    cost = rounded(race.plan.runs + race.plan.arms * looks)
    records = []
    for seed, name in enumerate(winners):
        records += task.run_records("portfolio", name, seed, 0, measured, cost)
    return outcome, records + time_records("portfolio", outcome, seeds, cost)


def looking(made: Task, plain: float) -> float:
    """What looking at gradients in the first steps adds to a run of plain steps."""
    balance = lambda task: yoto.weightings.grad_norm_balance(task.primary)
    return WARMUP * (operations(made, Weighted(balance), {}) / plain - 1)


def time_records(
    method: str, outcome: task.Outcome, seeds: int, cost: float
) -> list[Record]:
    """What a repetition took.

    Seeds share a program; a search repeated for each of them is counted once.
    """
    return [
        record(method, "run_seconds", outcome.run_seconds / seeds, compute=cost),
        record(method, "compile_seconds", outcome.compile_seconds, compute=cost),
    ]


def finish(method: str, data: task.Data, seeds: int, steps: int) -> dict[str, Any]:
    """What is kept of a method."""
    outcome, records = run(method, data, seeds, steps)
    history = thinned(method, outcome) if method in LEARNED else []
    return {"records": records, "history": history}


def run_by_rule(
    methods: list[str], data: task.Data, options: Options, steps: int
) -> list[Record]:
    """Train with weightings of the library, and conditional models, in lanes."""
    seeds = options.seeds
    made = task.as_task(data, steps, seeds, LEARNING_RATE)
    # Shifts alone: the invariance is one of raw features, and a model that can scale
    # them has an easy way to make it small (found on validation images).
    rules = contest.rules(CONDITIONED, where=lambda path, leaf: leaf.ndim == 1)
    nash = lambda task: yoto.weightings.nash_mtl()
    arms = racing.portfolio(task.PRIMARY, steps)
    rules |= {
        "nash_mtl": Weighted(nash),
        "nash_mtl_features": Weighted(nash, of_features=True),
        "share": Weighted(lambda task: arms["share 1"]),
    }
    runs = Runs(
        made, rules, options.out, resume=options.resume, planned=seeds * len(methods)
    )
    finished = {
        method: runs.finish([Run(method, seed) for seed in range(seeds)], method)
        for method in methods
    }
    costs = costs_of(methods, made, rules, ROUNDS[options.preset])
    records = []
    for method, found in finished.items():
        for seed, done in enumerate(found):
            cost = rounded(costs[method] * done.cost)
            records += contest_runs.run_records(
                task.UNSEEN, method, "", seed, done, cost
            )
        seconds = sum(done.seconds * done.cost for done in found)
        records.append(record(method, "run_seconds", seconds / seeds))
    return records


def costs_of(
    methods: list[str], made: Task, rules: dict[str, Rule], rounds: int
) -> dict[str, float]:
    """What a step costs, in those with constant weights.

    Steps of conditional models are timed; of weightings the operations are counted.
    """
    costs = {}
    if any(method in CONDITIONAL for method in methods):
        timed = {name: (rules[name], {}) for name in (contest.PLAIN, "conditional")}
        ratios = timing.step_ratios(made, timed, contest.PLAIN, rounds)
        ratio = float(np.median(ratios["conditional"]))
        costs = dict.fromkeys(CONDITIONAL, ratio)
    plain = operations(made, rules[contest.PLAIN], {})
    for method in set(methods) & set(WEIGHTED):
        costs[method] = (
            1 + looking(made, plain)
            if method == "share"
            else operations(made, rules[method], {}) / plain
        )
    return costs


def measure(outcome: task.Outcome, data: task.Data) -> task.Measured:
    validation = task.accuracy(outcome.model, task.validation_domains(data.validation))
    test = task.accuracy(outcome.model, task.test_domains(data.test))
    measured: task.Measured = {}
    measured |= {("accuracy", domain): x for domain, x in test.items()}
    measured |= {("accuracy", f"validation {d}"): x for d, x in validation.items()}
    last = max(1, next(iter(outcome.losses.values())).shape[-1] // 20)
    for name in task.LOSSES:
        measured[f"weight:{name}", None] = outcome.weights[name][..., -1]
        measured[f"loss:{name}", None] = outcome.losses[name][..., -last:].mean(-1)
    return measured


def selections(measured: task.Measured, seed: int) -> dict[str, int]:
    """Which run of a search each way of choosing takes."""
    test = np.mean([measured["accuracy", d][seed] for d in task.UNSEEN], axis=0)
    return searches.selections(measured["accuracy", "validation stylised"][seed], test)


def _describe(method: str, runs: task.Configurations, seed: int, i: int) -> str:
    if method in LEARNED:
        return describe(rho=runs.rho[seed, i], epsilon=runs.epsilon[seed, i, 0])
    return task.describe_ratios(runs.epsilon[seed, i])


def thinned(method: str, outcome: task.Outcome) -> list[dict[str, Any]]:
    """Weights and losses over time, averaged over stretches of steps."""
    kinds = {"weights": outcome.weights, "losses": outcome.losses}

    def of_seed(seed: int) -> dict[str, Any]:
        curves = {
            kind: {name: curve[seed, 0] for name, curve in named.items()}
            for kind, named in kinds.items()
        }
        return thinned_curves(curves, HISTORY_POINTS)

    seeds = range(len(outcome.weights[task.PRIMARY]))
    return [{"method": method, "seed": seed, **of_seed(seed)} for seed in seeds]
