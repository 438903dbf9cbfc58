"""Helmholtz' equation, whose solution waves more along one side than the other.

    u_xx + u_yy + k^2 u = q(x, y)  for x and y in [-1, 1],  u = 0 on the edges,

with k = 1 and q such that u = sin(pi x) sin(4 pi y), as in Wang, Teng and Perdikaris,
"Understanding and mitigating gradient flow pathologies in physics-informed neural
networks", 2021. Three losses, means of squared residuals: of the equation, and of the
condition on the edges where x = -1 or 1 and on those where y = -1 or 1, which that
paper has in one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import Losses, PyTree
from benchmarks.tasks.frontier import physics
from benchmarks.tasks.frontier.problem import Problem

NAMES = ("pde", "x_edges", "y_edges")
WAVES_X, WAVES_Y = 1, 4
WAVE_NUMBER = 1.0
SIZES = {
    "quick": physics.QUICK,
    "cpu": physics.Size(15_000, 32, 3, (12, 24), 48, 256, 4),
}
LEARNING_RATE = 1.5e-2
BOUNDS = ((1e-1, 1e5), (1e-1, 1e5))

TEST_SIDE = 129
VALIDATION_POINTS = 5000

_VALIDATION_SEED = 2025


class Places(NamedTuple):
    x: jax.Array  # [n]
    y: jax.Array  # [n]


class Batch(NamedTuple):
    """Points of one step."""

    inside: Places
    x_edges: Places
    y_edges: Places


def make(preset: str) -> Problem:
    size = SIZES[preset]
    test, validation = references()
    equation = physics.Equation(
        name="helmholtz",
        names=NAMES,
        draw=lambda key: draw(key, size.inside, size.edge),
        losses=lambda model, batch: losses(physics.function(model), batch),
        test=test,
        validation=validation,
        kernel=kernel,
    )
    return physics.problem(equation, size, LEARNING_RATE, BOUNDS)


def draw(key: jax.Array, inside: tuple[int, int], edge: int) -> Batch:
    """Half of the points of a pair of edges lie on either one."""
    keys = jax.random.split(key, 3)
    x, y = physics.cells(keys[0], inside)
    ends = jnp.where(jnp.arange(edge) % 2, 1.0, -1.0)
    return Batch(
        Places(2.0 * x - 1.0, 2.0 * y - 1.0),
        Places(ends, 2.0 * physics.spread(keys[1], edge) - 1.0),
        Places(2.0 * physics.spread(keys[2], edge) - 1.0, ends),
    )


# Losses.


def losses(u: physics.Function, batch: Batch) -> Losses:
    """Mean squared residuals."""
    return {
        "pde": jnp.mean(pde_residual(u, batch.inside) ** 2),
        "x_edges": jnp.mean(edge_residual(u, batch.x_edges) ** 2),
        "y_edges": jnp.mean(edge_residual(u, batch.y_edges) ** 2),
    }


def edge_residual(u: physics.Function, at: Places) -> jax.Array:
    return u(at.x, at.y)


def kernel(model: PyTree, batch: Batch) -> Losses:
    """The diagonal of the tangent kernel of each residual."""
    diagonal = physics.kernel_diagonal
    return {
        "pde": diagonal(pde_residual, model, batch.inside),
        "x_edges": diagonal(edge_residual, model, batch.x_edges),
        "y_edges": diagonal(edge_residual, model, batch.y_edges),
    }


def pde_residual(u: physics.Function, at: Places) -> jax.Array:
    value, _, u_xx = physics.derivatives(lambda x: u(x, at.y), at.x)
    _, _, u_yy = physics.derivatives(lambda y: u(at.x, y), at.y)
    return u_xx + u_yy + WAVE_NUMBER**2 * value - source(at.x, at.y)


def source(x: jax.Array, y: jax.Array) -> jax.Array:
    """The right-hand side q."""
    squares = (np.pi * WAVES_X) ** 2 + (np.pi * WAVES_Y) ** 2
    return (WAVE_NUMBER**2 - squares) * solution(x, y)


def solution(x: jax.Array, y: jax.Array) -> jax.Array:
    """The exact solution."""
    return jnp.sin(WAVES_X * jnp.pi * x) * jnp.sin(WAVES_Y * jnp.pi * y)


def references() -> tuple[physics.Known, physics.Known]:
    """Test points on a grid, validation points at random."""
    side = np.linspace(-1.0, 1.0, TEST_SIDE)
    random = np.random.default_rng(_VALIDATION_SEED)
    places = random.uniform(-1.0, 1.0, (2, VALIDATION_POINTS))
    test, validation = (
        physics.known(x, y, solution(x, y))
        for x, y in (np.meshgrid(side, side, indexing="ij"), places)
    )
    return test, validation
