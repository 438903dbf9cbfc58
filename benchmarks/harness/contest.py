"""What the benchmarks of the paper's tasks share: methods, table, sentences, figure."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import yoto_jax as yoto
from benchmarks.harness import common, conditional, experiment, plots, searches
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.harness.experiment import Finished, Rule, Run, Runs, Task
from benchmarks.harness.searches import (
    MEDIAN,
    ORACLE,
    VALIDATED,
    WORST,
    Ratios,
    Search,
    verdict,
)

BUDGETS = (5, 10, 15)
SWEEP = 15  # runs side by side, to measure what that gains
NONE = 1e-30  # the weight of a loss that is left out; its logarithm is finite
STEERED_EVERY = 10  # steps between two looks at held-out data

weightings = yoto.weightings


def _steered(weighting: yoto.LossWeighting) -> yoto.LossWeighting:
    return weightings.every(weighting, STEERED_EVERY)


def _grap(task: Task) -> yoto.LossWeighting:
    del task
    return _steered(conditional.held_out_grap())


def _aligned(task: Task) -> yoto.LossWeighting:
    # As many logits' worth of movement in a run of any length.
    rate = 10 * STEERED_EVERY / task.steps
    optimizer = yoto.adamw(rate, hyperparameter_decay=0.1)
    return _steered(
        weightings.softmax_alignment(experiment.DOWNSTREAM, optimizer=optimizer)
    )


def _weighted(make: Callable[[Task], yoto.LossWeighting], **options: Any) -> Rule:
    return experiment.Weighted(make, **options)


_steered_rule = functools.partial(_weighted, steered=True, side_by_side=False)
SOFTMAX, PLAIN = "softmax", "plain"
RULES: dict[str, Rule] = {
    SOFTMAX: experiment.Softmax(),
    PLAIN: _weighted(lambda task: weightings.equal()),
    "uncertainty": _weighted(lambda task: weightings.uncertainty()),
    "famo": _weighted(lambda task: weightings.famo()),
    "dwa": _weighted(lambda task: weightings.dwa(window=max(1, task.steps // 20))),
    "geometric": _weighted(lambda task: weightings.geometric()),
    "grap": _steered_rule(_grap),
    "aligned": _steered_rule(_aligned),
}


class Method(NamedTuple):
    """A way to come to loss weights."""

    label: str
    rule: str = SOFTMAX
    config: dict[str, Any] | None = None
    search: Callable[[int], Search] | None = None


class Contest(NamedTuple):
    """What is particular to a task.

    Attributes:
      task: The task.
      metric: Which one the figure and the sentences are about.
      better: 1 if more of it is better, else -1.
      unit: Of the metric, for axes.
      seen: The test domain like the training data.
      unseen: The test domains that are not.
      methods: All of them, in the order of the table.
      rules: Those that the methods refer to, by name.
    """

    task: Task
    metric: str
    better: int
    unit: str
    seen: str
    unseen: tuple[str, ...]
    methods: dict[str, Method]
    rules: dict[str, Rule]


def rules(bounds: Sequence[tuple[float, float]], **options: Any) -> dict[str, Rule]:
    """The rules of a task, whose conditional models know weights in this box."""
    return {**RULES, **conditional.rules(bounds, **options)}


def methods(
    auxiliary: int,
    grid: Sequence[Ratios],
    bounds: Sequence[tuple[float, float]],
    published: Ratios,
    paper: dict[str, Any],
    rhos: Sequence[float],
    budget: int | None = None,
) -> dict[str, Method]:
    """The contestants.

    Args:
      auxiliary: K, the number of auxiliary losses.
      grid: The points of the paper's grid.
      bounds: The box for random and Bayesian search.
      published: The weights of the method that the paper starts from.
      paper: The paper's settings of YOTO: rho, epsilon and the optimizer of the logits.
      rhos: Other values of rho, with the paper's settings otherwise.
      budget: At most so many runs of a search (default: as in the paper).
    """
    most = max(BUDGETS) if budget is None else budget
    constant = lambda *ratios: {"ratios": ratios, "learn": 0.0}
    library = {"ratios": (0.1,) * auxiliary}
    names = {"sgd": "SGD"} if paper.get("sgd") else {}
    optimizer = names.get("sgd", "Adam")
    epsilon = paper["ratios"][0]
    bayesian = lambda name: lambda seed: searches.Bayesian(name, bounds, most, seed)
    return {
        "primary": Method("primary loss alone", config=constant(*(NONE,) * auxiliary)),
        "equal": Method("equal weights", config=constant(*(1.0,) * auxiliary)),
        "published": Method("published weights", config=constant(*published)),
        "yoto": Method("YOTO, library defaults", config=library),
        "paper": Method(
            f"YOTO, paper's settings (rho {paper['rho']:g}, epsilon {epsilon:.2g}, "
            f"{optimizer})",
            config=paper,
        ),
        **{
            f"rho-{rho:g}": Method(f"- rho {rho:g}", config=paper | {"rho": rho})
            for rho in rhos
        },
        "auxiliary": Method(
            "- entropy of the auxiliary losses alone", config=paper | {"auxiliary": 1.0}
        ),
        "coupled": Method(
            "- decay through momentum, times alpha (logits by SGD)",
            config=paper | {"coupled": 1.0, "sgd": 1.0},
        ),
        "normalized": Method(
            "YOTO on losses divided by their running means",
            config=library | {"normalize": 1.0},
        ),
        "initial": Method(
            "YOTO on losses divided by their first values",
            config=library | {"normalize": 1.0, "decay": 1.0},
        ),
        "uncertainty": Method("uncertainty weighting", "uncertainty"),
        "famo": Method("FAMO", "famo"),
        "dwa": Method("DWA", "dwa"),
        "geometric": Method("geometric mean", "geometric"),
        "grap": Method("GraP, held-out objective", "grap"),
        "aligned": Method("softmax alignment, held-out objective", "aligned"),
        **{name: Method(label, name) for name, label in conditional.LABELS.items()},
        "grid": Method(
            "grid", search=lambda seed: searches.Points(list(grid)[:budget])
        ),
        "random": Method(
            "random", search=lambda seed: searches.random(bounds, most, seed)
        ),
        "tpe": Method("Bayesian (TPE)", search=bayesian("tpe")),
        "gp": Method("Bayesian (GP)", search=bayesian("gp")),
    }


SEARCHES = ("grid", "random", "tpe", "gp")
CONSTANT = ("primary", "equal", "published", *SEARCHES)
"""Methods that train with constant weights: the unit of cost."""
DRAWN = ("yoto", "paper", "grap", "aligned")
"""Methods whose weights over time are drawn; those and other values of rho are kept."""
QUICK = ("equal", "yoto", "paper", "aligned", "grid", "random", "tpe")
"""What the quick preset runs: every kind of method, in two compiled programs."""


def available(names: Sequence[str], asked: bool) -> tuple[str, ...]:
    """Without Gaussian processes where PyTorch is missing, unless asked for."""
    if "gp" not in names or searches.has_gp():
        return tuple(names)
    if asked:
        raise common.UsageError(
            "method gp needs PyTorch: pip install 'yoto_jax[search]'"
        )
    common.say("gp is left out: it needs PyTorch (pip install 'yoto_jax[search]')")
    return tuple(name for name in names if name != "gp")


def check(contest: Contest, options: Options) -> tuple[str, ...]:
    """The methods to run, before anything is made that takes a while."""
    chosen = options.choose(tuple(contest.methods))
    if options.methods is None and options.preset == "quick":
        chosen = QUICK
    return available(chosen, options.methods is not None)


# Runs.


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
        config = experiment.settings(**(method.config or {}))
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
            config = describe(contest.task, ratios)
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
            Run(SOFTMAX, seed, experiment.settings(ratios=ratios, learn=0.0))
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


def describe(task: Task, ratios: Ratios) -> str:
    return common.describe(
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
        common.record(
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


CONSTANT_PREDICTION = "constant"


def constant_records(
    unseen: Sequence[str], found: dict[tuple[str, str], float]
) -> list[Record]:
    """What predicting without looking is worth, by metric and domain."""
    return [
        common.record(
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
    ratios = experiment.step_ratios(contest.task, rules, PLAIN, rounds)
    measured = {(name, "step_ratio"): seen for name, seen in ratios.items()}
    speed = experiment.sweep_speed(contest.task, RULES[SOFTMAX], config, SWEEP, rounds)
    measured[f"{SWEEP} side by side", "speed"] = speed
    return [
        common.record(name, f"{metric}:{what}", np.percentile(seen, at))
        for (name, metric), seen in measured.items()
        for what, at in (("median", 50), ("low", 25), ("high", 75))
    ]


def timed(rule: str) -> str:
    """The rule whose step is timed for it: variations step alike."""
    return rule.split("-")[0]


# What follows reads the stored result and nothing else.


class View(NamedTuple):
    """A result, and what is needed to read it."""

    result: Result
    labels: dict[str, tuple[str, str]]  # method: label, rule
    metric: str
    better: int
    seen: str
    unseen: tuple[str, ...]

    def of(self, method: str, config: str = "") -> list[Record]:
        found = common.select(self.result["records"], method=method, config=config)
        return [r for r in found if r["seed"] is not None]

    def searched(self, method: str) -> list[Record]:
        """The runs of a search, not the choices among them."""
        found = common.select(self.result["records"], method=method)
        return [r for r in found if "=" in r["config"]]

    def rows(self) -> dict[tuple[str, str], str]:
        """What the table has: method and config, and their name."""
        rows = {}
        for method, (label, _) in self.labels.items():
            if method not in SEARCHES:
                if self.of(method):
                    rows[method, ""] = label
                continue
            budgets = [f"{VALIDATED}, {n} runs" for n in BUDGETS]
            extra = [ORACLE, MEDIAN, WORST] if method == "grid" else []
            for config in [*(budgets if method != "grid" else []), VALIDATED, *extra]:
                if self.of(method, config):
                    rows[method, config] = f"{label}, {self._title(method, config)}"
        return rows

    def _title(self, method: str, config: str) -> str:
        if config.startswith(VALIDATED):
            return f"{VALIDATED}, {self.of(method, config)[0]['compute']:g} runs"
        if config == ORACLE:
            return "best on test (oracle)"
        return f"{config} point"

    def values(self, method: str, config: str, metric: str, domain: Any) -> np.ndarray:
        return common.values(self.of(method, config), metric=metric, domain=domain)

    def unseen_values(self, method: str, config: str = "") -> np.ndarray:
        """The metric averaged over the unseen domains, one for each seed."""
        of_domains = [
            self.values(method, config, self.metric, domain) for domain in self.unseen
        ]
        return np.mean(of_domains, axis=0)

    def constant(self) -> float | None:
        """The metric of predicting without looking, averaged over unseen domains."""
        records = common.select(self.result["records"], method=CONSTANT_PREDICTION)
        records = common.select(records, metric=self.metric)
        found = [common.values(records, domain=domain) for domain in self.unseen]
        return float(np.mean(found)) if np.size(found) else None

    def runs(self, method: str, config: str = "") -> float:
        """Total cost in units of one run with constant weights."""
        ratio = 1.0
        if method not in CONSTANT:
            ratio = self.step_ratio(self.labels[method][1])
        costs = [record["compute"] for record in self.of(method, config)]
        return float(ratio * np.mean(costs))

    def step_ratio(self, rule: str, what: str = "median") -> float:
        records = self.result["records"]
        found = common.values(records, method=timed(rule), metric=f"step_ratio:{what}")
        return float(found[0]) if len(found) else float("nan")

    def weights(self, method: str, config: str, names: Sequence[str]) -> str:
        """Final weights, the primary loss first."""
        return " / ".join(
            f"{self.values(method, config, f'weight:{n}', None).mean():.2g}"
            for n in names
        )


def view(contest: Contest, result: Result) -> View:
    labels = {name: (m.label, m.rule) for name, m in contest.methods.items()}
    return View(
        result,
        labels,
        contest.metric,
        contest.better,
        contest.seen,
        contest.unseen,
    )


def table(seen: View, names: Sequence[str], caption: str) -> Table:
    """The main table: the metric by domain, its mean, the cost, the final weights."""
    columns = ["method", seen.seen, *seen.unseen, "mean unseen", "runs", "weights"]
    rows = []
    for (method, config), label in seen.rows().items():
        of_domains = [
            common.mean_sd(seen.values(method, config, seen.metric, domain))
            for domain in (seen.seen, *seen.unseen)
        ]
        rows.append(
            [
                label,
                *of_domains,
                common.mean_sd(seen.unseen_values(method, config)),
                f"{seen.runs(method, config):.3g}",
                seen.weights(method, config, names),
            ]
        )
    return Table(columns, rows, caption)


def short(full: Table, seen: View) -> Table:
    """The methods that a user would choose from, without the domains one by one."""
    kept = [i for i, c in enumerate(full.columns) if c not in (*seen.unseen, "weights")]
    chosen = [
        row
        for (method, config), row in zip(seen.rows(), full.rows, strict=True)
        if config in ("", VALIDATED, ORACLE, WORST)
        and method in (*SEARCHES, *_MARKS)
        and method not in ("normalized", "dwa", "geometric")
    ]
    return Table(
        [full.columns[i] for i in kept],
        [[row[i] for i in kept] for row in chosen],
        full.caption.split(" Weights:")[0],
    )


DIGEST = {
    ("primary", ""): "the primary loss alone",
    ("equal", ""): "equal weights",
    ("published", ""): "published weights",
    ("yoto", ""): "YOTO, defaults of the library",
    ("paper", ""): "YOTO, settings of the paper",
    ("grap", ""): "GraP, held-out objective",
    ("aligned", ""): "softmax alignment, held-out objective",
    ("conditional", ""): "one conditional model, best weights by validation",
    ("conditional-narrowed", ""): "one conditional model, narrowed by validation",
    ("random", f"{VALIDATED}, 5 runs"): "5 random draws, best by validation",
    ("random", VALIDATED): "15 random draws, best by validation",
    ("gp", VALIDATED): "15 runs of Bayesian search (GP), best by validation",
    ("grid", VALIDATED): "the paper's grid, best by validation",
    ("grid", ORACLE): "the paper's grid, its best point by the test (nobody has that)",
    ("grid", WORST): "the paper's grid, its worst point by the test",
}


def digest(views: dict[str, View]) -> Table:
    """Tasks side by side: the metric on unseen domains, and the cost in runs."""
    without = []
    for seen in views.values():
        constant = seen.constant()
        without += ["" if constant is None else f"{constant:.1f}", "0"]
    rows = [["the usual value of each pixel, no image", *without]]
    for (method, config), label in DIGEST.items():
        cells = []
        for seen in views.values():
            there = bool(seen.of(method, config))
            found = seen.unseen_values(method, config) if there else []
            cells.append(common.mean_sd(found) if there else "")
            cells.append(f"{seen.runs(method, config):.3g}" if there else "")
        rows.append([label, *cells])
    columns = ["weights"]
    for name, seen in views.items():
        columns += [f"{name} ({seen.metric})", "runs"]
    return Table(
        columns,
        rows,
        "Means over the unseen domains in %, mean ± standard deviation over seeds; "
        "runs: total cost in units of one run with constant weights. Validation "
        "chooses for each seed, the test one point for all.",
    )


def cost_table(seen: View) -> Table:
    """What a step costs, relative to one with constant weights."""
    names = {SOFTMAX: "YOTO and its variants", f"{PLAIN} again": "the same step again"}
    names |= {"conditional": "one conditional model, the weights chosen afterwards"}
    names |= {rule: label for label, rule in seen.labels.values() if rule not in names}
    rows = [
        [label, f"{ratio:.3f} ({low:.3f} to {high:.3f})"]
        for rule, label in names.items()
        if timed(rule) == rule
        if (ratio := seen.step_ratio(rule)) == ratio
        for low, high in [(seen.step_ratio(rule, "low"), seen.step_ratio(rule, "high"))]
    ]
    speed = {
        what: common.values(seen.result["records"], metric=f"speed:{what}")
        for what in ("median", "low", "high")
    }
    caption = (
        "Time of a step over that of one with constant weights: median and quartiles "
        "of rounds in turns."
    )
    if len(speed["median"]):
        caption += (
            f" {SWEEP} runs side by side in one program take as long as "
            f"{SWEEP / speed['median'][0]:.1f} one by one "
            f"({speed['median'][0]:.2f} times faster, quartiles "
            f"{speed['low'][0]:.2f} to {speed['high'][0]:.2f})."
        )
    return Table(["rule", "step"], rows, caption)


def claims(seen: View) -> Table:
    """The paper's claims, and what these numbers say."""
    rows = []

    def add(claim: str, ours: tuple[str, str], theirs: tuple[str, str]) -> None:
        if not (seen.of(*ours) and seen.of(*theirs)):
            return
        difference = seen.better * (
            seen.unseen_values(*ours) - seen.unseen_values(*theirs)
        )
        outcome = {
            1: "ahead (95 %): held",
            0: "not told apart by these seeds",
            -1: "behind (95 %): did not hold",
        }[verdict(difference)]
        rows.append([claim, common.mean_sd(difference), outcome])

    for method, label in (("paper", "paper's settings"), ("yoto", "our defaults")):
        mine = (method, "")
        add(f"YOTO ({label}) beats the best grid point", mine, ("grid", ORACLE))
        add("- the validated best of the grid", mine, ("grid", VALIDATED))
        add("- random search, all its runs", mine, ("random", VALIDATED))
        add("- Bayesian search (TPE), all its runs", mine, ("tpe", VALIDATED))
        add("- Bayesian search (GP), all its runs", mine, ("gp", VALIDATED))
        add("- the published weights", mine, ("published", ""))
        add("- equal weights", mine, ("equal", ""))
        add("- the primary loss alone", mine, ("primary", ""))
    for method in ("conditional", "conditional-narrowed"):
        if method not in seen.labels:
            continue
        label = seen.labels[method][0]
        add(
            f"One model, {label}, beats the best grid point",
            (method, ""),
            ("grid", ORACLE),
        )
        add("- the validated best of the grid", (method, ""), ("grid", VALIDATED))
        add("- YOTO (our defaults)", (method, ""), ("yoto", ""))
        add("- equal weights", (method, ""), ("equal", ""))
        add("- the primary loss alone", (method, ""), ("primary", ""))
    rows += _steadiness(seen)
    best = best_train_once(seen)
    if best:
        label = seen.labels[best][0]
        add(
            f"{label} (best of the train-once methods, a choice made on the test) "
            "beats the best grid point",
            (best, ""),
            ("grid", ORACLE),
        )
        add("- the validated best of the grid", (best, ""), ("grid", VALIDATED))
        add("- equal weights", (best, ""), ("equal", ""))
    rows += _spread(seen)
    return Table(
        ["claim", "difference", "verdict"],
        rows,
        "Differences of the mean over unseen domains, in points, positive in favour of "
        "the claim; mean ± standard deviation over seeds. Ahead and behind: 0 is "
        "outside of Student's 95 % interval of the mean. Tukey's test takes seeds as "
        "blocks and points as independent, which neighbours on a grid are not: its p "
        "is too small by a factor of a few.",
    )


