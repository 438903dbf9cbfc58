"""What in YOTO does what: its parts switched off and turned up, on the depth task."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import common, contest, experiment, plots
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.harness.experiment import Finished, Run, Runs
from benchmarks.harness.searches import verdict
from benchmarks.tasks.depth import task

RESUMABLE = True
METRIC = "delta1"
NAMES = (task.PRIMARY, *task.AUXILIARY)
DEFAULT = {"ratios": (0.1, 0.1)}

RHOS = tuple(10.0**x for x in range(-4, 5))
EPSILONS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
EPSILON_RHO = 2.0  # the paper's, for its figure of initial weights
RATES = (0.1, 10.0, 100.0)
EXTRA = (2, 4, 6)  # further losses

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yoto": ("YOTO, library defaults (rho 10)", {}),
    "exponential": ("exp(mu), not normalised", {"exponential": 1.0}),
    "no entropy": ("without the entropy", {"entropy": 0.0}),
    "no softplus": ("without the softplus", {"softplus": 0.0}),
    "no decay": ("without both (rho 0)", {"rho": 0.0}),
    "auxiliary": ("entropy of auxiliary losses alone", {"auxiliary": 1.0}),
    "sgd": ("logits by SGD with momentum, rho 1", {"sgd": 1.0, "rho": 1.0}),
    **{
        f"rate {rate:g}": (f"logits {rate:g} times as fast", {"rate": rate})
        for rate in RATES
    },
    "weak": ("rho 0.1", {"rho": 0.1}),
    "camera x1000": ("camera loss x1000", {"factors": (1.0, 1000.0, 1.0)}),
    "all x1000": ("all losses x1000", {"factors": (1000.0, 1000.0, 1000.0)}),
    "camera x1000, normalized": (
        "camera loss x1000, divided by means",
        {"factors": (1.0, 1000.0, 1.0), "normalize": 1.0},
    ),
}
METHODS = ("parts", "equal", "rho", "epsilon", "losses", "aligned")
"""What can be measured apart; together they are the table and the figure."""
REPLAYED = {
    "yoto": "constant, YOTO's final weights",
    "weak": "constant, final weights of rho 0.1",
}


def main(options: Options) -> None:
    options.refuse_data()
    options.choose(METHODS)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    quick = options.preset == "quick"
    records, history = ablate(options, size, quick)
    path = options.out / "ablations.json"
    result = common.write_json(
        path,
        common.meta(options, seeds=options.seeds, **size._asdict()),
        records,
        history=history,
    )
    if options.methods is None:  # else what they are compared with is missing
        figure(result, path.with_suffix(".png"))
        common.show(table(result))
        common.show(losses_table(result))
    common.say(f"Written: {path}")


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
    return Run(contest.SOFTMAX, seed, experiment.settings(**(DEFAULT | config)))


def constant(seed: int, ratios: tuple[float, ...]) -> Run:
    config = experiment.settings(ratios=ratios, learn=0.0)
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
        notes.add(runs, "rho", common.describe(rho=rho), wanted)


def vary_epsilon(notes: Notes, runs: Runs, epsilons: Sequence[float]) -> None:
    """All pairs of initial weights with the first seed, side by side."""
    pairs = list(itertools.product(epsilons, repeat=2))
    wanted = [learned(0, ratios=pair, rho=EPSILON_RHO) for pair in pairs]
    finished = runs.finish(wanted, "epsilon")
    for pair, run, done in zip(pairs, wanted, finished, strict=True):
        config = common.describe(camera=pair[0], invariance=pair[1])
        notes.records += _records("epsilon", config, run.seed, done)


def add_losses(
    notes: Notes, runs: Runs, extra: int, unsteered: bool, steered: bool
) -> None:
    """So many further losses: methods that are not steered, and one that is."""
    k = len(task.AUXILIARY) + extra
    config = common.describe(auxiliary=k)
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
        for r in contest.run_records(task.UNSEEN, method, config, seed, done)
        if r["metric"] in (METRIC, "validation") or r["domain"] is None
    ]


# What follows reads the stored result and nothing else.


def _values(result: Result, method: str, metric: str, config: str = "") -> np.ndarray:
    """One value for each seed."""
    found = common.select(result["records"], method=method, config=config)
    return common.values(found, metric=metric)


def unseen(result: Result, method: str, config: str = "") -> np.ndarray:
    """The metric averaged over the unseen domains, one value for each seed."""
    found = common.select(
        result["records"], method=method, config=config, metric=METRIC
    )
    return np.mean([common.values(found, domain=d) for d in task.UNSEEN], axis=0)


def configs(result: Result, method: str) -> list[str]:
    found = common.select(result["records"], method=method)
    return list(dict.fromkeys(r["config"] for r in found))


def _weights(result: Result, method: str, config: str = "") -> str:
    return " / ".join(
        f"{_values(result, method, f'weight:{n}', config).mean():.2g}" for n in NAMES
    )


def table(result: Result) -> Table:
    """Parts of YOTO one by one."""
    baseline = unseen(result, "yoto")
    named = [(name, label) for name, (label, _) in VARIANTS.items()]
    named += [(f"{name} replayed", label) for name, label in REPLAYED.items()]
    named += [("equal", "equal weights")]
    rows = []
    for method, label in named:
        found = unseen(result, method)
        difference = found - baseline
        sign = {1: "better", 0: "", -1: "worse"}[verdict(difference)]
        seen = common.select(result["records"], method=method, metric=METRIC)
        rows.append(
            [
                label,
                common.mean_sd(common.values(seen, domain=task.SEEN)),
                common.mean_sd(found),
                "" if method == "yoto" else common.mean_sd(difference),
                sign,
                _weights(result, method),
            ]
        )
    meta = result["meta"]
    return Table(
        ["variant", task.SEEN, "mean unseen", "against YOTO", "verdict", "weights"],
        rows,
        f"delta1 in %, mean ± standard deviation over {meta['seeds']} seeds, "
        f"{meta['steps']} steps, {meta['device']} ({meta['cpu_count']} cores). "
        "Verdict: 0 is outside of the 95 % interval of the difference. Weights: of "
        "silog, camera and invariance, at the end; they multiply the losses as they "
        "come, a thousand times larger in the rows that say so.",
    )


def losses_table(result: Result) -> Table:
    """More losses, some useless, some harmful."""
    rows = []
    by_count = {2: {"K yoto": ("yoto", ""), "K equal": ("equal", "")}}
    counts = [int(common.parse(c)["auxiliary"]) for c in configs(result, "K yoto")]
    for k in (2, *counts):
        config = common.describe(auxiliary=k)
        cells = []
        for method in ("K yoto", "K equal", "K aligned"):
            place = by_count.get(k, {}).get(method, (method, config))
            there = place[1] in configs(result, place[0])
            cells.append(common.mean_sd(unseen(result, *place)) if there else "")
        names = (*NAMES, *task.EXTRA)[: 1 + k]
        method, config = by_count.get(k, {}).get("K yoto", ("K yoto", config))
        weights = [
            f"{n} {_values(result, method, f'weight:{n}', config).mean():.2g}"
            for n in names
        ]
        rows.append([str(k), *cells, ", ".join(weights)])
    return Table(
        ["K", "YOTO", "equal weights", "softmax alignment", "final weights of YOTO"],
        rows,
        "delta1 in % on unseen domains. K = 4 adds a loss on gradients of depth and a "
        "reconstruction of the image; 6 adds two useless losses (noise, a constant), 8 "
        "two harmful ones (depth of another image, collapse of the features).",
    )


def tables(result: Result) -> dict[str, Table]:
    return {"ablations-losses": losses_table(result)}


def figure(result: Result, path: Path) -> None:
    """Weights and accuracy against rho; where initial weights lead; over time."""
    drawing = Figure(figsize=(14, 8), dpi=100, layout="constrained")
    panels = drawing.subplots(2, 3)
    _draw_rho(panels[0, 0], panels[1, 0], result)
    _draw_epsilon(panels[0, 1], result)
    _draw_epsilon_metric(panels[1, 1], drawing, result)
    _draw_variants(panels[0, 2], panels[1, 2], result)
    plots.save(drawing, path)


COLORS = dict(zip(NAMES, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=True))


def _draw_rho(upper: Axes, lower: Axes, result: Result) -> None:
    every = configs(result, "rho")
    rhos = [float(common.parse(c)["rho"]) for c in every]
    for name, color in COLORS.items():
        curves = np.array([_values(result, "rho", f"weight:{name}", c) for c in every])
        plots.band(upper, rhos, np.maximum(curves.T, 1e-8), color, name)
    # One of two curves on top of each other would hide the other.
    upper.get_lines()[1].set(linestyle="--", zorder=3)
    upper.set(
        xscale="log",
        yscale="log",
        xlabel="rho",
        ylabel="loss weight at the end (sum: 1)",
        title="Strength of the regulariser",
    )
    upper.legend(fontsize=8)
    curves = np.array([unseen(result, "rho", c) for c in every])
    plots.band(lower, rhos, curves.T, plots.BLACK, "YOTO")
    equal = unseen(result, "equal").mean()
    lower.axhline(equal, color=plots.GREY, linestyle=":", label="equal weights")
    lower.set(xscale="log", xlabel="rho", ylabel="delta1 on unseen domains (%)")
    lower.legend(fontsize=8)


def _pairs(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial and final logits [runs, 2] and the metric on unseen domains [runs]."""
    every = configs(result, "epsilon")
    start, end, metric = [], [], []
    for config in every:
        settings = common.parse(config)
        start.append([math.log(float(settings[n])) for n in task.AUXILIARY])
        primary, *others = (
            _values(result, "epsilon", f"weight:{n}", config)[0] for n in NAMES
        )
        end.append([math.log(max(w, 1e-12) / max(primary, 1e-12)) for w in others])
        metric.append(unseen(result, "epsilon", config)[0])
    return np.array(start), np.array(end), np.array(metric)


