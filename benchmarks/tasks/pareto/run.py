"""One conditional model against a grid of models: fronts of two competing tasks.

Two overlapping digits have to be named by a network too narrow for both. A grid trains
one model per weighting of the two losses; a conditional model is trained once, for all
weightings. All are compared on source digits that no training saw, for the same number
of training steps in total and for the same number per model.
"""

import functools
import os
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.harness import common, plots
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.harness.searches import verdict
from benchmarks.tasks.pareto import task
from benchmarks.tasks.pareto.task import TASKS, Conditioning
from yoto_jax import conditional

RESUMABLE = True
GRID, EQUAL = "grid", "equal"
METHODS: dict[str, Conditioning | None] = {
    EQUAL: None,
    GRID: None,
    "linear": Conditioning(1.0, None, conditional.weighted_sum, False),
    "cosmos": Conditioning(1.2, 1, conditional.cosmos, True),
    "cosmos_groups": Conditioning(1.2, 16, conditional.cosmos, True),
    "chebyshev": Conditioning(
        1.2, 16, functools.partial(conditional.smooth_chebyshev, smoothing=0.1), True
    ),
}
MODELS = 9  # in the grid: one for each of as many weightings
RAYS = 25  # weightings that a conditional model is asked for, as published
REFERENCES = {"ce": 2.0, "error": 1.0}  # the published one; and the worst there is
DOMAINS = ("validation", "test")


class Size(NamedTuple):
    """What a preset runs.

    Attributes:
      steps: Of one training run.
      budgets: How many runs' steps a method may take in all.
      pairs: Images in each evaluation.
    """

    steps: int
    budgets: tuple[int, ...]
    pairs: int


SIZES = {
    "quick": Size(20, (1, MODELS), 200),
    "cpu": Size(1500, (1, 3, MODELS), 4000),
    "gpu": Size(10_000, (1, 3, MODELS), 10_000),
}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    size = SIZES[options.preset]
    steps = options.steps or size.steps
    data = task.load(size.pairs)
    runs = [(method, budget) for budget in size.budgets[::-1] for method in methods]
    units = common.Units(options)

    def one(method: str, budget: int) -> Points:
        work = lambda: run(method, budget, options.seeds, steps, data)
        return units.do(f"{method}, {budget}", work)

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(one, *zip(*runs, strict=True))  # each takes about one core
        points = dict(zip(common.track(runs, "pareto"), outcomes, strict=True))
    records = [r for method in methods for r in size_records(method, data.train)]
    for method, budget in runs:
        records += measure(method, budget, points)
    result = common.write_json(
        options.out / "pareto.json",
        common.meta(
            options,
            steps=steps,
            seeds=options.seeds,
            batch=task.BATCH,
            widths=list(task.WIDTHS),
            references=REFERENCES,
            source_digits=len(data.train.labels),
            test_images=size.pairs,
        ),
        records,
        fronts=[
            front
            for (method, budget), found in points.items()
            for front in stored(method, budget, found["test"][weightings(method)])
        ],
    )
    figure(result, options.out / "pareto.png")
    common.show(table(result))
    for sentence in conclusions(result):
        common.say(f"- {sentence}")
    common.say(f"Written: {options.out / 'pareto.json'}, {options.out / 'pareto.png'}")


# Runs.

Points = dict[str, dict[int, Any]]
"""By domain and number of weightings: metrics by task, arrays (seeds, weightings)."""


def weightings(method: str) -> int:
    """How many weightings a method is asked for: one for each model if it has some."""
    return {EQUAL: 1, GRID: MODELS}.get(method, RAYS)


