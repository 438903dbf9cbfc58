"""Burgers' equation as a physics-informed network meets it.

    u_t + u u_x = nu u_xx  for x in [-1, 1] and t in [0, 1],  nu = 0.01 / pi,
    u(0, x) = -sin(pi x),  u(t, -1) = u(t, 1) = 0.

A wave that steepens into a front of width 0.01 at x = 0 from t = 0.4 on. Three losses,
means of squared residuals: of the equation inside, of the initial condition, and of the
boundary condition. The reference comes from a spectral method and is used to measure
errors alone: the network never sees it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import yoto_jax as yoto

PyTree = Any
Key = jax.Array

LOSSES = ("pde", "initial", "boundary")
VISCOSITY = 0.01 / np.pi

MODES = 2048  # of the reference, of which a third is kept free of aliases
TIME_STEPS = 4000
SAVED = 200  # every other of these times is for the test, the ones between validate
TEST_X = 257
VALIDATION_POINTS = 5000

_VALIDATION_SEED = 2025


class Points(NamedTuple):
    """Where the solution is asked for, and its value where that is known."""

    t: jax.Array  # [n], or a scalar
    x: jax.Array  # [n], or a scalar
    u: jax.Array | None = None  # [n]


class Batch(NamedTuple):
    """Points of one training step."""

    inside: Points
    initial: Points
    boundary: Points


# The reference.


def solve(
    modes: int = MODES, steps: int = TIME_STEPS, saved: int = SAVED
) -> np.ndarray:
    """Coefficients b of the solution, u(t, x) = sum_k b_k(t) sin(pi k x), in float64.

    The initial wave continues to an odd, periodic one, whose solution vanishes at the
    ends for all times. Pseudo-spectral in x with the 2/3 rule; Runge-Kutta of order 4
    in t, with the diffusion integrated exactly.

    Returns:
      [saved + 1, modes // 2 + 1], at times from 0 to 1.
    """
    k = np.pi * np.arange(modes // 2 + 1)
    dt = 1.0 / steps
    half = np.exp(-VISCOSITY * k**2 * dt / 2)
    slope = np.where(np.arange(len(k)) < modes // 3, -0.5j * k * dt, 0.0)

    def advect(v: np.ndarray) -> np.ndarray:
        return slope * np.fft.rfft(np.fft.irfft(v) ** 2)

    v = np.fft.rfft(-np.sin(2 * np.pi * np.arange(modes) / modes))
    return -2.0 / modes * np.imag(integrate(v, advect, half, steps, saved))


def integrate(
    v: np.ndarray,
    move: Callable[[np.ndarray], np.ndarray],
    half: np.ndarray,
    steps: int,
    saved: int,
) -> list[np.ndarray]:
    """Runge-Kutta of order 4 with a linear part that is integrated exactly.

    Args:
      v: Coefficients at the start.
      move: The other part's change of them in one step.
      half: The factor of the linear part over half a step.
      steps: How many.
      saved: How many of the results are kept, besides the start.
    """
    kept = [v]
    for step in range(1, steps + 1):
        a = move(v)
        b = move(half * (v + a / 2))
        c = move(half * v + b / 2)
        d = move(half * (half * v + c))
        v = half * (half * (v + a / 6) + (b + c) / 3) + d / 6
        if step % (steps // saved) == 0:
            kept.append(v)
    return kept


def evaluate(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The solution at the times of ``coefficients`` [times, modes]: [times, len(x)]."""
    k = np.pi * np.arange(coefficients.shape[1])
    return coefficients @ np.sin(k[:, None] * x)


def references() -> tuple[Points, Points]:
    """Test and validation points, which have no time in common."""
    first, second = (
        Points(*(jnp.asarray(part.ravel(), jnp.float32) for part in points))
        for points in reference_points(solve(), evaluate)
    )
    return first, second


def reference_points(
    coefficients: np.ndarray,
    evaluate: Callable[[np.ndarray, np.ndarray], np.ndarray],
    end: float = 1.0,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Points t, x and u there, for the test and for validation.

    The test is a grid of every other saved time and ``TEST_X`` places; the validation
    points lie at random at the times between.
    """
    times = np.linspace(0.0, end, SAVED + 1)
    x = np.linspace(-1.0, 1.0, TEST_X)
    t, x_test = np.meshgrid(times[::2], x, indexing="ij")
    random = np.random.default_rng(_VALIDATION_SEED)
    places = random.uniform(-1.0, 1.0, (SAVED // 2, VALIDATION_POINTS // (SAVED // 2)))
    rows = zip(coefficients[1::2], places, strict=True)
    return (
        (t, x_test, evaluate(coefficients[::2], x)),
        (
            np.repeat(times[1::2, None], places.shape[1], axis=1),
            places,
            np.stack([evaluate(row[None], at)[0] for row, at in rows]),
        ),
    )


# Points, network, losses.


def draw_batch(key: Key, inside: tuple[int, int], edge: int) -> Batch:
    """New points for one step.

    Args:
      key: For all of them.
      inside: Cells in t and x, with one point each, anywhere in its cell: that covers
        the domain more evenly than independent points, and the loss varies less.
      edge: Number of initial points, likewise spread over x, and of boundary points,
        half of them at either end.
    """
    keys = jax.random.split(key, 4)
    t = (jnp.arange(inside[0])[:, None] + jax.random.uniform(keys[0], inside)).ravel()
    x = (jnp.arange(inside[1]) + jax.random.uniform(keys[1], inside)).ravel()
    start = (jnp.arange(edge) + jax.random.uniform(keys[2], (edge,))) / edge
    times = (jnp.arange(edge) + jax.random.uniform(keys[3], (edge,))) / edge
    ends = jnp.where(jnp.arange(edge) % 2, 1.0, -1.0)
    return Batch(
        Points(t / inside[0], 2.0 * x / inside[1] - 1.0),
        Points(jnp.zeros(edge), 2.0 * start - 1.0),
        Points(times, ends),
    )


def init_model(key: Key, width: int, depth: int) -> PyTree:
    """A network from (t, x) to u with ``depth`` hidden layers."""
    sizes = (2, *[width] * depth, 1)
    glorot = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": glorot(k, (m, n)), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def predict(model: PyTree, t: jax.Array, x: jax.Array) -> jax.Array:
    """The network's u, of the shape of ``t`` and ``x``."""
    h = jnp.stack([t, x], axis=-1)
    for layer in model[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return (h @ model[-1]["w"] + model[-1]["b"])[..., 0]


def residuals(model: PyTree, at: Batch) -> dict[str, jax.Array]:
    """What is left of the equation and of the conditions, at each point."""
    return {
        "pde": pde_residual(model, at.inside),
        "initial": initial_residual(model, at.initial),
        "boundary": boundary_residual(model, at.boundary),
    }


def pde_residual(model: PyTree, at: Points) -> jax.Array:
    """Derivatives forward over forward: points do not mix, so a jvp with ones is u_x.

    On a CPU as fast as ``jax.experimental.jet``, and faster than to carry
    (u, u_t, u_x, u_xx) through the layers by hand.
    """
    one = jnp.ones_like(at.x)

    def along_x(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda x: predict(model, at.t, x), (x,), (one,))

    (u, u_x), (_, u_xx) = jax.jvp(along_x, (at.x,), (one,))
    _, u_t = jax.jvp(lambda t: predict(model, t, at.x), (at.t,), (one,))
    return u_t + u * u_x - VISCOSITY * u_xx


def initial_residual(model: PyTree, at: Points) -> jax.Array:
    return predict(model, at.t, at.x) + jnp.sin(jnp.pi * at.x)


def boundary_residual(model: PyTree, at: Points) -> jax.Array:
    return predict(model, at.t, at.x)


def losses(model: PyTree, at: Batch) -> dict[str, jax.Array]:
    """Mean squared residuals."""
    return {name: jnp.mean(r**2) for name, r in residuals(model, at).items()}


def ntk_diagonal(model: PyTree, at: Batch) -> dict[str, jax.Array]:
    """Diagonal of the tangent kernel of each residual, averaged over its points."""
    diagonal = yoto.weightings.ntk_diagonal
    return {
        "pde": diagonal(pde_residual, model, at.inside),
        "initial": diagonal(initial_residual, model, at.initial),
        "boundary": diagonal(boundary_residual, model, at.boundary),
    }


def relative_error(model: PyTree, points: Points) -> jax.Array:
    """Relative L2 error over the points."""
    difference = predict(model, points.t, points.x) - points.u
    return jnp.linalg.norm(difference) / jnp.linalg.norm(points.u)