def _draw_epsilon(panel: Axes, result: Result) -> None:
    start, end, _ = _pairs(result)
    for a, b in zip(start, end, strict=True):
        panel.annotate(
            "",
            xy=b,
            xytext=a,
            arrowprops={"arrowstyle": "->", "color": plots.GREY, "lw": 0.8},
        )
    panel.plot(*start.T, "o", color=plots.SKY, markersize=4, label="start")
    panel.plot(*end.T, "o", color=plots.VERMILION, markersize=4, label="end")
    panel.set(
        xlabel="mu of camera",
        ylabel="mu of invariance",
        title=f"From {len(start)} initial weights, rho {EPSILON_RHO:g}",
    )
    panel.margins(y=0.16)
    panel.legend(fontsize=8, loc="upper left", ncols=2)


def _draw_epsilon_metric(panel: Axes, drawing: Figure, result: Result) -> None:
    _, _, metric = _pairs(result)
    n = math.isqrt(len(metric))
    every = [common.parse(c) for c in configs(result, "epsilon")]
    image = panel.imshow(metric.reshape(n, n).T, origin="lower", cmap="viridis")
    ticks = list(dict.fromkeys(c["invariance"] for c in every))
    panel.set_xticks(range(n), ticks)
    panel.set_yticks(range(n), ticks)
    panel.set(
        xlabel="initial weight of camera (epsilon)",
        ylabel="initial weight of invariance (epsilon)",
    )
    drawing.colorbar(image, ax=panel, label="delta1 on unseen domains (%)", shrink=0.8)


