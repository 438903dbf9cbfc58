"""What the problems on small images share: sizes and tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.harness.training import Task
from benchmarks.tasks.frontier import splits

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
    batch: int,
    data: splits.Data,
    model: Any,
    draw: Callable[[int, splits.Data, jax.Array, jax.Array], Any],
    trained: Callable[[splits.Data], jax.Array],
    example: jax.Array,
    **own: Any,
) -> Task:
    """The task of a model, on scenes that its seeds draw from a pool.

    Args:
      batch: Scenes of a batch.
      data: The pool, and the rows of all seeds.
      model: With ``init``, ``encode``, ``losses`` and ``downstream``.
      draw: ``draw(n, data, rows, key) -> batch`` of scenes in these rows.
      trained: The rows to train on, from the data of a seed.
      example: Images for ``model.init``.
      **own: What else a :class:`Task` has.
    """
    return Task(
        data=data,
        init=lambda key: model.init(key, example),
        draw=lambda data, key: draw(batch, data, trained(data), key),
        draw_held_out=lambda data, key: draw(batch, data, data.rows.validation, key),
        encode=model.encode,
        losses=model.losses,
        downstream=model.downstream,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        lanes=LANES,
        of_seed=splits.of_seed,
        **own,
    )
