"""What is compared of the style transfer: weightings, their places and walks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.tasks.style.task import LOSSES, STYLES
from yoto_jax import conditional

Array = jax.Array
Weights = dict[str, Any]
LOW, HIGH = 0.001, 10.0
MIDDLE = (LOW * HIGH) ** 0.5
LONGER = 4


class Size(NamedTuple):
    """Of a preset: contents of ``side`` pixels, ``points`` of a walk."""

    side: int
    batch: int
    width: int
    blocks: int
    steps: int
    counts: tuple[int, int]
    points: int = 7


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


def stacked(names: Sequence[str]) -> Weights:
    """The weightings of these names, as arrays (n,)."""
    weightings = [WEIGHTINGS[name] for name in names]
    return {loss: np.float32([w[loss] for w in weightings]) for loss in LOSSES}
