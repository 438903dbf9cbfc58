"""What is shown of the conditional VAE, from the stored result alone."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.harness import plots
from benchmarks.harness.results import Result, describe, parse, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.beta_vae import task
from benchmarks.tasks.beta_vae.methods import (
    ARMS_OF_COST,
    FORWARD_IMAGES,
    LIMITS,
    LOSSES,
    MIDDLE,
    NAMES,
    NOISE,
    TRAINED,
    Losses,
)
from yoto_jax import conditional


def widths_of(result: Result, method: str) -> list[float]:
    records = select(result["records"], method=method, metric="parameters")
    return [float(parse(r["config"])["width"]) for r in records]


def losses_of(
    result: Result,
    method: str,
    width: float,
    betas: Sequence[float] = task.BETAS,
    split: str = "test",
) -> Losses:
    """Losses [seeds, betas] of the models of one method and width."""
    wanted = {describe(width=width, beta=beta): beta for beta in betas}
    found: dict[str, dict[float, list[float]]] = {name: {} for name in LOSSES}
    for r in select(result["records"], method=method, domain=split):
        if r["config"] in wanted:
            of_beta = found[r["metric"]].setdefault(wanted[r["config"]], [])
            of_beta.append(r["value"])
    return {
        name: np.array([of_loss[beta] for beta in betas]).T
        for name, of_loss in found.items()
    }


def objective(losses: Losses, betas: Sequence[float] = task.BETAS) -> np.ndarray:
    """What a model of each beta is to minimise, [seeds, betas]."""
    return losses["reconstruction"] + np.array(betas) * losses["kl"]


def _weights(betas: Sequence[float]) -> Losses:
    return {"reconstruction": np.ones(len(betas)), "kl": np.array(betas)}


def _each_seed(function: Callable[..., Any], *losses: Losses) -> np.ndarray:
    """A function of losses [betas], for every seed."""
    seeds = range(len(losses[0]["kl"]))
    of = lambda seed: [{k: v[seed] for k, v in x.items()} for x in losses]
    return np.array([function(*of(seed)) for seed in seeds])


def gap(
    result: Result, width: float, method: str = "conditional", split: str = "test"
) -> np.ndarray:
    """How much worse than the fixed models, [seeds, betas]."""
    ours = losses_of(result, method, width, split=split)
    fixed = losses_of(result, "fixed", width, split=split)
    weigh = functools.partial(conditional.gap, weights=_weights(task.BETAS))
    return _each_seed(weigh, ours, fixed)


def spread(result: Result, width: float) -> np.ndarray:
    """Range of the objective of the fixed models over the betas, for every seed."""
    return np.ptp(objective(losses_of(result, "fixed", width)), axis=1)


def off_diagonal(losses: Losses) -> tuple[int, float]:
    """For how many betas, and by how much, another model of the row is better."""
    weigh = functools.partial(conditional.cross_matrix, weights=_weights(task.BETAS))
    matrix = _each_seed(weigh, losses)
    own = np.diagonal(matrix, axis1=1, axis2=2)
    excess = own - matrix.min(axis=2)
    return int(np.sum(excess > NOISE)), float(excess.max())


def disorder(losses: Losses) -> tuple[int, float]:
    """At how many betas, and how far, a loss went the wrong way from the one before."""
    falls = -np.diff(losses["reconstruction"], axis=1)
    rises = np.diff(losses["kl"], axis=1)
    wrong = np.maximum(falls, rises)
    return int(np.sum(wrong > NOISE)), float(max(0, wrong.max()))


def _parameters(result: Result, method: str, width: float) -> float:
    config = describe(width=width)
    (n,) = values(result["records"], method=method, config=config, metric="parameters")
    return float(n)


def _pair_widths(result: Result) -> list[float]:
    fixed = widths_of(result, "fixed")
    return [width for width in widths_of(result, "conditional") if width in fixed]


def table(result: Result) -> Table:
    """How far one conditional model is from seven fixed ones, by width."""
    columns = ["width", "parameters: one fixed", "conditional"]
    columns += ["mean gap (nats)", "of the spread", "largest gap", "mean gap, training"]
    columns += ["rows off the diagonal", "training", "losses out of order", "training"]
    rows = []
    for width in _pair_widths(result):
        of_test, of_train = gap(result, width), gap(result, width, split="train")
        share = of_test.mean(axis=1) / spread(result, width)
        checks = []
        for split in ("test", "train"):
            ours = losses_of(result, "conditional", width, split=split)
            checks.append(_counts(off_diagonal(ours), ours["kl"].size))
        for split in ("test", "train"):
            ours = losses_of(result, "conditional", width, task.GRID, split)
            checks.append(_counts(disorder(ours), ours["kl"][:, 1:].size))
        rows.append(
            [
                f"{width:g}",
                f"{_parameters(result, 'fixed', width):,.0f}",
                f"{_parameters(result, 'conditional', width):,.0f}",
                mean_sd(of_test.mean(axis=1), digits=2),
                f"{mean_sd(share, scale=100)} %",
                _largest(of_test),
                mean_sd(of_train.mean(axis=1), digits=2),
                *checks,
            ]
        )
    meta = result["meta"]
    caption = (
        f"Gap: how much larger reconstruction + beta KL of the conditional model is "
        f"than that of the model trained for beta, on test images, mean ± standard "
        f"deviation over {meta['seeds']} seeds; negative: the conditional model is "
        f"better. Spread: range of that objective over the {len(task.BETAS)} betas. "
        f"Rows off the diagonal: betas, of all seeds, for which the conditional model "
        f"does better when asked for another of the {len(task.BETAS)} (by how much at "
        f"most). Out of order: among {len(task.GRID)} betas, those at which "
        f"reconstruction is lower or KL is higher than at the one before. Both beyond "
        f"{NOISE} nats, with the largest in brackets. {meta['data']}, "
        f"{meta['steps']} steps each: one run against {len(task.BETAS)}; "
        f"{meta['device']} ({meta['cpu_count']} cores)."
    )
    return Table(columns, rows, caption)


def _largest(gaps: np.ndarray) -> str:
    means = gaps.mean(axis=0)
    i = int(means.argmax())
    return f"{mean_sd(gaps[:, i], digits=2)} at {task.BETAS[i]:g}"


def _counts(found: tuple[int, float], of: int) -> str:
    count, worst = found
    return f"{count} of {of}" + (f" ({worst:.2g})" if count else "")


def tables(result: Result) -> dict[str, Table]:
    found = {}
    if _pair_widths(result):
        found["beta_vae-betas"] = beta_table(result)
    if len(_variants(result)) > 1:
        found["beta_vae-variants"] = variant_table(result)
    if any(r["method"] in ARMS_OF_COST for r in result["records"]):
        found["beta_vae-cost"] = cost_table(result)
    return found


def beta_table(result: Result) -> Table:
    """Both losses at each beta, for the widest models."""
    width = _pair_widths(result)[-1]
    columns = ["beta", "reconstruction: fixed", "conditional", "KL: fixed"]
    columns += ["conditional", "gap", "gap, training"]
    both = [losses_of(result, m, width) for m in ("fixed", "conditional")]
    gaps = [gap(result, width, split=split) for split in ("test", "train")]
    rows = []
    for i, beta in enumerate(task.BETAS):
        cells = [losses[name][:, i] for name in LOSSES for losses in both]
        cells += [of_split[:, i] for of_split in gaps]
        rows.append([f"{beta:g}", *(mean_sd(x, digits=2) for x in cells)])
    caption = (
        f"Width {width:g}, {result['meta']['data']}, nats, mean ± standard deviation "
        f"over {result['meta']['seeds']} seeds; test images unless it says training."
    )
    return Table(columns, rows, caption)


def _variants(result: Result) -> list[str]:
    if MIDDLE not in _pair_widths(result):
        return []
    there = {r["method"] for r in result["records"]}
    return [m for m in TRAINED if m in there and m != "fixed"]


def variant_table(result: Result) -> Table:
    """What the normalisation of the weights and more steps do, at one width."""
    columns = ["conditional, loss weights", "runs", "mean gap, validation", "test"]
    columns += [f"at {beta:g}" for beta in task.BETAS]
    rows = []
    for method in _variants(result):
        test = gap(result, MIDDLE, method)
        validation = gap(result, MIDDLE, method, "validation").mean(axis=1)
        compute = select(result["records"], method=method)[0]["compute"]
        rows.append(
            [
                "not normalised" if method == "conditional" else NAMES[method],
                f"{compute:g}",
                mean_sd(validation, digits=2),
                mean_sd(test.mean(axis=1), digits=2),
                *(f"{x:.2f}" for x in test.mean(axis=0)),
            ]
        )
    caption = (
        f"Gap to the {len(task.BETAS)} fixed models in nats at width {MIDDLE}, mean ± "
        f"standard deviation over {result['meta']['seeds']} seeds; by beta on test "
        "images."
    )
    return Table(columns, rows, caption)


def _ratio(result: Result, arm: str, what: str, width: float) -> list[float]:
    """Median and quartiles, empty if not measured."""
    records = select(
        result["records"],
        method=f"cost: {arm}",
        config=describe(width=width),
    )
    find = lambda which: values(records, metric=f"{what}: ratio{which}")
    found = [find(which) for which in ("", ", first quartile", ", third quartile")]
    return [float(x[0]) for x in found if len(x)]


def _cost_widths(result: Result) -> list[float]:
    records = select(
        result["records"], method="cost: fixed", metric="forward: microseconds"
    )
    return [float(parse(r["config"])["width"]) for r in records]


def cost_table(result: Result) -> Table:
    columns, rows = ["width"], [[f"{width:g}"] for width in _cost_widths(result)]
    arms = {
        "forward": ("fixed again", "one beta", "beta per image"),
        "step": (
            "fixed again",
            "beta per group",
            "beta per group, no biases",
            "beta per image",
        ),
    }
    for what, of_what in arms.items():
        records = select(result["records"], metric=f"{what}: microseconds")
        fixed = values(records, method="cost: fixed")
        if not len(fixed):
            continue
        columns += [f"{what}: fixed (us)", "same again", *of_what[1:]]
        for row, microseconds in zip(rows, fixed, strict=True):
            ratios = [_ratio(result, arm, what, float(row[0])) for arm in of_what]
            row.append(f"{microseconds:,.0f}")
            show = "{:.2f} ({:.2f} to {:.2f})".format
            row += [show(*ratio) if ratio else "" for ratio in ratios]
    meta = result["meta"]
    caption = (
        f"Ratio to the model without conditioning, median (quartiles) of "
        f"{meta['rounds']} interleaved rounds, {meta['device']} ({meta['cpu_count']} "
        f"cores). Forward: {FORWARD_IMAGES} images reconstructed. Step: {task.BATCH} "
        f"images; per group: one beta for each {task.BATCH // task.GROUPS} of them, as "
        f"in the training above; no biases: without those of the layers, which the "
        f"shifts of FiLM make superfluous."
    )
    return Table(columns, rows, caption)


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    if widths := _pair_widths(result):
        sentences += [_about_gap(result, width) for width in widths]
        sentences.append(_about_where(result, widths[-1]))
        sentences.append(_about_overfitting(result, widths[-1]))
        sentences.append(_about_collapse(result, widths))
        sentences += [
            _about_order(result, widths, split) for split in ("test", "train")
        ]
    if len(_variants(result)) > 1:
        sentences += _about_variants(result)
    sentences += [_about_cost(result, what, arm) for what, arm in COSTS]
    return [sentence for sentence in sentences if sentence]


COSTS = (
    ("forward", "one beta"),
    ("step", "beta per group"),
    ("step", "beta per group, no biases"),
)


def _about_gap(result: Result, width: float) -> str:
    gaps = gap(result, width)
    mean = gaps.mean(axis=1)
    share = (mean / spread(result, width)).mean()
    training = gap(result, width, split="train").mean()
    sign, word = (1, "above") if mean.mean() > 0 else (-1, "below")
    return (
        f"Width {width:g}: one conditional model is "
        f"{mean_sd(sign * mean, digits=2)} nats {word} the {len(task.BETAS)} "
        f"fixed ones on average over beta ({100 * sign * share:.1f} % of the spread), "
        f"its largest gap is {_largest(gaps)}; mean gap on training images "
        f"{training:.2f}."
    )


def _about_where(result: Result, width: float) -> str:
    gaps = gap(result, width)
    means, deviations = gaps.mean(axis=0), gaps.std(axis=0, ddof=min(1, len(gaps) - 1))
    sure = np.abs(means) > np.maximum(2 * deviations, NOISE)
    listed = lambda chosen: ", ".join(
        f"{beta:g}" for beta, use in zip(task.BETAS, chosen, strict=True) if use
    )
    worse, better = listed(sure & (means > 0)), listed(sure & (means < 0))
    return (
        f"Width {width:g}, differences of more than two standard deviations: the "
        f"conditional model is worse at beta {worse or 'none'}, better at "
        f"{better or 'none'}."
    )


def _about_collapse(result: Result, widths: list[float]) -> str:
    at_end = lambda method: max(
        losses_of(result, method, width)["kl"][:, -1].max() for width in widths
    )
    widest = widths[-1]
    at_start = lambda method: losses_of(result, method, widest)["kl"][:, 0].mean()
    return (
        f"KL at beta {task.BETAS[-1]:g} is at most {at_end('conditional'):.1g} nats "
        f"for conditional and {at_end('fixed'):.1g} for fixed models (posterior "
        f"collapse); at {task.BETAS[0]:g} it is {at_start('conditional'):.1f} and "
        f"{at_start('fixed'):.1f} at width {widths[-1]:g}."
    )


def _about_order(result: Result, widths: list[float], split: str) -> str:
    """Calibration and order, over all widths and seeds."""
    counts = []
    for method in ("conditional", "fixed"):
        every = [losses_of(result, method, width, split=split) for width in widths]
        off, order = zip(*((off_diagonal(x), disorder(x)) for x in every), strict=True)
        counts.append(
            f"{method} {sum(n for n, _ in off)} (by {max(x for _, x in off):.2g} nats "
            f"at most) and {sum(n for n, _ in order)}"
        )
    models = sum(x["kl"].size for x in every)
    images = {"test": "test", "train": "training"}[split]
    return (
        f"Calibration and order on {images} images: how often, of {models} times (all "
        f"widths, seeds, {len(task.BETAS)} betas), the model of another beta does "
        f"better, and how often a loss goes the wrong way from the beta before: "
        f"{'; '.join(counts)}."
    )


def _about_overfitting(result: Result, width: float) -> str:
    """Whether the fixed models of low beta are worse on new images than others are."""
    at = {}
    for split in ("test", "train"):
        fixed = losses_of(result, "fixed", width, split=split)
        at[split] = off_diagonal(fixed)[1]
    if at["test"] < NOISE or at["test"] < 2 * at["train"]:
        return ""
    return (
        f"Width {width:g}: on test images a fixed model trained for another beta is up "
        f"to {at['test']:.2g} nats better than the one trained for it, on training "
        f"images {at['train']:.2g}: fixed models overfit, and a negative gap on test "
        "images is in part their overfitting."
    )


def _about_variants(result: Result) -> list[str]:
    there = _variants(result)
    mean = lambda m, split: gap(result, MIDDLE, m, split).mean()
    equal_cost = [m for m in there if m != "long"]
    sentences = []
    if len(equal_cost) > 1:
        best = min(equal_cost, key=lambda m: mean(m, "validation"))
        listed = ", ".join(
            f"{'not normalised' if m == 'conditional' else NAMES[m]} "
            f"{mean(m, 'validation'):.2f}"
            for m in equal_cost
        )
        choice = "as used here" if best == "conditional" else "not what is used here"
        sentences.append(
            f"Loss weights at width {MIDDLE}, mean gap on validation images: {listed}. "
            f"The best is {choice}."
        )
    if "long" in there:
        sentences.append(
            f"Trained for as many steps as all {len(task.BETAS)} fixed models, the "
            f"mean gap at width {MIDDLE} goes from {mean('conditional', 'test'):.2f} "
            f"to {mean('long', 'test'):.2f} on test images and from "
            f"{mean('conditional', 'train'):.2f} to {mean('long', 'train'):.2f} on "
            "training images."
        )
    return sentences


def _about_cost(result: Result, what: str, arm: str) -> str:
    parts = []
    for width in _cost_widths(result):
        ratio = _ratio(result, arm, what, width)
        if ratio:
            met = "within" if ratio[0] <= LIMITS[what] else "above"
            parts.append(f"{ratio[0]:.2f} at width {width:g} ({met} {LIMITS[what]:g})")
    if not parts:
        return ""
    name = {"forward": "A forward pass", "step": "A training step"}[what]
    return f"{name} with {arm} takes {', '.join(parts)} times that of a fixed model."


# Figures.

COLORS = (plots.SKY, plots.BLUE, plots.VERMILION, plots.BLACK, plots.PURPLE)


def figure(result: Result, path: Path) -> None:
    """Both losses against beta, and what the one model loses against the many."""
    widths = _pair_widths(result)
    drawing = Figure(figsize=(11, 8.4), dpi=110, layout="constrained")
    panels = drawing.subplots(2, 2)
    for width, color in zip(widths, COLORS, strict=False):
        for panel, name in zip(panels[0], LOSSES, strict=True):
            _draw_loss(panel, result, width, name, color)
        gaps = gap(result, width)
        plots.band(panels[1, 0], task.BETAS, gaps, color, f"width {width:g}")
        training = gap(result, width, split="train").mean(axis=0)
        panels[1, 0].plot(task.BETAS, training, "--", color=color, lw=1)
    for panel in panels.flat[:3]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(task.BETAS, [f"{beta:g}" for beta in task.BETAS])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("beta, weight of the KL divergence")
    panels[0, 0].plot([], [], color=plots.GREY, label="one conditional model")
    panels[0, 0].plot(
        [], [], "o", color=plots.GREY, mfc="white", label="one fixed model per beta"
    )
    panels[0, 0].legend(loc="lower right", frameon=False)
    panels[0, 0].set(title="Reconstruction", ylabel="negative log-likelihood (nats)")
    panels[0, 1].set_yscale("symlog", linthresh=0.1)
    panels[0, 1].set_ylim(-0.02, 100)
    panels[0, 1].yaxis.set_major_formatter("{x:g}")
    panels[0, 1].set(title="KL divergence", ylabel="KL (nats), linear below 0.1")
    style = dict(color=plots.GREY, lw=1)
    panels[1, 0].plot([], [], "--", **style, label="training images, mean")
    panels[1, 0].axhline(0, color=plots.GREY, lw=1, zorder=0)
    panels[1, 0].set(title="Gap: conditional minus fixed", ylabel="gap (nats)")
    panels[1, 0].legend(frameon=False)
    _draw_gap(panels[1, 1], result, widths)
    plots.save(drawing, path)


def _draw_loss(
    panel: Axes, result: Result, width: float, name: str, color: str
) -> None:
    ours = losses_of(result, "conditional", width, task.GRID)[name]
    fixed = losses_of(result, "fixed", width)[name]
    plots.band(panel, task.GRID, ours, color, f"width {width:g}")
    panel.plot(task.BETAS, fixed.mean(axis=0), "o", color=color, mfc="white")


def _draw_gap(panel: Axes, result: Result, widths: list[float]) -> None:
    """Mean over beta against width."""
    kinds = {"test": (plots.BLACK, "o-"), "train": (plots.ORANGE, "s--")}
    for split, (color, style) in kinds.items():
        means = [gap(result, width, split=split).mean(axis=1) for width in widths]
        deviations = [x.std(ddof=min(1, len(x) - 1)) for x in means]
        label = {"test": "test images", "train": "training images"}[split]
        panel.errorbar(
            widths,
            [x.mean() for x in means],
            deviations,
            fmt=style,
            color=color,
            capsize=3,
            label=label,
        )
        if "long" in _variants(result):
            mean = gap(result, MIDDLE, "long", split).mean()
            panel.plot(MIDDLE, mean, "*", color=color, markersize=13)
    if "long" in _variants(result):
        name = f"{len(task.BETAS)} times the steps"
        panel.plot([], [], "*", color=plots.GREY, markersize=12, label=name)
    panel.axhline(0, color=plots.GREY, lw=1, zorder=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(widths, [f"{width:g}" for width in widths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(
        title="Mean gap over the betas",
        xlabel=f"width (1: {result['meta']['hidden']} hidden units)",
        ylabel="mean gap (nats)",
    )
    panel.legend(frameon=False)
