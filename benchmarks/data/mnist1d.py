"""MNIST-1D: ten shapes on a line, moved, stretched, sheared and noisy, made here.

The recipe is that of Greydanus and Kobak, `Scaling Down Deep Learning
<https://arxiv.org/abs/2011.14439>`_, 2020, with its numbers; the code and the draws are
ours. What a signal was made of comes with it: position, size and the clean signal.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d

LENGTH = 40
CLASSES = 10

_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING = (36, 60)
_LONG = len(_TEMPLATES[0]) + _PADDING[1]  # points of a signal before it is thinned
_SIZES = 0.4  # width of the range of sizes, around 1
_POSITIONS = 48  # of the long signal
_SLOPES = 0.75  # width of the range of slopes, around 0
_CORRELATED_NOISE = 0.25
_CORRELATION = 2.0
_NOISE = 0.02


class Signals(NamedTuple):
    """Signals and what they were made of, one a row."""

    x: np.ndarray  # float32 [n, 40], mean 0 and variance 1 over all
    label: np.ndarray  # int32 [n]
    position: np.ndarray  # float32 [n], from 0 to 1
    size: np.ndarray  # float32 [n], around 1
    clean: np.ndarray  # float32 [n, 40], no noise and no slope, in the unit of x


def generate(n: int, seed: int) -> Signals:
    """Signals of all classes, equally many of each, in random order."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(n) % CLASSES)
    shape, inside = _stretched(_templates()[label], rng)
    size = 1 + _SIZES * (rng.random(n) - 0.5)
    position = rng.integers(_POSITIONS, size=n)
    columns = (np.arange(_LONG) - position[:, None]) % _LONG
    clean = np.take_along_axis(size[:, None] * shape, columns, axis=1)
    inside = np.take_along_axis(inside, columns, axis=1)
    white = _CORRELATED_NOISE * rng.standard_normal(clean.shape)
    x = np.where(inside, clean, gaussian_filter1d(white, _CORRELATION, axis=1))
    x = x + _NOISE * rng.standard_normal(x.shape)
    slope = _SLOPES * (rng.random((n, 1)) - 0.5)
    x = _thinned(x - slope * np.linspace(-0.5, 0.5, _LONG))
    return Signals(
        ((x - x.mean()) / x.std()).astype(np.float32),
        label.astype(np.int32),
        (position / (_POSITIONS - 1)).astype(np.float32),
        size.astype(np.float32),
        (_thinned(clean) / x.std()).astype(np.float32),
    )


def _templates() -> np.ndarray:
    """The shapes [10, 12], all of one spread, starting from 0."""
    x = np.array(_TEMPLATES)
    x = x - x.mean(axis=1, keepdims=True)
    x = x / x.std(axis=1, keepdims=True)
    return (x - x[:, :1]) / 6


def _stretched(
    shapes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shapes with zeros after them, on the long grid, and where the shapes are.

    The more zeros there are, the narrower is the shape.
    """
    n, points = shapes.shape
    padding = rng.integers(_PADDING[0], _PADDING[1] + 1, size=(n, 1))
    places = np.linspace(0, 1, _LONG) * (points + padding - 1)
    padded = np.pad(shapes, ((0, 0), (0, 2)))
    left = np.minimum(places.astype(int), points)
    share = np.minimum(places - left, 1)
    at = lambda columns: np.take_along_axis(padded, columns, axis=1)
    return (1 - share) * at(left) + share * at(left + 1), places < points


def _thinned(x: np.ndarray) -> np.ndarray:
    """The same signals on 40 points."""
    places = np.linspace(0, x.shape[1] - 1, LENGTH)
    left = np.minimum(places.astype(int), x.shape[1] - 2)
    share = places - left
    return (1 - share) * x[:, left] + share * x[:, left + 1]
