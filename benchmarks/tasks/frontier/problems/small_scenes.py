"""What the problems on small procedural scenes share: sizes, and scores of lanes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import Scores

PyTree = Any
Measure = Callable[[PyTree, splits.Data], dict[str, jax.Array]]
"""Scores of one model, from the data of its seed."""

LANES = 5


class Size(NamedTuple):
    """How large images are, how many there are, and how long they are trained on."""

    height: int
    width: int
    pool: int  # scenes of a domain that the seeds draw theirs from
    train: int
    validation: int
    test: int
    steps: int
    batch: int
    features: int
    blocks: int


def rows(size: Size) -> splits.Rows:
    """Rows of the pool, others for every seed."""
    return splits.random(size.pool, size.validation, size.test, size.train)


def scores(
    measure: Measure, data: splits.Data, models: PyTree, seeds: jax.Array
) -> Scores:
    """Scores of models [lanes], each on the scenes of its seed."""
    found = _of_lanes(measure, data, models, jnp.asarray(seeds))
    return {name: np.asarray(x) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _of_lanes(
    measure: Measure, data: splits.Data, models: PyTree, seeds: jax.Array
) -> dict[str, jax.Array]:
    def of_one(lane: tuple[PyTree, jax.Array]) -> dict[str, jax.Array]:
        model, seed = lane
        return measure(model, splits.of_seed(data, seed))

    return jax.lax.map(of_one, (models, seeds))
