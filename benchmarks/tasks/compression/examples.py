"""Pictures of what the trained models of the image codecs make."""

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tasks.compression import coder, task
from benchmarks.tasks.compression.jpeg import jpeg
from benchmarks.tasks.compression.methods import SUBSAMPLINGS
from benchmarks.tasks.compression.task import Params, Source


def examples(codec: coder.Codec, params: Params, source: Source, path: Path) -> None:
    """An image at three rates, above what JPEG makes of it with as many bytes."""
    image = most_detailed(source.test)
    pixels, jpegs = math.prod(image.shape[:3]), every_jpeg(image)
    tall = image.shape[1] / image.shape[2]
    drawing = Figure(figsize=(11, 5.4 * tall + 0.8), dpi=110, layout="compressed")
    panels = drawing.subplots(2, 4)
    panels[0, 0].imshow(image[0], interpolation="nearest")
    panels[0, 0].set_title("original, 24 bpp")
    panels[1, 0].axis("off")
    for column, weight in enumerate(task.grid(7)[[0, 2, 4]], start=1):
        coded = coder.compress(codec, params, weight, image)
        size, decoded = jpeg_of_size(image, jpegs, len(coded.data))
        for panel, name, data, shown in (
            (panels[0, column], "conditional", len(coded.data), coded.images),
            (panels[1, column], "JPEG", size, decoded),
        ):
            panel.imshow(shown[0], interpolation="nearest")
            panel.set_title(
                f"{name}: {8 * data / pixels:.2f} bpp, {task.psnr(image, shown):.1f} dB"
            )
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    drawing.savefig(path)


def most_detailed(images: np.ndarray) -> np.ndarray:
    """The image [1, h, w, 3] that JPEG needs the most bytes for."""
    sizes = [jpeg(images[i : i + 1], 75, "4:4:4")[0] for i in range(len(images))]
    return images[int(np.argmax(sizes))][None]


def every_jpeg(image: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Bytes without headers, and what they decode to."""
    settings = itertools.product(range(1, 96, 2), SUBSAMPLINGS)
    sizes, _, decoded = zip(*(jpeg(image, *s) for s in settings), strict=True)
    return list(zip(sizes, decoded, strict=True))


def jpeg_of_size(
    image: np.ndarray, jpegs: list[tuple[int, np.ndarray]], size: int
) -> tuple[int, np.ndarray]:
    """The best of at most this many bytes, or else the smallest."""
    fitting = [x for x in jpegs if x[0] <= size]
    if not fitting:
        return min(jpegs, key=lambda x: x[0])
    return max(fitting, key=lambda x: task.psnr(image, x[1]))
