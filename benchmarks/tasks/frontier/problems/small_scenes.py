"""What the problems on small procedural scenes share: sizes, tasks and scores."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness.training import Task
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


def task(
    size: Size,
    data: splits.Data,
    model: Any,
    draw: Callable[[int, splits.Data, jax.Array, jax.Array], Any],
    trained: Callable[[splits.Data], jax.Array],
    example: jax.Array,
    **own: Any,
) -> Task:
    """The task of a model, on scenes that its seeds draw from a pool.

    Args:
      size: Of scenes and training.
      data: The pool, and the rows of all seeds.
      model: With ``init``, ``encode``, ``losses`` and ``downstream``.
      draw: ``draw(n, data, rows, key) -> batch`` of scenes in these rows.
      trained: The rows to train on, from the data of a seed.
      example: Images for ``model.init``.
      **own: What else a :class:`Task` has.
    """
    return Task(
        settings=size._asdict(),
        data=data,
        init=lambda key: model.init(key, example),
        draw=lambda data, key: draw(size.batch, data, trained(data), key),
        draw_held_out=lambda data, key: draw(
            size.batch, data, data.rows.validation, key
        ),
        encode=model.encode,
        losses=model.losses,
        downstream=model.downstream,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=size.steps,
        lanes=LANES,
        of_seed=splits.of_seed,
        **own,
    )


def scores(
    measure: Measure, data: splits.Data, models: PyTree, seeds: jax.Array
) -> Scores:
    """Scores of models [lanes], each on the scenes of its seed."""
    return _of_lanes(measure, data, models, jnp.asarray(seeds))


@functools.partial(jax.jit, static_argnums=0)
def _of_lanes(
    measure: Measure, data: splits.Data, models: PyTree, seeds: jax.Array
) -> dict[str, jax.Array]:
    def of_one(lane: tuple[PyTree, jax.Array]) -> dict[str, jax.Array]:
        model, seed = lane
        return measure(model, splits.of_seed(data, seed))

    return jax.lax.map(of_one, (models, seeds))
