"""JPEG in every setting, as the rival of a learned codec."""

import io
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.tasks.compression.methods import SUBSAMPLINGS


def jpeg(
    images: np.ndarray, quality: int, subsampling: str
) -> tuple[int, int, np.ndarray]:
    """Bytes without and with headers, and the images that they decode to.

    In JPEG's favour: all images as one picture, so that there is one set of tables;
    from its bytes those of a picture of one colour are taken away, so that headers are
    free; Huffman tables are optimised; the smaller of baseline and progressive counts.
    """
    n, h, w, _ = images.shape
    tall = images.reshape(n * h, w, 3)
    flat = np.full_like(tall, 128)
    sizes = []
    for progressive in (False, True):
        settings = {
            "quality": quality,
            "subsampling": SUBSAMPLINGS[subsampling],
            "optimize": True,
            "progressive": progressive,
        }
        file = _jpeg_file(tall, settings)
        sizes.append((len(file) - len(_jpeg_file(flat, settings)), len(file)))
    decoded = np.asarray(Image.open(io.BytesIO(file)))
    stripped, whole = map(min, zip(*sizes, strict=True))
    return stripped, whole, decoded.reshape(images.shape)


def _jpeg_file(image: np.ndarray, settings: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **settings)
    return buffer.getvalue()
