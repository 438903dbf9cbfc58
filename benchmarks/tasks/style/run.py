"""Loss-conditional style transfer: one network, a dial for each scale of the style.

One network is trained for all weights of four style losses at once, each example with
weights of its own that it is told. Set against it are networks of the same kind trained
for one weighting each. Contents for testing are cut from where no training content is.
"""

import functools
import io
import os
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness import common, plots
from benchmarks.harness.common import Options, Record, Result, Table
from benchmarks.tasks.style import task
from benchmarks.tasks.style.task import LOSSES, STYLES, Task
from yoto_jax import conditional

Array = jax.Array
Weights = dict[str, Any]

RESUMABLE = True
LOW, HIGH = 0.001, 10.0
MIDDLE = (LOW * HIGH) ** 0.5
LEARNING_RATE = 3e-3
LONGER = 4
METHODS = ("fixed", "conditional", "longer")


class Size(NamedTuple):
    """Of a preset: contents of ``side`` pixels, ``points`` of a walk."""

    side: int
    batch: int
    width: int
    blocks: int
    steps: int
    counts: tuple[int, int]
    points: int = 7


SIZES = {
    "quick": Size(24, 2, 8, 1, 10, (16, 4), points=7),
    "cpu": Size(40, 4, 32, 3, 1000, (512, 24)),
    "gpu": Size(64, 16, 96, 6, 20_000, (4096, 64)),
}


def weighting(**styles: Any) -> Weights:
    """Weights of all losses: 1 for the content, ``LOW`` for styles not named."""
    return {"content": 1.0, **dict.fromkeys(STYLES, LOW), **styles}


def everywhere(weight: Any) -> Weights:
    return weighting(**dict.fromkeys(STYLES, weight))


SUPPORT = conditional.LogUniform(everywhere(LOW), everywhere(HIGH))
WEIGHTINGS = {
    "all low": everywhere(LOW),
    "all middle": everywhere(MIDDLE),
    "all high": everywhere(HIGH),
    **{f"{style} high": weighting(**{style: HIGH}) for style in STYLES},
}
WALKS = (*STYLES, "all")


def walk(name: str, points: int) -> Weights:
    """Weights (points,) as one dial, or all of them, turn up; the others are low."""
    rising = np.geomspace(LOW, HIGH, points)
    some = everywhere(rising) if name == "all" else weighting(**{name: rising})
    return {w: np.broadcast_to(np.float32(x), points) for w, x in some.items()}


def places_of(points: int) -> list[str]:
    """Names of the weights of a walk, in the records."""
    return [f"{weight:.4g}" for weight in np.geomspace(LOW, HIGH, points)]


def main(options: Options) -> None:
    methods = options.choose(METHODS)
    size = SIZES[options.preset]
    steps = options.steps or size.steps
    photographs = task.load(options.data)
    made = task.make_task(photographs, size.side, counts=size.counts)
    name = "style" if options.data is None else f"style_{options.data.name}"
    units = common.Units(options, name)
    trained = train_all(made, size, methods, options.seeds, steps, units)
    seconds = units.seconds
    records = measure_all(made, size, trained)
    settings = size._replace(steps=steps)._asdict()
    result = common.write_json(
        options.out / f"{name}.json",
        common.meta(
            options,
            seeds=options.seeds,
            seconds=round(seconds),
            parameters=parameters(size),
            data="scikit-learn" if options.data is None else options.data.name,
            **settings,
        ),
        records,
    )
    figure(result, options.out / f"{name}.png")
    shown = [m for m in ("longer", "conditional") if m in methods]
    if shown:
        params = jax.tree.map(lambda x: x[0], trained[shown[0]])
        examples(made, size, params, options.out / f"{name}_examples.png")
    for each in (table(result), *tables(result).values()):
        common.show(each)
    for sentence in conclusions(result):
        common.say(sentence)
    common.say(f"Written: {options.out / name}.json and .png")


# Training.