def _spread(seen: View) -> list[list[str]]:
    """Whether the points of the grid differ by more than the noise of the seeds."""
    rows = []
    for domains in ((seen.seen,), *((d,) for d in seen.unseen), seen.unseen):
        found = _grid_values(seen, domains)
        if found is None or min(found.shape) < 2:
            continue
        name = domains[0] if len(domains) == 1 else "mean unseen"
        means = found.mean(axis=1)
        rows.append(
            [
                f"weights matter: best against worst grid point, {name}",
                common.mean_sd(found[means.argmax()] - found[means.argmin()]),
                f"Tukey's range test: p = {max(range_test(found), 1e-6):.1g}",
            ]
        )
    return rows


def _grid_values(seen: View, domains: Sequence[str]) -> np.ndarray | None:
    """The metric of the points of the grid, [points, seeds]."""
    records = seen.searched("grid")
    points = dict.fromkeys(r["config"] for r in records)
    if not points:
        return None
    return np.array(
        [
            np.mean(
                [
                    common.values(
                        records, config=point, metric=seen.metric, domain=domain
                    )
                    for domain in domains
                ],
                axis=0,
            )
            for point in points
        ]
    )


def range_test(found: np.ndarray) -> float:
    """Probability that noise alone spreads the means of rows [points, seeds] so far.

    Tukey's test of the studentized range, seeds as blocks.
    """
    points, seeds = found.shape
    rows, columns = found.mean(axis=1), found.mean(axis=0)
    residual = found - rows[:, None] - columns[None] + found.mean()
    freedom = (points - 1) * (seeds - 1)
    deviation = np.sqrt((residual**2).sum() / freedom / seeds)
    spread = (rows.max() - rows.min()) / deviation
    return float(scipy.stats.studentized_range.sf(spread, points, freedom))


