"""Segmentation with learned and searched loss weights: one run against a sweep.

Every method trains the same network on the same images with the same seeds. Searches
choose on held-out images, clean and stylised as in training; GraP and softmax alignment
are steered by the same images. No labelled image of a target condition chooses
anything.
"""

import math
from pathlib import Path

import jax
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.harness import common, experiment, plots
from benchmarks.harness import contest as contests
from benchmarks.harness.common import Options, Result, Table
from benchmarks.harness.contest import NONE, Contest
from benchmarks.harness.experiment import Run
from benchmarks.tasks.segmentation import task

RESUMABLE = True
EXPONENTS = (-2, -1.5, -1, -0.5, 0, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
GRID = ((NONE,), *((10.0**x,) for x in EXPONENTS))
BOUNDS = ((0.01, 100.0),)
PUBLISHED = (10.0,)
PAPER = {"ratios": (math.exp(-4),), "rho": 200.0, "sgd": 1.0}
RHOS = (1.0, 20.0, 50.0, 500.0)
METRIC = "mIoU"
ROUNDS = {"quick": 0, "cpu": 9, "gpu": 9}
BUDGET = {"quick": 2}


def contest(made: experiment.Task | None, budget: int | None = None) -> Contest:
    methods = contests.methods(
        len(task.AUXILIARY), GRID, BOUNDS, PUBLISHED, PAPER, RHOS, budget
    )
    rules = contests.rules(BOUNDS, groups=4)
    return Contest(made, METRIC, 1, "mIoU (%)", task.CLEAN, task.UNSEEN, methods, rules)


def main(options: Options) -> None:
    chosen = contests.check(contest(None), options)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    source = task.load(size, options.data)
    made, net = task.make(size, source)
    ours = contest(made, BUDGET.get(options.preset))
    records, history = contests.contend(ours, options, chosen, ROUNDS)
    constant = {(METRIC, d): value for d, value in task.constant(source).items()}
    records += contests.constant_records(task.UNSEEN, constant)
    settings = {
        "seeds": options.seeds,
        "data": source.name,
        "classes": len(source.classes),
        **size._asdict(),
        "train_images": len(source.train.images),
        "target_images": len(source.targets),
        "validation_images": len(source.validation.images),
        "test_images": len(source.tests[task.CLEAN].images),
    }
    path = options.out / f"{made.name}.json"
    result = common.write_json(
        path, common.meta(options, **settings), records, history=history
    )
    figure(result, path.with_suffix(".png"))
    examples(made, source, net, path.with_name(f"{path.stem}_examples.png"))
    common.show(table(result), summary(result))
    common.show(contests.claims(view(result)))
    common.say(f"Written: {path} and figures beside it")


COLORS = {
    "sky": plots.SKY,
    "ground": plots.GREY,
    "road": plots.GREY,
    "building": plots.VERMILION,
    "box": plots.ORANGE,
    "ball": plots.PURPLE,
    "pole": plots.BLACK,
    "pavement": "#D9C7A8",
    "tree": plots.GREEN,
    "sign": "#F0E442",
    "fence": "#8B5A2B",
    "car": plots.BLUE,
    "pedestrian": plots.PURPLE,
    "bicyclist": plots.ORANGE,
}


# What follows reads the stored result and nothing else.


def view(result: Result) -> contests.View:
    return contests.view(contest(None), result)


def table(result: Result) -> Table:
    meta = result["meta"]
    seen = view(result)
    return contests.table(
        seen,
        (task.PRIMARY, *task.AUXILIARY),
        f"mIoU in %, mean ± standard deviation over {meta['seeds']} seeds; "
        f"{meta['data']}: {meta['train_images']} training, "
        f"{meta['validation_images']} held-out and {meta['test_images']} test images, "
        f"{meta['classes']} classes; {meta['steps']} steps, {meta['device']} "
        f"({meta['cpu_count']} cores). The usual class of each pixel, whatever the "
        f"image shows, has {seen.constant():.1f}. Runs: total cost in units of one run "
        "with constant weights. Weights: of ce and invariance, at the end.",
    )


def summary(result: Result) -> Table:
    return contests.short(table(result), view(result))


def tables(result: Result) -> dict[str, Table]:
    return {
        "segmentation-claims": contests.claims(view(result)),
        "segmentation-costs": contests.cost_table(view(result)),
    }


def figure(result: Result, path: Path) -> None:
    contests.figure(
        view(result), (task.PRIMARY, *task.AUXILIARY), path, "mIoU on unseen (%)"
    )


def examples(
    made: experiment.Task,
    source: task.Source,
    net: task.SegmentationNet,
    path: Path,
) -> None:
    """Images, their labels, and what a model with equal weights makes of them."""
    equal = experiment.settings(ratios=(1.0,) * len(task.AUXILIARY), learn=0.0)
    run = Run(contests.SOFTMAX, 0, equal)
    model = experiment.train(made, contests.RULES[run.rule], run)
    classes = len(source.classes)
    colors = ListedColormap([COLORS[name] for name in source.classes])
    drawing = Figure(figsize=(12, 4.6), dpi=100, layout="compressed")
    panels = drawing.subplots(3, 2 * len(source.tests))
    for column, (domain, images) in enumerate(source.tests.items()):
        few = jax.tree.map(lambda x: x[:: max(1, len(x) // 2)][:2], images)
        predicted = np.argmax(net.apply({"params": model}, few.images), axis=-1)
        for i in range(2):
            of_image = panels[:, 2 * column + i]
            of_image[0].imshow(np.clip(few.images[i], 0, 1))
            truth = np.ma.masked_equal(few.labels[i], source.void)
            for panel, shown in zip(of_image[1:], (truth, predicted[i]), strict=True):
                panel.imshow(shown, cmap=colors, vmin=-0.5, vmax=classes - 0.5)
        panels[0, 2 * column].set_title(domain, loc="left")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for row, name in enumerate(("image", "labels", "predicted")):
        panels[row, 0].set_ylabel(name)
    patches = [
        Patch(color=colors(i), label=name) for i, name in enumerate(source.classes)
    ]
    drawing.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    drawing.savefig(path)