def train_all(
    made: Task,
    size: Size,
    methods: tuple[str, ...],
    seeds: int,
    steps: int,
    units: common.Units,
) -> dict[str, Any]:
    """Parameters (seeds, ...) by method, of fixed ones (seeds, weightings, ...)."""
    runs: dict[str, tuple[Weights, float, int]] = {}
    if "longer" in methods:  # first: the others fit around it
        runs["longer"] = (WEIGHTINGS["all middle"], 1.0, LONGER * steps)
    if "conditional" in methods:
        runs["conditional"] = (WEIGHTINGS["all middle"], 1.0, steps)
    if "fixed" in methods:
        fixed = {f"fixed, {w}": (x, 0.0, steps) for w, x in WEIGHTINGS.items()}
        runs |= fixed
    keys = jax.random.split(jax.random.key(0), seeds)
    one = functools.partial(train, made.losses, size)
    every_seed = jax.jit(jax.vmap(one, in_axes=(None, 0, None, None, None)))
    contents = jnp.asarray(made.train)
    if missing := [run for name, run in runs.items() if name not in units]:
        program = every_seed.lower(contents, keys, *missing[0]).compile()

    def finish(name: str) -> Any:
        return units.do(name, lambda: program(contents, keys, *runs[name]))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(finish, common.track(list(runs), "style"))
        trained = dict(zip(runs, outcomes, strict=True))
    if "fixed" in methods:
        every = [trained.pop(name) for name in fixed]
        trained["fixed"] = jax.tree.map(lambda *x: np.stack(x, axis=1), *every)
    return trained


def train(
    losses: Any,
    size: Size,
    contents: Array,
    key: Array,
    center: Weights,
    spread: Array,
    steps: Array,
) -> Any:
    """Parameters of a network.

    Args:
      losses: Of images and contents.
      size: Of the network and the batch.
      contents: To draw from.
      key: The seed.
      center: The weighting, of scalars.
      spread: 0: it stays there; 1: weights are drawn for each example.
      steps: How many. It and the spread are no constants, so that runs of all kinds
        share one program.
    """
    net = task.Transfer(size.width, size.blocks)
    adam = optax.flatten(
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    )

    def draw(key: Array) -> tuple[Array, Array, Weights]:
        keys = jax.random.split(key, 4)
        some = contents[jax.random.choice(keys[0], len(contents), (size.batch,))]
        mirrored = jax.random.bernoulli(keys[1], 0.5, (size.batch, 1, 1, 1))
        some = jnp.where(mirrored, some[:, :, ::-1], some)
        drawn = SUPPORT.sample(keys[2], size.batch, method="stratified")
        weights = jax.tree.map(
            lambda c, w: c ** (1 - spread) * w**spread, center, drawn
        )
        return some, task.draw_noise(keys[3], some), weights

    def objective(params: Any, some: Array, noise: Array, weights: Weights) -> Array:
        encoded = conditional.encode(weights, SUPPORT)
        values = losses(net.apply(params, some, noise, encoded), some)
        # Divided by the sum: else a step would be about those with high weights alone.
        return conditional.conditional_loss(values, weights, normalize="sum")

    def step(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        gradient = jax.grad(objective)(params, *draw(jax.random.fold_in(key, i)))
        updates, state = adam.update(gradient, state)
        rate = LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    some, noise, weights = draw(key)
    params = net.init(key, some, noise, conditional.encode(weights, SUPPORT))
    return jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))[0]


def parameters(size: Size) -> int:
    """How many a network has."""
    net = task.Transfer(size.width, size.blocks)
    contents = jnp.zeros((1, size.side, size.side, 3))
    noise = jnp.zeros((1, size.side, size.side, task.NOISE))
    encoded = jnp.zeros((1, len(STYLES)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), contents, noise, encoded)
    return sum(x.size for x in jax.tree.leaves(shapes))


# Measuring.


