"""The Allen-Cahn equation, in a milder form than physics-informed networks fail on.

    u_t - D u_xx + 5 u^3 - 5 u = 0  for x in [-1, 1] and t in [0, T],
    u(0, x) = x^2 cos(pi x),  u and u_x periodic in x.

The hard case of the literature has D = 1e-4 and T = 1. This one has D = 1e-3 and
T = 0.5, because a network of this size does not learn the hard one: after 6000 steps
its error was 73 per cent with the best constant weights that were tried.

Fronts form between regions where u is close to 1 or to -1. Any function that is 0, 1 or
-1 everywhere solves the equation: only the initial condition tells these apart from the
solution, and a weight of 100 on it is common for the hard case. Three losses, means of
squared residuals: of the equation, of the initial condition, and of periodicity, of u
and of u_x together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import Losses, PyTree
from benchmarks.tasks.frontier import physics
from benchmarks.tasks.frontier.problem import Problem
from benchmarks.tasks.pinn import task as pinn
from benchmarks.tasks.pinn.task import Points

NAMES = ("pde", "initial", "boundary")
DIFFUSION = 1e-3
END = 0.5
SIZES = {
    "quick": physics.QUICK,
    "cpu": physics.Size(15_000, 32, 4, (12, 24), 48, 256, 4),
}
LEARNING_RATE = 1.5e-2
BOUNDS = ((1e-1, 1e4), (1e-3, 1e2))
PUBLISHED = (100.0, 1.0)

MODES = 4096  # of the reference
TIME_STEPS = 400


class Batch(NamedTuple):
    """Points of one step."""

    inside: Points
    initial: Points
    times: jax.Array  # [n], of periodicity


def make(preset: str) -> Problem:
    size = SIZES[preset]
    test, validation = references()
    equation = physics.Equation(
        name="allen_cahn",
        names=NAMES,
        draw=lambda key: draw(key, size.inside, size.edge),
        losses=lambda model, batch: losses(physics.function(model), batch),
        test=test,
        validation=validation,
        kernel=kernel,
    )
    return physics.problem(equation, size, LEARNING_RATE, BOUNDS, PUBLISHED)


def draw(key: jax.Array, inside: tuple[int, int], edge: int) -> Batch:
    keys = jax.random.split(key, 3)
    t, x = physics.cells(keys[0], inside)
    start = physics.spread(keys[1], edge)
    times = physics.spread(keys[2], edge)
    return Batch(
        Points(END * t, 2.0 * x - 1.0),
        Points(jnp.zeros(edge), 2.0 * start - 1.0),
        END * times,
    )


# Losses.


def losses(u: physics.Function, batch: Batch) -> Losses:
    """Mean squared residuals."""
    of_value, of_slope = boundary_residuals(u, batch.times)
    return {
        "pde": jnp.mean(pde_residual(u, batch.inside) ** 2),
        "initial": jnp.mean(initial_residual(u, batch.initial) ** 2),
        "boundary": jnp.mean(of_value**2 + of_slope**2),
    }


def pde_residual(u: physics.Function, at: Points) -> jax.Array:
    value, _, u_xx = physics.derivatives(lambda x: u(at.t, x), at.x)
    u_t = physics.slope(lambda t: u(t, at.x), at.t)
    return u_t - DIFFUSION * u_xx + 5.0 * value**3 - 5.0 * value


def initial_residual(u: physics.Function, at: Points) -> jax.Array:
    return u(at.t, at.x) - at.x**2 * jnp.cos(jnp.pi * at.x)


def boundary_residuals(
    u: physics.Function, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What u and u_x at the two ends differ by."""
    one = jnp.ones_like(t)
    along_x = lambda x: jax.jvp(lambda x: u(t, x), (x,), (one,))
    (right, right_slope), (left, left_slope) = along_x(one), along_x(-one)
    return right - left, right_slope - left_slope


def kernel(model: PyTree, batch: Batch) -> Losses:
    """The diagonal of the tangent kernel of each loss, of two residuals in one."""
    diagonal = physics.kernel_diagonal
    of_value, of_slope = (
        diagonal(lambda u, t, k=k: boundary_residuals(u, t)[k], model, batch.times)
        for k in range(2)
    )
    return {
        "pde": diagonal(pde_residual, model, batch.inside),
        "initial": diagonal(initial_residual, model, batch.initial),
        "boundary": of_value + of_slope,
    }


# The reference.


def solve(
    modes: int = MODES, steps: int = TIME_STEPS, saved: int = pinn.SAVED
) -> np.ndarray:
    """Coefficients c of the solution, u(t, x) = sum_k c_k(t) cos(pi k x), in float64.

    The solution is even in x, as its initial values are. Pseudo-spectral in x;
    Runge-Kutta of order 4 in t, with the diffusion integrated exactly.

    Returns:
      [saved + 1, modes // 2 + 1], at times from 0 to ``END``.
    """
    k = np.pi * np.arange(modes // 2 + 1)
    dt = END / steps
    half = np.exp(-DIFFUSION * k**2 * dt / 2)

    def react(v: np.ndarray) -> np.ndarray:
        u = np.fft.irfft(v)
        return dt * np.fft.rfft(5.0 * u - 5.0 * u**3)

    x = (2.0 * np.arange(modes) / modes + 1.0) % 2.0 - 1.0  # from 0 on, periodic
    v = np.fft.rfft(x**2 * np.cos(np.pi * x))
    kept = pinn.integrate(v, react, half, steps, saved)
    coefficients = 2.0 / modes * np.real(kept)
    coefficients[:, [0, -1]] /= 2.0
    return coefficients


def evaluate(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The solution at the times of ``coefficients`` [times, modes]: [times, len(x)]."""
    k = np.pi * np.arange(coefficients.shape[1])
    return coefficients @ np.cos(k[:, None] * x)


def references() -> tuple[physics.Known, physics.Known]:
    """Test and validation points, which have no time in common."""
    test, validation = pinn.reference_points(solve(), evaluate, END)
    return physics.known(*test), physics.known(*validation)