def _steadiness(seen: View) -> list[list[str]]:
    """What the paper says of rho and of seeds."""
    rows = []
    family = [m for m in seen.labels if m == "paper" or m.startswith("rho-")]
    family = [m for m in family if seen.of(m)]
    if len(family) > 1:
        ranked = sorted(family, key=lambda m: seen.unseen_values(m).mean())
        low, high = (seen.unseen_values(m) for m in (ranked[0], ranked[-1]))
        apart = verdict(high - low) != 0
        rows.append(
            [
                f"YOTO hardly depends on rho: best against worst of {len(family)}",
                common.mean_sd(high - low),
                "told apart: did not hold"
                if apart
                else "not told apart by these seeds",
            ]
        )
    if seen.of("paper"):
        records = seen.of("paper")
        names = [r["metric"] for r in records if r["metric"].startswith("weight:")]
        primary, *others = dict.fromkeys(names)
        weight = lambda name: common.values(records, metric=name)
        spread = [
            np.log10(weight(name) / weight(primary)).std(ddof=1)
            for name in others
            if len(weight(name)) > 1
        ]
        if spread:
            rows.append(
                [
                    "seeds end at the same weights: sd of log10 of a ratio, largest",
                    f"{max(spread):.3f}",
                    "paper: at most 0.015",
                ]
            )
    return rows


