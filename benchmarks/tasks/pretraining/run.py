"""Self-supervised pretraining: weights that follow few labels against a search.

VICReg has three losses. Every method trains the same encoder with the same seeds,
batches and views. A search chooses by cross-validation on the few labelled training
images; alignment (GraP) is steered by the same labels in its only run. The test images
choose nothing.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import yoto_jax as yoto
from benchmarks.harness import common, plots, searches
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST, verdict
from benchmarks.tasks.pretraining import task

RESUMABLE = True
STEPS = {"quick": 10, "cpu": 1000, "gpu": 10_000}
DRAWS = {"quick": 3, "cpu": 20, "gpu": 20}
ROUNDS = {"quick": 2, "cpu": 15, "gpu": 15}
GRID = tuple((1.0, v, c) for v, c in itertools.product((0.1, 1, 10), (0.01, 0.1, 1)))
"""Weights of invariance, variance and covariance."""

HISTORY_POINTS = 100

GRAP = "grap"
PLAIN = "plain"
CLOSED = "closed"
EQUAL = "equal"
SEARCHES = ("random", "grid")
FIXED = {EQUAL: (1.0, 1.0, 1.0), "published": task.PUBLISHED}

weightings = yoto.weightings
_aligned = functools.partial(task.Method, shared=True, downstream=True)
_shared = functools.partial(task.Method, shared=True)


def _grap(_: Any) -> yoto.LossWeighting:
    """With the settings of the published runs."""
    return weightings.grap(
        task.DOWNSTREAM,
        regularization=1.0,
        gramian_decay=0.0,
        norm_decay=0.99,
        warmup=100,
    )


LEARNED = {
    GRAP: _aligned(_grap),
    PLAIN: _aligned(_grap, weigh_heads=False),
    CLOSED: _aligned(
        lambda _: weightings.grap_closed_form(
            task.DOWNSTREAM,
            gramian_decay=0.99,
            norm_decay=0.99,
            warmup=100,
        )
    ),
    "gradnorm": _shared(lambda _: weightings.gradnorm()),
    "dwa": task.Method(lambda _: weightings.dwa(window=50)),
    "mgda": _shared(lambda _: weightings.mgda()),
    "pcgrad": _shared(lambda _: weightings.pcgrad()),
}
ALIGNED = (GRAP, PLAIN, CLOSED)
METHODS = (*ALIGNED, *FIXED, *SEARCHES, *(m for m in LEARNED if m not in ALIGNED))

PROBE = "probe"  # the metric that the figure and the sentences are about
METRICS = {
    PROBE: "linear probe",
    "knn": "k-NN",
    "probe all": "probe, all labels",
}
ROWS = {  # (method, config or None for the only one): name in the table
    (GRAP, None): "GraP",
    (PLAIN, None): "GraP, projector not weighted",
    (CLOSED, None): "GraP, closed form",
    (EQUAL, None): "equal weights",
    ("published", None): "published weights",
    ("random", VALIDATED): "random, best by validation",
    ("grid", VALIDATED): "grid, best by validation",
    ("gradnorm", None): "GradNorm",
    ("dwa", None): "DWA",
    ("mgda", None): "MGDA",
    ("pcgrad", None): "PCGrad",
    ("random", MEDIAN): "random, median draw",
    ("random", WORST): "random, worst draw",
    ("random", ORACLE): "random, best on test (oracle)",
}


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    steps = options.steps or STEPS[options.preset]
    setup, data = task.load(options.data)
    draws = DRAWS[options.preset]
    records: list[Record] = []
    history: list[dict[str, Any]] = []
    path = options.out / _file_name(setup)
    units = common.Units(options, path.stem)
    for method in methods:
        work = functools.partial(
            finish, method, setup, data, options.seeds, steps, draws
        )
        found = units.do(method, work)
        records += found["records"]
        history += found["history"]
    work = functools.partial(costs, methods, setup, data, options, steps)
    records += units.do(f"costs of {', '.join(methods)}", work)
    settings = {
        "data": setup.name,
        "training_images": len(data.labels),
        "labelled_images": len(data.labelled),
        "test_images": len(data.test_labels),
        "classes": data.classes,
        "steps": steps,
        "seeds": options.seeds,
        "batch": setup.batch,
    }
    result = common.write_json(
        path, common.meta(options, **settings), records, history=history
    )
    figure(result, path.with_suffix(".png"))
    common.show(table(result), summary(result))
    for sentence in conclusions(result):
        common.say(f"- {sentence}")
    common.say(f"Written: {path}, {path.with_suffix('.png')}")


def _file_name(setup: task.Task) -> str:
    suffix = "" if setup is task.DIGITS else f"_{setup.name}"
    return f"pretraining{suffix}.json"


# Runs.


def constant_weights(method: str, seeds: int, draws: int) -> np.ndarray:
    """The weights [seeds, runs, 3] of the runs of a method; ones if it learns them."""
    if method == "random":
        return np.stack([random_weights(seed, draws) for seed in range(seeds)])
    weights = GRID if method == "grid" else [FIXED.get(method, (1.0, 1.0, 1.0))]
    return np.tile(np.array(weights), (seeds, 1, 1))


def random_weights(seed: int, draws: int) -> np.ndarray:
    """Log-uniform from 0.01 to 100 times the weight of the invariance."""
    rng = np.random.default_rng([seed, 2**31])
    ratios = 10.0 ** rng.uniform(-2, 2, (draws, 2))
    return np.concatenate([np.ones((draws, 1)), ratios], axis=1)


def run(
    method: str,
    setup: task.Task,
    data: task.Data,
    seeds: int,
    steps: int,
    draws: int,
) -> tuple[task.Outcome, list[Record]]:
    """Train and measure all runs of a method."""
    weights = constant_weights(method, seeds, draws)
    rule = LEARNED.get(method, task.FIXED)
    total = weights.shape[1]
    # One after the other, with all seeds: so all share the one compiled program.
    outcomes = [
        task.train(
            setup, data, rule, weights[:, [i]], steps, f"{method} {i + 1}/{total}"
        )
        for i in range(total)
    ]
    measured = _concatenated([measure(setup, data, o) for o in outcomes])
    records = []
    for seed in range(seeds):
        for i in range(total):
            config = describe(weights[seed, i]) if rule is task.FIXED else ""
            records += _run_records(method, config, seed, i, measured)
        if method in SEARCHES:
            for config, i in selections(measured, seed).items():
                cost = total if config in (VALIDATED, ORACLE) else 1
                records += _run_records(method, config, seed, i, measured, cost)
    seconds = sum(outcome.run_seconds for outcome in outcomes) / seeds
    records.append(common.record(method, "run_seconds", seconds, compute=total))
    return outcomes[0], records


def finish(method: str, *how: Any) -> dict[str, Any]:
    """What is kept of a method."""
    outcome, records = run(method, *how)
    history = thinned(method, outcome) if method in ALIGNED else []
    return {"records": records, "history": history}


def describe(weights: np.ndarray) -> str:
    return common.describe(**dict(zip(task.LOSSES, weights, strict=True)))


Measured = dict[str, np.ndarray]
"""Values [seeds, runs] by metric."""


def measure(setup: task.Task, data: task.Data, outcome: task.Outcome) -> Measured:
    measured = task.probe(setup, data, outcome.model)
    shares = effective(outcome.weights)
    last = max(1, outcome.losses[task.LOSSES[0]].shape[-1] // 20)
    for name in task.LOSSES:
        measured[f"weight:{name}"] = shares[name][..., -last:].mean(-1)
        measured[f"loss:{name}"] = outcome.losses[name][..., -last:].mean(-1)
    return measured


def effective(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights brought to the sum 1, which is all that Adam sees of them."""
    total = sum(np.abs(weights[name]) for name in task.LOSSES)
    return {name: weights[name] / np.maximum(total, 1e-30) for name in task.LOSSES}


