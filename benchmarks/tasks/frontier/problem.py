"""A task on which ways of weighting losses are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.harness.searches import Ratios
from benchmarks.harness.training import PyTree, Task

Scores = dict[str, jax.Array]
"""Scores [lanes] by name; more is better, in the unit of the problem."""

TRAINING, VALIDATION, TEST = "training", "validation", "test"
PERCENT = "accuracy in %"
MEAN_IOU = "mean IoU in %"
DELTA1 = "delta1 in %"
LOG_ERROR = "-100 log(relative error)"
"""Five per cent of an error are five units, about."""

SEEDS = 10
"""How many seeds have data of their own."""


class Problem(NamedTuple):
    """A task and how it is judged.

    Attributes:
      task: What is trained. A seed decides its initialisation, batches and data.
      scores: ``scores(models, seeds) -> scores`` of models [lanes] that were trained
        with these seeds: ``TRAINING`` (in the training domain, for seeing whether it
        has levelled off), ``VALIDATION`` (the one number that anything may choose by)
        and ``TEST`` (the one number that is reported); others may be added. It can
        be compiled.
      unit: ``PERCENT``, ``MEAN_IOU``, ``DELTA1`` or ``LOG_ERROR``.
      margin: What counts as no worse, in that unit.
      validated_on: Where the validation data come from, in words.
      bounds: The box of ratios to the primary loss that searches look in.
      published: Ratios from the literature, if there are any.
      modulated: Which parameters depend on the weights in a conditional model (default:
        all), as in :func:`yoto_jax.conditional.init_modulation`.
    """

    task: Task
    scores: Callable[[PyTree, jax.Array], Scores]
    unit: str
    margin: float
    validated_on: str
    bounds: tuple[tuple[float, float], ...]
    published: Ratios | None = None
    modulated: Callable[[Any, jax.Array], bool] | None = None