def best_train_once(seen: View) -> str | None:
    """Of the methods that learn weights in one run; a choice made on the test."""
    learned = [
        method for method in seen.labels if method not in CONSTANT and seen.of(method)
    ]
    if not learned:
        return None
    return max(learned, key=lambda m: seen.better * seen.unseen_values(m).mean())


# The figure.


def figure(seen: View, names: Sequence[str], path: Path, ylabel: str) -> None:
    """Weights over time, and the metric against total cost."""
    history = seen.result["history"]
    shown = [m for m in DRAWN if seen.of(m)]
    drawing = Figure(figsize=(13, 7.6), dpi=100, layout="constrained")
    parts: Any = drawing.subfigures(2, 1, height_ratios=(1, 1.45))
    upper, lower = parts
    colors = dict(zip(names, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=False))
    if shown:
        panels = upper.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, method in zip(panels, shown, strict=True):
            of_method = [h for h in history if h["method"] == method]
            for name in names:
                curves = np.array([h["weights"][name] for h in of_method])
                curves /= sum(
                    np.array([h["weights"][n] for h in of_method]) for n in names
                )
                plots.band(panel, of_method[0]["step"], curves, colors[name], name)
            label = seen.labels[method][0]
            panel.set_title(label.replace(" (", "\n(").replace(", held", ",\nheld"))
            panel.set(xlabel="training step", ylim=(0, 1))
        panels[0].set_ylabel("share of the weights")
        panels[0].legend(fontsize=8)
    panel = lower.subplots()
    _draw_costs(panel, seen, ylabel)
    plots.save(drawing, path)