def run(method: str, budget: int, seeds: int, steps: int, data: task.Data) -> Points:
    """Train a method for all seeds, and measure it."""
    how = METHODS[method]
    domains = {"validation": data.validation, "test": data.test}
    if how is None:
        models = weightings(method)
        params = task.train(
            None,
            jnp.repeat(jnp.arange(seeds), models),
            jax.tree.map(lambda w: jnp.tile(w, seeds), task.rays(models)),
            max(1, budget * steps // models),
            data.train,
        )
        by_seed = lambda x: np.reshape(x, (seeds, models))
        return {
            domain: {models: jax.tree.map(by_seed, task.evaluate(params, batch))}
            for domain, batch in domains.items()
        }
    unused = dict.fromkeys(TASKS, jnp.zeros(seeds))
    params = task.train(how, jnp.arange(seeds), unused, budget * steps, data.train)
    every = jax.tree.map(lambda *x: np.concatenate(x), *map(task.rays, (MODELS, RAYS)))
    points: Points = {}
    for domain, batch in domains.items():
        found = jax.device_get(task.sweep(params, batch, every))
        points[domain] = {
            MODELS: jax.tree.map(lambda x: x[:, :MODELS], found),
            RAYS: jax.tree.map(lambda x: x[:, MODELS:], found),
        }
    return points


# Records.


def size_records(method: str, source: task.Digits) -> list[Record]:
    """Parameters of one model, and what one of its training steps costs."""
    how = METHODS[method]
    shapes = jax.eval_shape(
        lambda: task.init(jax.random.key(0), task.encoding_size(how))
    )
    measured = {
        "parameters": task.parameters(shapes),
        "cost of a step": task.flops(how, source) / task.flops(None, source),
    }
    return [common.record(method, name, value) for name, value in measured.items()]


def measure(
    method: str, budget: int, points: dict[tuple[str, int], Points]
) -> list[Record]:
    """All numbers of one method with one budget."""
    records = []
    for domain, by_count in points[method, budget].items():
        for n, found in by_count.items():
            grid = points.get((GRID, max(b for _, b in points)))
            for seed in range(len(found["ce"][TASKS[0]])):
                of_seed = lambda tree, seed=seed: jax.tree.map(lambda x: x[seed], tree)
                measured = quality(of_seed(found))
                if n == MODELS:
                    measured |= calibration(of_seed(found)["ce"])
                    if grid is not None:
                        measured |= excess(
                            of_seed(found)["ce"], of_seed(grid[domain][n])["ce"]
                        )
                records += [
                    common.record(
                        method,
                        metric,
                        value,
                        config=common.describe(weightings=n),
                        seed=seed,
                        domain=domain,
                        compute=budget,
                    )
                    for metric, value in measured.items()
                ]
    return records


def quality(found: Any) -> dict[str, Any]:
    """What a set of points (n,) is worth."""
    reaches = [found["ce"][name] < REFERENCES["ce"] for name in TASKS]
    return {
        "hypervolume": conditional.hypervolume(found["ce"], REFERENCES["ce"]),
        "hypervolume of errors": conditional.hypervolume(
            found["error"], REFERENCES["error"]
        ),
        "on the front": conditional.pareto_front(found["ce"]).sum(),
        "within the reference": np.logical_and(*reaches).sum(),
    } | {f"lowest {name}": found["ce"][name].min() for name in TASKS}


def calibration(losses: Any) -> dict[str, Any]:
    """Whether each weighting is served best by the model that was told it."""
    weights = task.rays(MODELS)
    matrix = np.asarray(conditional.cross_matrix(losses, weights))
    own = np.diagonal(matrix)
    best = np.arange(MODELS) == matrix.argmin(axis=1)
    violations = conditional.monotonicity_violations(losses, weights)
    return {
        "row minima on the diagonal": best.mean(),
        "regret": (own - matrix.min(axis=1)).mean(),
        "largest violation of monotonicity": violations.max(),
    }


def excess(losses: Any, of_grid: Any) -> dict[str, float]:
    """Weighted losses above those of the grid with a full run per model."""
    gap = np.asarray(conditional.gap(losses, of_grid, task.rays(MODELS)))
    return {"mean gap": gap.mean(), "largest gap": gap.max()}


def stored(method: str, budget: int, found: Any) -> list[dict[str, Any]]:
    """The points of each seed, for the figure."""
    rounded = lambda x: [float(f"{v:.4g}") for v in x]
    return [
        {
            "method": method,
            "runs": budget,
            "seed": seed,
            **{name: rounded(found["ce"][name][seed]) for name in TASKS},
            **{f"{name} error": rounded(found["error"][name][seed]) for name in TASKS},
        }
        for seed in range(len(found["ce"][TASKS[0]]))
    ]


# What follows reads the stored result and nothing else.


def _of(
    result: Result,
    method: str,
    runs: int,
    metric: str,
    n: int | None = None,
    domain: str = "test",
) -> np.ndarray:
    """A metric for every seed; by default at as many weightings as are asked for."""
    n = weightings(method) if n is None else n
    return common.values(
        result["records"],
        method=method,
        compute=runs,
        metric=metric,
        domain=domain,
        config=common.describe(weightings=n),
    )


def _methods(result: Result) -> list[str]:
    present = {front["method"] for front in result["fronts"]}
    return [method for method in METHODS if method in present]


def _budgets(result: Result) -> list[int]:
    return sorted({front["runs"] for front in result["fronts"]})


def _front(result: Result, method: str, runs: int) -> dict[str, np.ndarray]:
    """The losses of both tasks, (seeds, weightings)."""
    found = common.select(result["fronts"], method=method, runs=runs)
    return {name: np.array([front[name] for front in found]) for name in TASKS}


def table(result: Result) -> Table:
    columns = [
        "method",
        "runs",
        "weightings",
        "hypervolume",
        f"at {MODELS} weightings",
        "of errors",
        "on the front",
        "regret",
        "row minima on the diagonal",
        "gap to the full grid",
    ]
    rows = []
    for runs in _budgets(result):
        rows += [_row(result, method, runs) for method in _methods(result)]
    meta = result["meta"]
    bounds = {name: f"({r:g}, {r:g})" for name, r in REFERENCES.items()}
    caption = (
        f"Test set: {meta['test_images']} images of source digits not trained on; mean "
        f"± standard deviation over {meta['seeds']} seeds. Runs: training steps in "
        f"all, in units of {meta['steps']}; the {MODELS} models of the grid share "
        f"them. Hypervolume of the two cross-entropies up to {bounds['ce']}, of the "
        f"two error rates up to {bounds['error']}. Regret, row minima and gap at "
        f"{MODELS} weightings; gap: weighted cross-entropy above the grid with the "
        "most runs, mean over weightings."
    )
    return Table(columns, rows, caption)


def _row(result: Result, method: str, runs: int) -> list[str]:
    of = functools.partial(_of, result, method, runs)
    share = of("row minima on the diagonal", MODELS)
    return [
        method,
        f"{runs}",
        f"{weightings(method)}",
        _cell(of("hypervolume"), 2),
        _cell(of("hypervolume", MODELS), 2),
        _cell(of("hypervolume of errors"), 3),
        f"{of('on the front').mean():.1f}",
        _cell(of("regret", MODELS), 3),
        f"{share.mean():.0%}" if share.size else "",
        _cell(of("mean gap", MODELS), 3),
    ]


def _cell(values: np.ndarray, digits: int) -> str:
    return common.mean_sd(values, digits=digits) if values.size else ""


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    methods, budgets = _methods(result), _budgets(result)
    few, many = budgets[0], budgets[-1]
    models = [method for method in methods if METHODS[method] is not None]
    sentences = []
    if GRID in methods:
        sentences.append(_competition(result, many))
        pairs = sorted({(few, few), (many, many), (few, many)})
        sentences += [_against(result, models, a, GRID, b) for a, b in pairs]
    if EQUAL in methods:
        pairs = sorted({(few, few), (many, many)})
        rivals = [GRID, *models] if GRID in methods else models
        sentences += [_against(result, rivals, a, EQUAL, b) for a, b in pairs]
    sentences += [_spread(result, method, many) for method in models]
    return [*sentences, *map(functools.partial(_cost, result), models)]


def _competition(result: Result, runs: int) -> str:
    front = _front(result, GRID, runs)
    left, right = (front[name].mean(axis=0) for name in TASKS)
    steps = result["meta"]["steps"] * runs / MODELS
    return (
        f"The tasks compete for the trunk: from one end of the grid to the other "
        f"({runs} runs, {steps:.0f} steps per model), the cross-entropy of the left "
        f"digit goes from {left[0]:.2f} down to {left[-1]:.2f} and that of the right "
        f"one from {right[-1]:.2f} down to {right[0]:.2f}."
    )


def _against(
    result: Result, methods: list[str], runs: int, rival: str, of_rival: int
) -> str:
    """Hypervolumes beside that of a rival, perhaps with another budget."""
    theirs = _of(result, rival, of_rival, "hypervolume")
    outcomes = {0: "not told apart", 1: "ahead", -1: "behind"}

    def one(method: str) -> str:
        ours = _of(result, method, runs, "hypervolume")
        outcome = outcomes[verdict(ours - theirs)]
        return f"{method} {common.mean_sd(ours, digits=2)} ({outcome})"

    return (
        f"Hypervolume with {_runs(runs)}, against {common.mean_sd(theirs, digits=2)} "
        f"of {RIVALS[rival]} with {_runs(of_rival)}: "
        f"{', '.join(map(one, methods))}; ahead or behind at 95 %."
    )


RIVALS = {GRID: "the grid", EQUAL: "one model with equal weights"}


def _runs(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _spread(result: Result, method: str, runs: int) -> str:
    """What a method makes of its weights, and how much of the front it covers."""
    front = _front(result, method, runs)
    ranges = " and ".join(
        f"from {x.min(axis=1).mean():.2f} to {x.max(axis=1).mean():.2f} ({name})"
        for name, x in front.items()
    )
    # The weight of the left task rises along the rays.
    weight = task.rays(RAYS)["left"]
    correlation = np.mean([np.corrcoef(weight, x)[0, 1] for x in front["left"]])
    meaning = "smaller" if correlation < 0 else "larger"
    inside = _of(result, method, runs, "within the reference").mean()
    minima = _of(result, method, runs, "row minima on the diagonal", MODELS).mean()
    return (
        f"{method} with {_runs(runs)} reaches cross-entropies {ranges}; "
        f"{inside:.0f} of {RAYS} weightings lie within the reference; a larger "
        f"weight makes a {meaning} loss (correlation {correlation:.2f}); of "
        f"{MODELS} weightings, {minima:.0%} are served best by the model that was told "
        "them."
    )


def _cost(result: Result, method: str) -> str:
    of = functools.partial(common.values, result["records"], method=method)
    (parameters,), (step,) = of(metric="parameters"), of(metric="cost of a step")
    return (
        f"{method}: {parameters:.0f} parameters, and {step:.2f} times the operations "
        "of a training step without conditioning."
    )


# The figure.

STYLES = {
    GRID: (plots.BLACK, "s"),
    "linear": (plots.BLUE, "o"),
    EQUAL: (plots.PURPLE, "*"),
    "cosmos": (plots.VERMILION, "D"),
    "cosmos_groups": (plots.ORANGE, "P"),
    "chebyshev": (plots.GREEN, "^"),
}
MARGIN = 1.15  # of the reference that is drawn


def figure(result: Result, path: Path) -> None:
    """Fronts with the smallest and the largest budget, and hypervolume against cost."""
    budgets = _budgets(result)
    shown = sorted({budgets[0], budgets[-1]})
    columns = len(shown) + 1
    drawing = Figure(figsize=(4.3 * columns, 4.9), dpi=110, layout="constrained")
    panels = drawing.subplots(1, columns, squeeze=False)[0]
    for panel, runs in zip(panels, shown, strict=False):
        _draw_fronts(panel, result, runs)
    _draw_hypervolume(panels[-1], result)
    drawing.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=7,
        frameon=False,
    )
    plots.save(drawing, path)


def _draw_fronts(panel: Axes, result: Result, runs: int) -> None:
    """One line a method: the first seed."""
    for method in _methods(result):
        front = {name: x[0] for name, x in _front(result, method, runs).items()}
        color, marker = STYLES[method]
        front = front["left"], front["right"]
        size = 12 if method == EQUAL else 4.5
        panel.plot(
            *front, color=color, marker=marker, markersize=size, lw=1, label=method
        )
    bound = REFERENCES["ce"]
    panel.plot([0, bound, bound], [bound, bound, 0], color=plots.GREY, ls=":", lw=1)
    panel.plot(
        bound, bound, "x", color=plots.GREY, ms=8, label="reference", linestyle="none"
    )
    panel.set(
        title=f"{_runs(runs)} in all (first seed)",
        xlabel="cross-entropy, left digit (nats)",
        ylabel="cross-entropy, right digit (nats)",
        xlim=(0, MARGIN * bound),
        ylim=(0, MARGIN * bound),
        aspect="equal",
    )


def _draw_hypervolume(panel: Axes, result: Result) -> None:
    budgets = _budgets(result)
    methods = _methods(result)
    for k, method in enumerate(methods):
        found = [_of(result, method, runs, "hypervolume") for runs in budgets]
        color, marker = STYLES[method]
        shift = 1.03 ** (k - len(methods) / 2)  # keeps the error bars apart
        panel.errorbar(
            shift * np.array(budgets),
            [x.mean() for x in found],
            [x.std(ddof=1) if len(x) > 1 else 0.0 for x in found],
            color=color,
            marker=marker,
            markersize=6,
            lw=1.2,
            capsize=3,
        )
    panel.set(
        title="Hypervolume against cost",
        xlabel=f"training runs of {result['meta']['steps']} steps, in all",
        ylabel=f"hypervolume up to ({REFERENCES['ce']:g}, {REFERENCES['ce']:g})",
        xscale="log",
    )
    panel.set_box_aspect(1)
    panel.xaxis.set_major_locator(FixedLocator(budgets))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
