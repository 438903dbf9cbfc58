"""What problems with physics-informed networks share.

A network is the unknown u of an equation in two variables. Its losses are means of
squared residuals at points drawn anew in each step; its score is the error against a
reference that it is never trained on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import yoto_jax as yoto
from benchmarks.harness.searches import Ratios
from benchmarks.harness.training import Losses, Measured, PyTree, Task
from benchmarks.tasks.frontier.problem import (
    LOG_ERROR,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
    Scores,
)
from benchmarks.tasks.pinn import task as pinn

Function = Callable[[jax.Array, jax.Array], jax.Array]
"""u(t, x) or u(x, y), point by point."""

KERNEL = "ntk_diagonal"
FIXED_KEY = 2025
"""Of the points that the training score is measured at."""


class Known(NamedTuple):
    """Points, and the solution there."""

    first: jax.Array  # [n]
    second: jax.Array  # [n]
    u: jax.Array  # [n]


class Drawn(NamedTuple):
    """Points of one step; those where the solution is known are for steering alone."""

    batch: Any
    known: Known | None = None


class Size(NamedTuple):
    """What a preset decides.

    Attributes:
      steps: Training steps.
      width: Of hidden layers.
      depth: Number of hidden layers.
      inside: Cells along the two variables, with one point of the equation in each.
      edge: Points of every condition.
      held_out: Points where the solution is known, of a batch that steers.
      lanes: Runs side by side.
    """

    steps: int
    width: int
    depth: int
    inside: tuple[int, int]
    edge: int
    held_out: int
    lanes: int


QUICK = Size(10, 8, 2, (4, 8), 8, 16, 4)


class Equation(NamedTuple):
    """What makes a problem.

    Attributes:
      name: Of the problem.
      names: Of the losses, the primary one first.
      draw: ``draw(key) -> batch``.
      losses: ``losses(model, batch) -> losses``.
      test: Points that score a model.
      validation: Points that anything may choose by.
      kernel: ``kernel(model, batch)``, the diagonal of the tangent kernel of each
        residual, averaged over its points.
    """

    name: str
    names: tuple[str, ...]
    draw: Callable[[jax.Array], Any]
    losses: Callable[[PyTree, Any], Losses]
    test: Known
    validation: Known
    kernel: Callable[[PyTree, Any], Losses]


def problem(
    equation: Equation,
    size: Size,
    learning_rate: float,
    bounds: tuple[tuple[float, float], ...],
    published: Ratios | None = None,
) -> Problem:
    """An equation, a network for it and how it is judged.

    Args:
      equation: With its conditions.
      size: Of network and training.
      learning_rate: At its peak.
      bounds: Of searches, for every loss but the first.
      published: Weights from the literature.
    """
    scale = jnp.mean(equation.validation.u**2)

    def losses(model: PyTree, z: None, drawn: Drawn) -> Losses:
        return equation.losses(model, drawn.batch)

    def downstream(model: PyTree, z: None, drawn: Drawn) -> jax.Array:
        """The squared relative error, in expectation over batches."""
        known = drawn.known
        difference = pinn.predict(model, known.first, known.second) - known.u
        return jnp.mean(difference**2) / scale

    def draw_held_out(validation: Known, key: jax.Array) -> Drawn:
        chosen = jax.random.randint(key, (size.held_out,), 0, len(validation.u))
        known = jax.tree.map(lambda x: x[chosen], validation)
        return Drawn(equation.draw(key), known)

    measure = jax.jit(lambda models: jax.lax.map(score(equation), models))

    def scores(models: PyTree, seeds: jax.Array | None = None) -> Scores:
        return measure(models)

    def test(models: PyTree) -> Measured:
        return {("score", None): np.asarray(scores(models)[TEST])}

    task = Task(
        name=equation.name,
        settings={**size._asdict(), "learning_rate": learning_rate},
        primary=equation.names[0],
        auxiliary=equation.names[1:],
        data=equation.validation,
        init=lambda key: pinn.init_model(key, size.width, size.depth),
        draw=lambda validation, key: Drawn(equation.draw(key)),
        draw_held_out=draw_held_out,
        encode=lambda model, drawn: None,
        losses=losses,
        downstream=downstream,
        validate=lambda models: np.asarray(scores(models)[VALIDATION]),
        test=test,
        steps=size.steps,
        learning_rate=learning_rate,
        weight_decay=0.0,
        lanes=size.lanes,
        statistics={KERNEL: lambda model, drawn: equation.kernel(model, drawn.batch)},
    )
    return Problem(
        task=task,
        scores=scores,
        unit=LOG_ERROR,
        margin=5.0,
        validated_on="the solution at points of their own, which no test has",
        bounds=bounds,
        published=published,
    )


# Networks as functions, and their derivatives.


def function(model: PyTree) -> Function:
    return lambda first, second: pinn.predict(model, first, second)


def derivatives(
    f: Callable[[jax.Array], jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f, f' and f'' of a function that works point by point, forward over forward."""
    one = jnp.ones_like(x)

    def once(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(f, (x,), (one,))

    (value, slope), (_, curvature) = jax.jvp(once, (x,), (one,))
    return value, slope, curvature


def kernel_diagonal(
    residual: Callable[[Function, Any], jax.Array], model: PyTree, points: Any
) -> jax.Array:
    """Of the tangent kernel of one residual, averaged over the points."""
    at_one = lambda model, point: residual(function(model), point)
    return yoto.weightings.ntk_diagonal(at_one, model, points)


def slope(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The derivative f' of a function that works point by point."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


# Points.


def known(first: np.ndarray, second: np.ndarray, u: np.ndarray) -> Known:
    """Points of any shape in a row, in float32."""
    rows = (jnp.asarray(np.ravel(x), jnp.float32) for x in (first, second, u))
    return Known(*rows)


def cells(key: jax.Array, counts: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """A point anywhere in each cell of the unit square: [n] along either side.

    That covers the square more evenly than independent points, and losses vary less.
    """
    offset = jax.random.uniform(key, (2, *counts))
    first = (jnp.arange(counts[0])[:, None] + offset[0]) / counts[0]
    second = (jnp.arange(counts[1])[None, :] + offset[1]) / counts[1]
    return first.ravel(), second.ravel()


def spread(key: jax.Array, count: int) -> jax.Array:
    """A point anywhere in each cell of the unit interval: [count]."""
    return (jnp.arange(count) + jax.random.uniform(key, (count,))) / count


# Scores.


def score(equation: Equation) -> Callable[[PyTree], dict[str, jax.Array]]:
    """Scores of one model: the training score is of the losses' sum."""
    batch = equation.draw(jax.random.key(FIXED_KEY))

    def of_model(model: PyTree) -> dict[str, jax.Array]:
        u = function(model)
        total = sum(equation.losses(model, batch).values())
        return {
            TRAINING: -50.0 * jnp.log(total),
            VALIDATION: log_error(u, equation.validation),
            TEST: log_error(u, equation.test),
        }

    return of_model


def log_error(u: Function, known: Known) -> jax.Array:
    """-100 times the logarithm of the relative L2 error over the points."""
    difference = u(known.first, known.second) - known.u
    error = jnp.linalg.norm(difference) / jnp.linalg.norm(known.u)
    return -100.0 * jnp.log(error)
