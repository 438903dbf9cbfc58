"""Pictures of what the trained models of the style transfer make."""

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.tasks.style import task
from benchmarks.tasks.style.methods import (
    HIGH,
    LOW,
    SUPPORT,
    WALKS,
    Array,
    Size,
    Weights,
    walk,
)
from benchmarks.tasks.style.report import scale
from benchmarks.tasks.style.task import Task
from yoto_jax import conditional


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
        row[1].set_ylabel(scale(dial, "\n"), fontsize=11)
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