def _concatenated(parts: list[Measured]) -> Measured:
    return {
        metric: np.concatenate([part[metric] for part in parts], axis=1)
        for metric in parts[0]
    }


def _run_records(
    method: str, config: str, seed: int, i: int, measured: Measured, cost: float = 1
) -> list[Record]:
    return [
        common.record(
            method, metric, of_runs[seed, i], config=config, seed=seed, compute=cost
        )
        for metric, of_runs in measured.items()
    ]


def selections(measured: Measured, seed: int) -> dict[str, int]:
    """Which run of a search each way of choosing takes."""
    return searches.selections(measured["validation"][seed], measured[PROBE][seed])


def costs(
    methods: tuple[str, ...],
    setup: task.Task,
    data: task.Data,
    options: Options,
    steps: int,
) -> list[Record]:
    """What a step of each method costs, relative to one with constant weights."""
    rules = {EQUAL: task.FIXED} | {m: LEARNED[m] for m in methods if m in LEARNED}
    rounds = task.step_seconds(
        setup, data, rules, options.seeds, steps, ROUNDS[options.preset]
    )
    seen = list(rounds)
    # The fastest round is the one that others on the machine disturbed the least.
    fastest = {m: min(seconds[m] for seconds in seen) for m in rules}
    return [
        common.record(
            m, "step_ratio", fastest[m if m in rules else EQUAL] / fastest[EQUAL]
        )
        for m in methods
    ]


