"""Pictures of what the trained models of the depth task make."""

from pathlib import Path

import jax
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.data.scenes import Scenes
from benchmarks.harness import contest as contests
from benchmarks.harness.runs import Run, settings, train
from benchmarks.harness.training import Task
from benchmarks.tasks.depth import task

EXAMPLES = (task.SEEN, *task.UNSEEN)


def examples(
    made: Task, tests: dict[str, Scenes], net: task.DepthNet, path: Path
) -> None:
    """Images, their depth, and what a model with equal weights makes of them."""
    equal = settings(ratios=(1.0,) * len(task.AUXILIARY), learn=False)
    run = Run(contests.SOFTMAX, 0, equal)
    model = train(made, contests.RULES[run.rule], run)
    drawing = Figure(figsize=(12, 3.5), dpi=100, layout="compressed")
    panels = drawing.subplots(3, 2 * len(EXAMPLES))
    for column, domain in enumerate(EXAMPLES):
        data = jax.tree.map(lambda x: x[:2], tests[domain])
        log_depth, _ = net.apply({"params": model}, data.images)
        for i in range(2):
            of_image = panels[:, 2 * column + i]
            truth = np.where(data.depth[i] > 0, data.depth[i], np.nan)
            of_image[0].imshow(np.clip(data.images[i], 0, 1))
            for panel, shown in (
                (of_image[1], truth),
                (of_image[2], np.exp(log_depth[i])),
            ):
                mapped = panel.imshow(shown, cmap="viridis", norm=LogNorm(1, 40))
        panels[0, 2 * column].set_title(domain, loc="left")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for row, name in enumerate(("image", "true depth", "predicted")):
        panels[row, 0].set_ylabel(name)
    bar = drawing.colorbar(mapped, ax=panels, shrink=0.6, label="depth (m)")
    ticks = [1, 2, 5, 10, 20, 40]
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    drawing.savefig(path)
