"""What is shown of the ablations, from the stored result alone."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result, describe, parse, select, values
from benchmarks.harness.searches import verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.ablations.methods import (
    EPSILON_RHO,
    METRIC,
    NAMES,
    REPLAYED,
    VARIANTS,
)
from benchmarks.tasks.depth import task


def _values(result: Result, method: str, metric: str, config: str = "") -> np.ndarray:
    """One value for each seed."""
    found = select(result["records"], method=method, config=config)
    return values(found, metric=metric)


def unseen(result: Result, method: str, config: str = "") -> np.ndarray:
    """The metric averaged over the unseen domains, one value for each seed."""
    found = select(result["records"], method=method, config=config, metric=METRIC)
    return np.mean([values(found, domain=d) for d in task.UNSEEN], axis=0)


def configs(result: Result, method: str) -> list[str]:
    found = select(result["records"], method=method)
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
        seen = select(result["records"], method=method, metric=METRIC)
        rows.append(
            [
                label,
                mean_sd(values(seen, domain=task.SEEN)),
                mean_sd(found),
                "" if method == "yoto" else mean_sd(difference),
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
    counts = [int(parse(c)["auxiliary"]) for c in configs(result, "K yoto")]
    for k in (2, *counts):
        config = describe(auxiliary=k)
        cells = []
        for method in ("K yoto", "K equal", "K aligned"):
            place = by_count.get(k, {}).get(method, (method, config))
            there = place[1] in configs(result, place[0])
            cells.append(mean_sd(unseen(result, *place)) if there else "")
        names = (*NAMES, *task.EXTRA)[: 1 + k]
        method, config = by_count.get(k, {}).get("K yoto", ("K yoto", config))
        weights = [
            f"{n} {_values(result, method, f'weight:{n}', config).mean():.2g}"
            for n in names
        ]
        rows.append([str(k), *cells, ", ".join(weights)])
    return Table(
        [
            "auxiliary losses",
            "YOTO",
            "equal weights",
            "softmax alignment",
            "final weights of YOTO",
        ],
        rows,
        "delta1 in % on unseen domains. Four add a loss on gradients of depth and a "
        "reconstruction of the image, six two useless losses (noise, a constant), "
        "eight two harmful ones (depth of another image, collapse of the features).",
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
    rhos = [float(parse(c)["rho"]) for c in every]
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
        settings = parse(config)
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
    every = [parse(c) for c in configs(result, "epsilon")]
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