def measure_all(made: Task, size: Size, trained: dict[str, Any]) -> list[Record]:
    """Every loss on the contents for testing, at every weighting."""
    contents = jnp.asarray(made.test)
    noise = task.draw_noise(jax.random.key(1), contents)
    net = task.Transfer(size.width, size.blocks)

    def losses_of(pair: tuple[Any, Weights]) -> Weights:
        params, weights = pair
        encoded = conditional.encode(jax.tree.map(jnp.atleast_1d, weights), SUPPORT)
        values = made.losses(net.apply(params, contents, noise, encoded), contents)
        return jax.tree.map(jnp.mean, values)

    pairs = jax.jit(lambda params, weights: jax.lax.map(losses_of, (params, weights)))

    def measure(params: Any, weights: Weights) -> Weights:
        """Losses (seeds, n), of parameters with axes (seeds, n), at weights (n,)."""
        seeds, n = jax.tree.leaves(params)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(seeds * n, *x.shape[2:]), params)
        values = pairs(flat, {k: np.tile(w, seeds) for k, w in weights.items()})
        return {k: np.asarray(v).reshape(seeds, n) for k, v in values.items()}

    weightings = ("", list(WEIGHTINGS), stacked(list(WEIGHTINGS)))
    places = places_of(size.points)
    walks = [(dial, places, walk(dial, size.points)) for dial in WALKS]
    records = []
    for method, params in trained.items():
        if method == "fixed":
            records += _records(method, *weightings[:2], measure(params, weightings[2]))
            continue
        for dial, names, weights in (weightings, *walks):
            same = _repeat(params, len(names))
            records += _records(method, dial, names, measure(same, weights))
    return records


def _repeat(params: Any, n: int) -> Any:
    """Parameters (seeds, n, ...), the same for all weightings."""
    return jax.tree.map(lambda x: np.repeat(x[:, None], n, axis=1), params)


def stacked(names: Sequence[str]) -> Weights:
    """The weightings of these names, as arrays (n,)."""
    weightings = [WEIGHTINGS[name] for name in names]
    return {loss: np.float32([w[loss] for w in weightings]) for loss in LOSSES}


def _records(method: str, dial: str, names: list[str], values: Weights) -> list[Record]:
    """Of losses (seeds, n); the domain is the walk, empty for the weightings."""
    return [
        common.record(
            method,
            loss,
            values[loss][seed, i],
            config=name,
            seed=seed,
            domain=dial,
            compute=LONGER if method == "longer" else 1,
        )
        for i, name in enumerate(names)
        for loss in LOSSES
        for seed in range(len(values[loss]))
    ]


# What follows reads the stored result and nothing else.


def _losses(result: Result, method: str, dial: str, names: Sequence[str]) -> Weights:
    """Losses (seeds, n) at the weightings of these names."""
    of = common.select(result["records"], method=method, domain=dial)
    rows = {
        loss: [common.values(of, metric=loss, config=name) for name in names]
        for loss in LOSSES
    }
    return {loss: np.stack(values, axis=1) for loss, values in rows.items()}


def _has(result: Result, method: str) -> bool:
    return bool(common.select(result["records"], method=method))


def totals(result: Result, method: str) -> np.ndarray:
    """Weighted mean of the losses (seeds, n) at the weightings."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    sums = np.sum(list(weights.values()), axis=0)
    return _weighted(_losses(result, method, "", names), weights) / sums


def _weighted(losses: Weights, weights: Weights) -> np.ndarray:
    return np.sum([weights[loss] * losses[loss] for loss in LOSSES], axis=0)


def gaps(result: Result, method: str) -> np.ndarray:
    """By how much a method is above the networks for one weighting, relative."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    reference = _losses(result, "fixed", "", names)
    measured = _losses(result, method, "", names)
    gap = jax.vmap(conditional.gap, in_axes=(0, 0, None))
    above = np.asarray(gap(measured, reference, weights))
    return above / _weighted(reference, weights)


def elsewhere(result: Result) -> np.ndarray:
    """Likewise if the network for the middle is used for all weightings."""
    names = list(WEIGHTINGS)
    weights = stacked(names)
    losses = _losses(result, "fixed", "", names)
    matrix = np.stack(
        [
            conditional.cross_matrix({k: v[seed] for k, v in losses.items()}, weights)
            for seed in range(result["meta"]["seeds"])
        ]
    )
    own = np.diagonal(matrix, axis1=1, axis2=2)
    return matrix[:, :, names.index("all middle")] / own - 1


CONDITIONAL = ("conditional", "longer")


def _present(result: Result) -> list[str]:
    return [method for method in CONDITIONAL if _has(result, method)]