_MARKS = {
    "primary": ("x", plots.GREY),
    "equal": ("s", plots.BLACK),
    "published": ("P", plots.BLACK),
    "yoto": ("o", plots.BLUE),
    "paper": ("o", plots.SKY),
    "normalized": ("<", plots.BLUE),
    "uncertainty": ("^", plots.GREEN),
    "famo": ("v", plots.GREEN),
    "dwa": (">", plots.GREEN),
    "geometric": ("d", plots.GREEN),
    "grap": ("D", plots.VERMILION),
    "aligned": ("*", plots.VERMILION),
    "conditional": ("p", plots.PURPLE),
    "conditional-narrowed": ("h", plots.PURPLE),
}
_CURVES = {
    "grid": plots.ORANGE,
    "random": plots.PURPLE,
    "tpe": plots.GREY,
    "gp": plots.BLACK,
}


def _draw_costs(panel: Axes, seen: View, ylabel: str) -> None:
    present = [m for m in _MARKS if seen.of(m)]
    for place, method in enumerate(present):
        marker, color = _MARKS[method]
        found = seen.unseen_values(method)
        # Methods of one run stand side by side.
        panel.errorbar(
            place - len(present),
            found.mean(),
            found.std(ddof=1) if len(found) > 1 else None,
            fmt=marker,
            color=color,
            capsize=3,
            markersize=8,
        )
    ticks = [(i - len(present), _short_label(seen, m)) for i, m in enumerate(present)]
    longest = 0
    for method, color in _CURVES.items():
        curve = search_curve(seen, method)
        if curve is not None:
            n = np.arange(1, len(curve) + 1)
            dashes = "--" if method in ("tpe", "gp") else "-"
            panel.plot(
                n,
                curve,
                color=color,
                marker=".",
                linestyle=dashes,
                label=f"{seen.labels[method][0]}: best of n by validation",
            )
            longest = max(longest, len(curve))
    for config, dashes in ((ORACLE, ":"), (WORST, "-.")):
        if seen.of("grid", config):
            level = seen.unseen_values("grid", config).mean()
            panel.axhline(
                level,
                color=plots.ORANGE,
                linestyle=dashes,
                zorder=0,
                label=f"grid: {'best' if config == ORACLE else 'worst'} on test",
            )
    if longest:
        panel.axvline(0, color=plots.GREY, lw=0.8)
        ticks += [(n, str(n)) for n in range(1, longest + 1) if n == 1 or n % 5 == 0]
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if ticks:  # None of the methods may be among those drawn.
        panel.set_xticks(*zip(*ticks, strict=True))
    for label in panel.get_xticklabels()[: len(present)]:
        label.set(rotation=35, ha="right", fontsize=8)
    panel.set_ylabel(ylabel)
    panel.set_title(
        "One training run each (left), searches by their number of runs (right); "
        "mean and standard deviation over seeds"
    )


def _short_label(seen: View, method: str) -> str:
    short = {"normalized": "YOTO, normalised", "primary": "primary loss alone"}
    label = seen.labels[method][0].split(" (")[0].replace(", held-out objective", "")
    return short.get(method, label)


def search_curve(seen: View, method: str) -> np.ndarray | None:
    """The metric of the validated best of n runs, for every n.

    Of the first n where a search learns from run to run, else of any n.
    """
    records = seen.searched(method)
    if not records:
        return None
    curves = []
    for seed in sorted({r["seed"] for r in records}):
        of_seed = common.select(records, seed=seed)
        validation = common.values(of_seed, metric="validation")
        tests = [
            common.values(of_seed, metric=seen.metric, domain=d) for d in seen.unseen
        ]
        test = np.mean(tests, axis=0)
        if method in ("tpe", "gp"):
            best = [
                searches.selections(validation[:n], test[:n])[VALIDATED]
                for n in range(1, len(test) + 1)
            ]
            curves.append(test[best])
        else:
            curves.append(searches.best_of_n(validation, test))
    return np.mean(curves, axis=0)
