"""Digits under shift: one run with learned loss weights against a search for them.

Every method trains the same model on the same data with the same seeds. Searches
choose on the validation images at the strengths of training. The test images, at
strengths never trained on, choose nothing.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

import yoto_jax as yoto
from benchmarks.harness import common, conditional, contest, experiment, plots, searches
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.harness.experiment import Run
from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST, verdict
from benchmarks.tasks.digits import task

RESUMABLE = True
CONDITIONAL = tuple(conditional.LABELS)
METHODS = ("yoto", "paper", "equal", *CONDITIONAL, "grid", "random")
LEARNED = ("yoto", "paper")
SEARCHES = ("grid", "random")
STEPS = {"quick": 20, "cpu": 2000, "gpu": 20_000}

LEARNING_RATE = 1e-3
RANDOM_DRAWS = len(task.GRID)
BOUNDS = (0.01, 100.0)  # of random search
CONDITIONED = ((0.1, 10.0),) * len(task.AUXILIARY)  # those of the grid
ROUNDS = {"quick": 1, "cpu": 9, "gpu": 9}  # of timing
QUICK = tuple(m for m in METHODS if m not in CONDITIONAL[1:])
PAPER_RHO = 20.0
HISTORY_POINTS = 100

ROWS = {  # (method, config or None for the only one): name in the table
    ("yoto", None): "YOTO, rho={rho} (default)",
    ("paper", None): "YOTO, rho={rho} (paper)",
    ("equal", None): "equal weights",
    **{(name, None): label for name, label in conditional.LABELS.items()},
    ("grid", VALIDATED): "grid, best by validation",
    ("random", VALIDATED): "random, best by validation",
    ("grid", MEDIAN): "grid, median point",
    ("grid", WORST): "grid, worst point",
    ("grid", ORACLE): "grid, best on test (oracle)",
}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(METHODS)
    if options.methods is None and options.preset == "quick":
        methods = QUICK
    steps = options.steps or STEPS[options.preset]
    data = task.load()
    records = task.regulariser_records("all")
    history = []
    units = common.Units(options)
    for method in (m for m in methods if m not in CONDITIONAL):
        work = functools.partial(finish, method, data, options.seeds, steps)
        found = units.do(method, work)
        records += found["records"]
        history += found["history"]
    if asked := [m for m in methods if m in CONDITIONAL]:
        work = functools.partial(run_conditional, asked, data, options, steps)
        records += units.do(", ".join(asked), work)
    settings = {"steps": steps, "seeds": options.seeds, "batch": task.BATCH}
    result = common.write_json(
        options.out / "digits.json",
        common.meta(options, **settings),
        records,
        history=history,
    )
    figure(result, options.out / "digits.png")
    common.show(table(result), summary(result))
    for sentence in conclusions(result):
        common.say(f"- {sentence}")
    common.say(f"Written: {options.out / 'digits.json'}, {options.out / 'digits.png'}")


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


def optimizer(rho: jax.Array) -> optax.GradientTransformation:
    return yoto.adamw(LEARNING_RATE, hyperparameter_decay=rho)


def run(
    method: str, data: task.Data, seeds: int, steps: int
) -> tuple[task.Outcome, list[Record]]:
    """Train and measure all runs of a method."""
    runs = configurations(method, seeds)
    cost = runs.rho.shape[1]
    outcome = task.train(data.train, optimizer, runs, steps, method)
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
    for metric in ("run_seconds", "compile_seconds"):
        # Seeds share a program; a search repeated for each of them is counted once.
        seconds = getattr(outcome, metric) / (seeds if metric == "run_seconds" else 1)
        records.append(common.record(method, metric, seconds, compute=cost))
    return outcome, records


def finish(method: str, data: task.Data, seeds: int, steps: int) -> dict[str, Any]:
    """What is kept of a method."""
    outcome, records = run(method, data, seeds, steps)
    history = thinned(method, outcome) if method in LEARNED else []
    return {"records": records, "history": history}


def run_conditional(
    methods: list[str], data: task.Data, options: Options, steps: int
) -> list[Record]:
    """Train one conditional model per seed, and choose its weights in each way."""
    seeds = options.seeds
    made = task.as_task(data, steps, seeds, LEARNING_RATE)
    # Shifts alone: the invariance is one of raw features, and a model that can scale
    # them has an easy way to make it small (found on validation images).
    rules = contest.rules(CONDITIONED, where=lambda path, leaf: leaf.ndim == 1)
    runs = experiment.Runs(
        made, rules, options.out, resume=options.resume, planned=seeds * len(methods)
    )
    finished = {
        method: runs.finish([Run(method, seed) for seed in range(seeds)], method)
        for method in methods
    }
    timed = {name: (rules[name], {}) for name in (contest.PLAIN, "conditional")}
    rounds = ROUNDS[options.preset]
    ratios = experiment.step_ratios(made, timed, contest.PLAIN, rounds)
    ratio = float(np.median(ratios["conditional"]))
    records = []
    for method, found in finished.items():
        for seed, done in enumerate(found):
            cost = common.rounded(ratio * done.cost)
            records += contest.run_records(task.UNSEEN, method, "", seed, done, cost)
        seconds = sum(done.seconds * done.cost for done in found)
        records.append(common.record(method, "run_seconds", seconds / seeds))
    return records


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
        return common.describe(rho=runs.rho[seed, i], epsilon=runs.epsilon[seed, i, 0])
    return task.describe_ratios(runs.epsilon[seed, i])


def thinned(method: str, outcome: task.Outcome) -> list[dict[str, Any]]:
    """Weights and losses over time, averaged over stretches of steps."""
    kinds = {"weights": outcome.weights, "losses": outcome.losses}

    def of_seed(seed: int) -> dict[str, Any]:
        curves = {
            kind: {name: curve[seed, 0] for name, curve in named.items()}
            for kind, named in kinds.items()
        }
        return common.thinned_curves(curves, HISTORY_POINTS)

    seeds = range(len(outcome.weights[task.PRIMARY]))
    return [{"method": method, "seed": seed, **of_seed(seed)} for seed in seeds]


# What follows reads the stored result and nothing else.


def _unseen(records: list[Record]) -> np.ndarray:
    """Accuracy averaged over the unseen shifts, one value for each seed and run."""
    shifts = [common.values(records, metric="accuracy", domain=d) for d in task.UNSEEN]
    return np.mean(shifts, axis=0)


def _of(result: Result, method: str, config: str | None = None) -> list[Record]:
    records = common.select(result["records"], method=method)
    return records if config is None else common.select(records, config=config)


def table(result: Result) -> Table:
    columns = ["method", "clean", *task.UNSEEN, "mean unseen", "runs", "seconds"]
    rows = [
        [_name(result, method, config), *_row(result, method, config)]
        for method, config in ROWS
        if _of(result, method)
    ]
    meta = result["meta"]
    caption = (
        f"Test accuracy in %, mean ± standard deviation over {meta['seeds']} seeds, "
        f"{meta['steps']} steps, {meta['device']} ({meta['cpu_count']} cores). "
        "Runs and seconds: cost of one repetition, compilation apart."
    )
    return Table(columns, rows, caption)


def summary(result: Result) -> Table:
    """The table without the shifts one by one."""
    columns, rows, caption = table(result)
    kept = [i for i, column in enumerate(columns) if column not in task.UNSEEN]
    return Table(
        [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], caption
    )


def _name(result: Result, method: str, config: str | None) -> str:
    settings = _of(result, method)[0]["config"] if method in LEARNED else ""
    return ROWS[method, config].format(**common.parse(settings))


def _row(result: Result, method: str, config: str | None) -> list[str]:
    records = _of(result, method, config)
    (seconds,) = common.select(_of(result, method), metric="run_seconds")
    compute = _compute(records)
    repeated = 1 if method in CONDITIONAL else compute / seconds["compute"]
    return [
        *(
            common.mean_sd(
                common.values(records, metric="accuracy", domain=domain), scale=100
            )
            for domain in ("clean", *task.UNSEEN)
        ),
        common.mean_sd(_unseen(records), scale=100),
        f"{compute:.3g}",
        f"{seconds['value'] * repeated:.1f}",
    ]


def _compute(records: list[Record]) -> float:
    measured = common.select(records, metric="accuracy")
    return float(np.mean([record["compute"] for record in measured]))


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    rivals = [("grid", VALIDATED), ("random", VALIDATED), ("equal", None)]
    sentences = []
    if _of(result, "yoto"):
        present = [rival for rival in rivals if _of(result, rival[0])]
        sentences += [_comparison(result, *rival) for rival in present]
        if _of(result, "grid"):
            sentences.append(_cause(result))
    if _of(result, "conditional"):
        rivals += [("yoto", None), ("paper", None)]
        present = [rival for rival in rivals if _of(result, rival[0])]
        sentences += [_comparison(result, *r, ours="conditional") for r in present]
    sentences += [_hold(result, method) for method in LEARNED if _of(result, method)]
    return sentences


def _comparison(
    result: Result, method: str, config: str | None, ours: str = "yoto"
) -> str:
    name = "YOTO" if ours == "yoto" else "one conditional model"
    mine, theirs = _of(result, ours), _of(result, method, config)
    difference = _unseen(mine) - _unseen(theirs)
    outcome = {
        0: "not told apart by these seeds (within 95 %)",
        1: f"{name} is ahead",
        -1: f"{name} is behind",
    }[verdict(difference)]
    return (
        f"{name} against {_name(result, method, config)}: "
        f"{common.mean_sd(difference, scale=100)} points on unseen shifts, for "
        f"{_compute(mine):.3g} against {_compute(theirs):g} training runs; {outcome}."
    )


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.2g}" for name, number in numbers.items())


def _cause(result: Result) -> str:
    """Where the weights went, and why not where the grid found the best ones."""
    ours, grid = _of(result, "yoto"), _of(result, "grid", VALIDATED)
    learned, searched = task.mean_of(ours, "weight"), task.mean_of(grid, "weight")
    losses = task.mean_of(ours, "loss")
    composite = sum(learned[name] * losses[name] for name in task.LOSSES)
    wanted = max(task.LOSSES, key=lambda name: searched[name] / learned[name])
    text = (
        f"Weights at the end of YOTO: {_listed(learned)}; the grid's choice: "
        f"{_listed(searched)}."
    )
    if verdict(_unseen(ours) - _unseen(grid)) < 0:
        text += (
            f" The grid's choice weighs {wanted} "
            f"{searched[wanted] / learned[wanted]:.2g} times as much."
        )
        if losses[wanted] > composite:
            text += (
                f" Likely cause: weight flows to small losses, and {wanted} "
                f"({losses[wanted]:.2g}) lies above the composite loss "
                f"({composite:.2g}), so descent lowers its weight."
            )
        else:
            text += (
                f" Likely cause: the regulariser or the short run, because descent "
                f"raises the weight of {wanted} ({losses[wanted]:.2g}), which lies "
                f"below the composite loss ({composite:.2g})."
            )
    return text


def _hold(result: Result, method: str) -> str:
    """How far the losses moved the weights from where the regulariser wants them."""
    furthest, factor = task.distance(
        task.mean_of(_of(result, method), "weight"),
        task.mean_of(_of(result, "regulariser"), "weight"),
    )
    return (
        f"{_name(result, method, None)}: the weights end within a factor of "
        f"{factor:.2g} ({furthest}) of those that the regulariser alone would choose."
    )


# The figure.


def figure(result: Result, path: Path) -> None:
    """Weights and losses over time, and accuracy against cost."""
    history = [h for h in result["history"] if h["method"] == "yoto"]
    drawing = Figure(figsize=(12.5, 4.4), dpi=110, layout="constrained")
    widths = (1, 1, 1.35) if history else (1,)
    panels = drawing.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if history:
        _draw_history(panels[0], history, "weights")
        _draw_history(panels[1], history, "losses")
        alone = task.mean_of(_of(result, "regulariser"), "weight")
        for name, color in plots.LOSS_COLORS.items():
            panels[0].axhline(alone[name], color=color, linestyle=(0, (1, 3)), zorder=0)
        panels[0].plot(
            [], [], color=plots.GREY, linestyle=":", label="regulariser alone"
        )
        panels[0].set(title="YOTO: loss weights", ylabel="loss weight (sum: 1)")
        panels[1].set(title="YOTO: training losses", ylabel="loss")
        drawing.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower left",
            ncols=4,
            frameon=False,
        )
    _draw_accuracy(panels[-1], result)
    plots.save(drawing, path)


def _draw_history(panel: Axes, history: list[dict[str, Any]], what: str) -> None:
    """Mean over seeds, and the range of the seeds as a band."""
    for name, color in plots.LOSS_COLORS.items():
        curves = np.array([h[what][name] for h in history])
        step = history[0]["step"]
        plots.band(panel, step, curves, color, name)
    panel.set(xlabel="training step")
    plots.plain_log_axis(panel)


def _draw_accuracy(panel: Axes, result: Result) -> None:
    points = [  # method, config, marker, colour, shift that keeps points apart
        ("yoto", None, "o", plots.BLUE, 0.0),
        ("paper", None, "v", plots.SKY, 0.25),
        ("equal", None, "s", plots.BLACK, -0.25),
        ("conditional", None, "P", plots.VERMILION, 0.0),
        ("grid", VALIDATED, "D", plots.ORANGE, 0.15),
        ("grid", ORACLE, "*", plots.PURPLE, -0.15),
    ]
    for method, config, marker, color, shift in points:
        if records := _of(result, method, config):
            accuracy = 100 * _unseen(records)
            panel.errorbar(
                _compute(records) + shift,
                accuracy.mean(),
                accuracy.std(ddof=1) if len(accuracy) > 1 else None,
                fmt=marker,
                color=color,
                capsize=3,
                markersize=8,
                label=_name(result, method, config),
            )
    if _of(result, "random"):
        curve = best_of_n(result, "random")
        panel.plot(
            np.arange(1, len(curve) + 1),
            100 * curve,
            color=plots.GREEN,
            marker=".",
            zorder=0,
            label="random, best of n by validation",
        )
    if grid := _of(result, "grid", WORST):
        panel.axhline(
            100 * _unseen(grid).mean(),
            color=plots.GREY,
            linestyle=":",
            label=_name(result, "grid", WORST),
        )
    panel.set(
        title="Accuracy against cost",
        xlabel="cost (training runs)",
        ylabel="accuracy, mean over unseen shifts (%)",
    )
    panel.xaxis.set_major_locator(MultipleLocator(1))
    panel.legend(fontsize=8, loc="lower right")


def best_of_n(result: Result, method: str) -> np.ndarray:
    """Expected test accuracy of the validated best among n runs, for every n."""
    searched = [r for r in _of(result, method) if "=" in r["config"]]
    curves = []
    for seed in range(result["meta"]["seeds"]):
        of_seed = common.select(searched, seed=seed)
        validation = common.values(of_seed, domain="validation stylised")
        curves.append(searches.best_of_n(validation, _unseen(of_seed)))
    return np.mean(curves, axis=0)
