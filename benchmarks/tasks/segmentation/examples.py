"""Pictures of what the trained models of the segmentation task make."""

from pathlib import Path

import jax
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.harness import contest as contests
from benchmarks.harness import plots
from benchmarks.harness.runs import Run, settings, train
from benchmarks.harness.training import Task
from benchmarks.tasks.segmentation import task

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


def examples(
    made: Task,
    source: task.Source,
    net: task.SegmentationNet,
    path: Path,
) -> None:
    """Images, their labels, and what a model with equal weights makes of them."""
    equal = settings(ratios=(1.0,) * len(task.AUXILIARY), learn=False)
    run = Run(contests.SOFTMAX, 0, equal)
    model = train(made, contests.RULES[run.rule], run)
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