def _draw_variants(upper: Axes, lower: Axes, result: Result) -> None:
    """The share of the camera loss over time, and accuracy, by variant."""
    shown = {
        "yoto": plots.BLUE,
        "no entropy": plots.VERMILION,
        "no softplus": plots.GREEN,
        "no decay": plots.ORANGE,
        "sgd": plots.PURPLE,
    }
    for method, color in shown.items():
        history = [h for h in result["history"] if h["method"] == method]
        if history:
            curves = np.array([h["weights"][task.PRIMARY] for h in history])
            plots.band(upper, history[0]["step"], curves, color, VARIANTS[method][0])
    upper.set(
        xlabel="training step",
        ylabel="weight of silog (sum of all: 1)",
        title="Parts of YOTO switched off",
        ylim=(0, 1.45),
    )
    upper.legend(fontsize=7, loc="upper right")
    methods = ["equal", *VARIANTS, *(f"{m} replayed" for m in REPLAYED)]
    labels = {m: label for m, (label, _) in VARIANTS.items()}
    labels |= {f"{m} replayed": label for m, label in REPLAYED.items()}
    labels |= {"equal": "equal weights"}
    for place, method in enumerate(methods):
        found = unseen(result, method)
        lower.errorbar(
            found.mean(),
            -place,
            xerr=found.std(ddof=1) if len(found) > 1 else None,
            fmt="o",
            color=shown.get(method, plots.BLACK),
            capsize=2,
            markersize=4,
        )
    lower.set_yticks(
        [-i for i in range(len(methods))], [labels[m] for m in methods], fontsize=7
    )
    lower.set(xlabel="delta1 on unseen domains (%)")