def _title(method: str) -> str:
    return f"conditional, {LONGER}x steps" if method == "longer" else method


def table(result: Result) -> Table:
    """The weighted mean of the losses at each weighting, and the gaps."""
    present, fixed = _present(result), _has(result, "fixed")
    columns = ["weighting"]
    cells = []
    if fixed:
        columns += ["fixed", "fixed for all middle"]
        cells.append([common.mean_sd(x, 3) for x in totals(result, "fixed").T])
        cells.append([_percent(x) for x in elsewhere(result).T])
    for method in present:
        columns.append(_title(method))
        total = [common.mean_sd(x, 3) for x in totals(result, method).T]
        if fixed:
            gap = gaps(result, method).T
            total = [f"{t} ({_percent(g)})" for t, g in zip(total, gap, strict=True)]
        cells.append(total)
    runs = len(WEIGHTINGS)
    meta = result["meta"]
    caption = (
        f"Weighted mean of content and four style losses on held-out contents, over "
        f"{meta['seeds']} seeds. A style loss is 1 for contents as they are, content "
        f"is 1 for a uniform grey. Fixed: {runs} networks, each trained for its "
        f"weighting, {runs} runs of {meta['steps']} steps. Conditional: one network, "
        f"1 run ({LONGER}x: {LONGER} runs). In percent: above the fixed "
        f'networks; "fixed for all middle" is one of them used at every '
        f"weighting. High is {HIGH:g}, low {LOW:g}, middle {MIDDLE:g}; content "
        f"1. {meta['parameters']} parameters each. All training: {meta['seconds']} s, "
        f"{meta['device']} ({meta['cpu_count']} cores)."
    )
    rows = [[n, *c] for n, *c in zip(WEIGHTINGS, *cells, strict=True)]
    return Table(columns, rows, caption)


def _percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():+.0f} %"


def tables(result: Result) -> dict[str, Table]:
    return {"style-losses": losses_table(result), "style-dials": dials_table(result)}


def losses_table(result: Result) -> Table:
    """Every loss at each weighting, of the fixed networks and the conditional ones."""
    methods = [m for m in ("fixed", *CONDITIONAL) if _has(result, m)]
    names = list(WEIGHTINGS)
    rows = []
    for i, name in enumerate(names):
        for method in methods:
            losses = _losses(result, method, "", names)
            cells = [common.mean_sd(losses[loss][:, i], 3) for loss in LOSSES]
            rows.append([f"{name}: {_title(method)}", *cells])
    return Table(["weighting", *LOSSES], rows, "Lower is better.")


def dials_table(result: Result) -> Table:
    """What turning up each dial does to the loss that it is for."""
    columns = ["dial", "method", "loss at the lowest", "at the highest"]
    columns += ["rank correlation", "pairs that violate", "content at the highest"]
    rows = []
    for dial in WALKS:
        for method in _present(result):
            turned = turn(result, method, dial)
            own, content = turned["own"], turned["content"]
            rows.append(
                [
                    dial,
                    _title(method),
                    common.mean_sd(own[:, 0], 3),
                    common.mean_sd(own[:, -1], 3),
                    common.mean_sd(turned["correlation"], 2),
                    f"{100 * turned['violations'].mean():.0f} %",
                    common.mean_sd(content[:, -1], 3),
                ]
            )
    caption = (
        f"One weight rises from {LOW:g} to {HIGH:g} in {result['meta']['points']} "
        "steps, the other styles stay low; all: they rise together, and the loss is "
        "their mean. Rank correlation of weight and loss: -1 is right. Pairs of "
        "weightings violate if the loss is higher where the weight is."
    )
    return Table(columns, rows, caption)


def turn(result: Result, method: str, dial: str) -> dict[str, np.ndarray]:
    """What a dial does: losses (seeds, points), correlation and violations (seeds,)."""
    points = result["meta"]["points"]
    places = places_of(points)
    losses, weights = _losses(result, method, dial, places), walk(dial, points)
    chosen = STYLES if dial == "all" else (dial,)
    own = np.mean([losses[loss] for loss in chosen], axis=0)
    violations = jax.vmap(conditional.monotonicity_violations, in_axes=(0, None))
    above = np.asarray(violations(losses, weights)) > TOLERANCE
    pairs = np.triu_indices(points, 1)
    return {
        "own": own,
        "content": losses["content"],
        "correlation": np.array([rank_correlation(x) for x in own]),
        "violations": above[:, *pairs].mean(axis=1),
    }