def thinned(method: str, outcome: task.Outcome) -> list[dict[str, Any]]:
    """Effective weights and losses over time, averaged over stretches of steps."""
    kinds = {"weights": effective(outcome.weights), "losses": outcome.losses}

    def of_seed(seed: int) -> dict[str, Any]:
        curves = {
            kind: {name: curve[seed, 0] for name, curve in named.items()}
            for kind, named in kinds.items()
        }
        return common.thinned_curves(curves, HISTORY_POINTS)

    seeds = range(len(outcome.weights[task.LOSSES[0]]))
    return [{"method": method, "seed": seed, **of_seed(seed)} for seed in seeds]


# What follows reads the stored result and nothing else.


def _of(result: Result, method: str, config: str | None = None) -> list[Record]:
    records = common.select(result["records"], method=method)
    records = [r for r in records if r["seed"] is not None]
    return records if config is None else common.select(records, config=config)


def _compute(result: Result, method: str, config: str | None) -> float:
    """Total cost in units of one run with constant weights."""
    (ratio,) = common.values(result["records"], method=method, metric="step_ratio")
    return float(ratio * _of(result, method, config)[0]["compute"])


def _present(result: Result) -> dict[tuple[str, str | None], str]:
    return {row: name for row, name in ROWS.items() if _of(result, *row)}


def table(result: Result) -> Table:
    shares = [f"{name} %" for name in task.LOSSES]
    rows = []
    for row, name in _present(result).items():
        records = _of(result, *row)
        accuracies = [
            common.mean_sd(common.values(records, metric=metric), scale=100)
            for metric in METRICS
        ]
        at_the_end = [
            f"{100 * common.values(records, metric=f'weight:{loss}').mean():.1f}"
            for loss in task.LOSSES
        ]
        rows.append([name, *accuracies, f"{_compute(result, *row):.3g}", *at_the_end])
    meta = result["meta"]
    caption = (
        f"Test accuracy in %, mean ± standard deviation over {meta['seeds']} seeds; "
        f"{meta['data']}: {meta['training_images']} training images, "
        f"{meta['labelled_images']} of them labelled, {meta['test_images']} test "
        f"images, {meta['classes']} classes; {meta['steps']} steps, {meta['device']} "
        f"({meta['cpu_count']} cores). Runs: total cost in units of one run with "
        "constant weights. Last columns: effective weights at the end, sum 100."
    )
    return Table(["method", *METRICS.values(), "runs", *shares], rows, caption)


def summary(result: Result) -> Table:
    """The table without the weights."""
    columns, rows, caption = table(result)
    kept = 2 + len(METRICS)
    caption, _ = caption.split(" Last columns:")
    return Table(columns[:kept], [row[:kept] for row in rows], caption)


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    if _of(result, "random"):
        best, worst = (_probe(result, "random", c) for c in (ORACLE, WORST))
        sentences.append(
            f"Weights matter: the best and the worst random draw are "
            f"{common.mean_sd(best - worst, scale=100)} points apart."
        )
    rivals = [("random", VALIDATED), ("grid", VALIDATED), (EQUAL, None)]
    rivals += [("published", None), (PLAIN, None), (CLOSED, None)]
    if _of(result, GRAP):
        sentences += [
            _comparison(result, GRAP, rival) for rival in rivals if _of(result, *rival)
        ]
    return sentences


