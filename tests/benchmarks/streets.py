"""A folder of images in the layout of CamVid."""

import numpy as np
from PIL import Image

from benchmarks.data.camvid import VOID


def write(folder, **counts):
    """Streets for each part: a bright sky above a dark road, a void line between."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in (split, f"{split}annot"):
            (folder / kind).mkdir()
        for i in range(count):
            labels = np.zeros((48, 64), np.uint8)
            horizon = 20 + i % 12
            labels[horizon:], labels[horizon] = 3, VOID
            image = rng.integers(0, 50, (48, 64, 3), np.uint8)
            image[:horizon] += 200
            Image.fromarray(image).save(folder / split / f"{i:02d}.png")
            Image.fromarray(labels).save(folder / f"{split}annot" / f"{i:02d}.png")
    return folder