TOLERANCE = 1e-4  # what rounding of the records can make of nothing


def rank_correlation(values: np.ndarray) -> float:
    """Spearman's, of values with their order."""
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    sentences = []
    present, fixed = _present(result), _has(result, "fixed")
    for method in present if fixed else []:
        gap = gaps(result, method).mean(axis=0)
        ours, theirs = (totals(result, m).mean(axis=0) for m in (method, "fixed"))
        runs = LONGER if method == "longer" else 1
        worst = int(gap.argmax())
        sentences.append(
            f"{_title(method).capitalize()}, {runs} run{'s' if runs > 1 else ''} "
            f"instead of {len(gap)}: the weighted loss, averaged over the weightings, "
            f"is {ours.mean():.3f} against {theirs.mean():.3f} of networks trained for "
            f"each ({100 * (ours.mean() / theirs.mean() - 1):+.0f} %), below theirs at "
            f"{int((gap < 0).sum())} of {len(gap)}. The largest excess relative to "
            f"theirs is {100 * gap[worst]:+.0f} % ({list(WEIGHTINGS)[worst]}, "
            f"{ours[worst]:.3f} against {theirs[worst]:.3f}), the median "
            f"{100 * np.median(gap):+.0f} %."
        )
    if fixed:
        wrong = elsewhere(result).mean(axis=0)
        others = np.delete(wrong, list(WEIGHTINGS).index("all middle"))
        sentences.append(
            "One fixed network, that for the middle, used at the other weightings: "
            f"median {100 * np.median(others):+.0f} % relative to theirs, at worst "
            f"{100 * others.max():+.0f} %."
        )
    for method in present:
        turns = {dial: turn(result, method, dial) for dial in WALKS}
        correlations = {d: t["correlation"].mean() for d, t in turns.items()}
        listed = ", ".join(f"{d} {c:.2f}" for d, c in correlations.items())
        violations = np.mean([t["violations"] for t in turns.values()])
        names = list(WEIGHTINGS)
        matrix = conditional.cross_matrix(
            {k: v.mean(axis=0) for k, v in _losses(result, method, "", names).items()},
            stacked(names),
        )
        calibrated = int((np.argmin(matrix, axis=1) == np.arange(len(names))).sum())
        sentences.append(
            f"{_title(method).capitalize()}: rank correlation of a weight with the "
            f"loss that it is for: {listed} (-1 is right); {100 * violations:.0f} % of "
            f"the pairs of weightings violate monotonicity. At {calibrated} of "
            f"{len(names)} weightings the best setting of the dials, among these, is "
            "the one that was asked for."
        )
    return sentences


# Figures.

COLORS = dict(
    zip(
        LOSSES,
        (plots.BLACK, plots.SKY, plots.BLUE, plots.GREEN, plots.VERMILION),
        strict=True,
    )
)


def figure(result: Result, path: Path) -> None:
    """All losses as each dial turns up, and the networks for one weighting."""
    drawing = Figure(figsize=(15, 4.3), dpi=90, layout="constrained")
    panels = drawing.subplots(1, len(WALKS), sharey=True)
    for panel, dial in zip(panels, WALKS, strict=True):
        for method in _present(result):
            _draw_walk(panel, result, method, dial)
        if _has(result, "fixed"):
            _draw_fixed(panel, result, dial)
        panel.set_xscale("log")
        panel.set_xlabel("all style weights" if dial == "all" else f"weight of {dial}")
        panel.set_title(_scale(dial, " "), fontsize=11)
    panels[0].set_ylabel("loss on held-out contents")
    panels[0].set_ylim(bottom=0)
    look = dict(color=plots.GREY)
    for method, line in _lines(result).items():
        panels[-1].plot([], [], label=f"{_title(method)}, one network", **line, **look)
    if _has(result, "fixed"):
        label = "fixed, one network a point"
        panels[-1].plot([], [], "o", markeredgecolor="white", label=label, **look)
    handles, labels = panels[-1].get_legend_handles_labels()
    drawing.legend(
        handles, labels, loc="outside lower center", ncols=len(handles), frameon=False
    )
    plots.save(drawing, path)