def _probe(result: Result, method: str, config: str | None = None) -> np.ndarray:
    return common.values(_of(result, method, config), metric=PROBE)


def _comparison(result: Result, ours: str, theirs: tuple[str, str | None]) -> str:
    difference = _probe(result, ours) - _probe(result, *theirs)
    outcome = {
        1: "ahead (95 %)",
        0: "not told apart by these seeds (within 95 %)",
        -1: "behind (95 %)",
    }[verdict(difference)]
    return (
        f"{ROWS[ours, None]} against {ROWS[theirs]}: "
        f"{common.mean_sd(difference, scale=100)} points of the linear probe, for "
        f"{_compute(result, ours, None):.3g} against {_compute(result, *theirs):.3g} "
        f"runs; {outcome}."
    )


# The figure.

COLORS = dict(zip(task.LOSSES, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=True))


def figure(result: Result, path: Path) -> None:
    """Effective weights of GraP over time, and accuracy against total cost."""
    shown = [m for m in ALIGNED if _of(result, m)]
    drawing = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    widths = [1.0] * len(shown) + [2.2]
    panels = drawing.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for panel, method in zip(panels, shown, strict=False):
        _draw_weights(panel, result, method)
    if shown:
        panels[0].set_ylabel("effective weight (sum: 1)")
        handles, labels = panels[0].get_legend_handles_labels()
        drawing.legend(
            handles, labels, loc="outside lower left", ncols=5, frameon=False
        )
    _draw_accuracy(panels[-1], result)
    plots.save(drawing, path)


def _draw_weights(panel: Axes, result: Result, method: str) -> None:
    """Mean over seeds, and the range of the seeds as a band."""
    history = [h for h in result["history"] if h["method"] == method]
    step = history[0]["step"]
    for name, color in COLORS.items():
        curves = np.array([h["weights"][name] for h in history])
        plots.band(panel, step, curves, color, name)
        share = FIXED["published"][task.LOSSES.index(name)] / sum(FIXED["published"])
        panel.axhline(share, color=color, linestyle=(0, (1, 3)), zorder=0)
    panel.plot([], [], color=plots.GREY, linestyle=":", label="published")
    panel.set(
        title=ROWS[method, None].replace(", ", ",\n"),
        xlabel="training step",
        ylim=(0, 1),
    )


def _draw_accuracy(panel: Axes, result: Result) -> None:
    points = [  # method, config, marker, colour
        (GRAP, None, "o", plots.BLUE),
        (CLOSED, None, "v", plots.SKY),
        (EQUAL, None, "s", plots.BLACK),
        ("published", None, "P", plots.VERMILION),
        ("grid", VALIDATED, "D", plots.ORANGE),
        ("random", ORACLE, "*", plots.PURPLE),
    ]
    cheap = [p for p in points if _of(result, *p[:2]) and p[0] not in SEARCHES]
    for method, config, marker, color in points:
        if _of(result, method, config):
            accuracy = 100 * _probe(result, method, config)
            # Points of equal cost side by side.
            place = [p[0] for p in cheap].index(method) if method in FIXED else 0
            panel.errorbar(
                _compute(result, method, config) * 0.96**place,
                accuracy.mean(),
                accuracy.std(ddof=1) if len(accuracy) > 1 else None,
                fmt=marker,
                color=color,
                capsize=3,
                markersize=8,
                label=ROWS[method, config],
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
    panel.set_xscale("log")
    ticks = [1, 2, 5, 10, 20]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set(
        title="Accuracy against total cost",
        xlabel="cost (runs with constant weights)",
        ylabel="linear probe on the test half (%)",
    )
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def best_of_n(result: Result, method: str) -> np.ndarray:
    """Expected test accuracy of the validated best among n runs, for every n."""
    searched = [r for r in _of(result, method) if "=" in r["config"]]
    curves = []
    for seed in range(result["meta"]["seeds"]):
        of_seed = common.select(searched, seed=seed)
        validation = common.values(of_seed, metric="validation")
        test = common.values(of_seed, metric=PROBE)
        curves.append(searches.best_of_n(validation, test))
    return np.mean(curves, axis=0)
