"""Two losses of two parameters, after Liu et al. 2021, and their Pareto front."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALES = (0.1, 1.0)
CLOSE = 0.5  # a run has reached the front if it ends this near to it


# The problem.


def losses_of(x: Array) -> Array:
    """Both losses at one point x (2,): a smooth pair of walls above, bowls below."""

    def wall(a: Array) -> Array:
        return jnp.log(jnp.maximum(jnp.abs(a), 5e-6)) + 6

    def bowl(centre: float) -> Array:
        return ((-x[0] + centre) ** 2 + 0.1 * (-x[1] - 8) ** 2) / 10 - 20

    def positive(a: Array) -> Array:
        # Not maximum: its derivative at the tie, where a run starts, is one half.
        return jnp.where(a >= 0, a, 0.0)

    above, below = positive(jnp.tanh(x[1] / 2)), positive(jnp.tanh(-x[1] / 2))
    first = wall(0.5 * (-x[0] - 7) - jnp.tanh(-x[1]))
    second = wall(0.5 * (-x[0] + 3) + jnp.tanh(-x[1]) + 2)
    unscaled = jnp.stack(
        [first * above + bowl(7.0) * below, second * above + bowl(-7.0) * below]
    )
    return jnp.array(SCALES, x.dtype) * unscaled


def front(x1: np.ndarray) -> np.ndarray:
    """The x2 of the Pareto front, which spans x1 from -7 to 7.

    There the gradients are opposite. That fixes the ratio of their lengths from the
    first coordinate, and leaves ``(x2 + 8) sinh(-x2) = 50 q(x1, x2)`` from the second,
    with q the bowls' mean by that ratio.
    """
    x2 = np.full_like(x1, -8.4)
    for _ in range(100):
        bowls = (49 - x1**2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        x2 = 0.5 * x2 + 0.5 * (50 * bowls / np.sinh(-x2) - 8)
    return x2


def start_of(point: tuple[float, float]) -> str:
    return f"start={point[0]:g},{point[1]:g}"