def _scale(dial: str, between: str) -> str:
    which = {STYLES[0]: "(finest)", STYLES[-1]: "(coarsest)"}.get(dial)
    return f"{dial}{between}{which}" if which else dial


def _lines(result: Result) -> dict[str, dict[str, Any]]:
    """Looks of the conditional networks: the one with most steps is solid."""
    *others, best = _present(result) or [""]
    looks = {method: dict(lw=1.2, ls=(0, (4, 2))) for method in others}
    return looks | ({best: dict(lw=2, ls="-")} if best else {})


def _draw_walk(panel: Axes, result: Result, method: str, dial: str) -> None:
    points = result["meta"]["points"]
    rising = np.geomspace(LOW, HIGH, points)
    line = _lines(result)[method]
    for loss, values in _losses(result, method, dial, places_of(points)).items():
        look = dict(color=COLORS[loss], alpha=_alpha(loss, dial), **line)
        label = loss if line["ls"] == "-" else None
        panel.plot(rising, values.mean(axis=0), label=label, **look)
        if label and _alpha(loss, dial) == 1:
            band = values.min(axis=0), values.max(axis=0)
            panel.fill_between(rising, *band, color=COLORS[loss], alpha=0.15, lw=0)


def _alpha(loss: str, dial: str) -> float:
    """Faint: what the dial is not for."""
    return 1.0 if loss in ("content", dial) or dial == "all" else 0.3


def _draw_fixed(panel: Axes, result: Result, dial: str) -> None:
    """Those that lie on the walk, with the standard deviation over seeds."""
    places = {"all low": LOW, f"{dial} high": HIGH}
    if dial == "all":
        places["all middle"] = MIDDLE
    for loss, values in _losses(result, "fixed", "", list(places)).items():
        if _alpha(loss, dial) == 1:
            panel.errorbar(
                list(places.values()),
                values.mean(axis=0),
                values.std(axis=0, ddof=min(1, len(values) - 1)),
                fmt="o",
                ms=6,
                color=COLORS[loss],
                markeredgecolor="white",
                zorder=3,
            )


def examples(made: Task, size: Size, params: Any, path: Path) -> None:
    """One held-out image in the style, as each dial turns up, by one network."""
    net = task.Transfer(size.width, size.blocks)
    whole = made.images.test[0][:136]
    h, w = (side - side % task.PATCH for side in whole.shape[:2])
    contents = jnp.asarray(whole[None, :h, :w])
    noise = task.draw_noise(jax.random.key(1), contents)

    def painted(weights: Weights) -> Array:
        encoded = conditional.encode(jax.tree.map(jnp.atleast_1d, weights), SUPPORT)
        return net.apply(params, contents, noise, encoded)[0]

    sweep = jax.jit(lambda weights: conditional.sweep(painted, weights, batch_size=1))
    columns = 5
    rising = np.geomspace(LOW, HIGH, columns)
    tall = 1.39 * h / w + 0.06
    drawing = Figure(
        figsize=(1.55 * (columns + 1), tall * len(WALKS) + 0.4),
        dpi=80,
        layout="constrained",
    )
    panels = drawing.subplots(len(WALKS), columns + 1)
    for row, dial in zip(panels, WALKS, strict=True):
        for panel, image, weight in zip(
            row[1:], np.asarray(sweep(walk(dial, columns))), rising, strict=True
        ):
            panel.imshow(image)
            if dial == WALKS[0]:
                panel.set_title(f"weight {weight:g}", fontsize=10)
        row[1].set_ylabel(_scale(dial, "\n"), fontsize=11)
    for panel, image, title in (
        (panels[0, 0], contents[0], "content"),
        (panels[1, 0], made.images.style, "style"),
    ):
        panel.imshow(image)
        panel.set_title(title, fontsize=10)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    _save_small(drawing, path)


def _save_small(drawing: Figure, path: Path) -> None:
    """With a palette: of so many strokes a picture in full colour has megabytes."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
