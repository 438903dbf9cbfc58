"""Guards that were tried around the learned factor, as numbers that may be traced.

A guard decides how the logarithm of the factor moves, from the cosine of the gradient
with the update before: negative while descent goes on. One program has them all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import yoto_jax as yoto

PyTree = Any
LIMIT = 6.907755278982137  # log 1000, as in the library
NEVER = 2.0  # no cosine is larger


class Guard(NamedTuple):
    """How the logarithm of the factor moves; the defaults are the library's form.

    Attributes:
      rate: Times the cosine.
      low: Smallest logarithm of the factor.
      start: The first.
      decay: Of a running mean of the cosine.
      band: Around 0, where the mean moves nothing.
      halve: Cosine from which on the factor is halved.
      normalise: 1 to divide the mean by the root of the running mean square.
    """

    rate: Any = 0.0
    low: Any = -LIMIT
    start: Any = 0.0
    decay: Any = 0.0
    band: Any = 0.0
    halve: Any = NEVER
    normalise: Any = 0.0


class GuardedState(NamedTuple):
    """State of a guarded optimizer."""

    log_scale: jax.Array
    mean: jax.Array
    square: jax.Array
    plain: yoto.HypergradientState


def guarded(
    inner: optax.GradientTransformation, guard: Guard
) -> optax.GradientTransformationExtraArgs:
    """The inner updates, scaled by a factor that a guard moves."""
    # From a factor of 1, a rate of 1 moves the logarithm by the negative cosine.
    measuring = yoto.by_hypergradient(inner, 1.0, bound=1e9)

    def init_fn(params: PyTree) -> GuardedState:
        zero = jnp.zeros(())
        start = zero + guard.start
        return GuardedState(start, zero, zero + 1, measuring.init(params))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, GuardedState]:
        before = state.plain._replace(log_scale=jnp.zeros(()))
        made, after = measuring.update(updates, before, params, **extra_args)
        cosine = -after.log_scale
        mean = guard.decay * state.mean + (1 - guard.decay) * cosine
        square = 0.99 * state.square + 0.01 * cosine**2
        beyond = jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - guard.band, 0)
        unit = jnp.where(guard.normalise > 0, jnp.sqrt(square + 1e-4), 1)
        step = -guard.rate * beyond / unit
        step = jnp.where(cosine > guard.halve, -jnp.log(2.0), step)
        log_scale = jnp.clip(state.log_scale + step, guard.low, LIMIT)
        made = optax.tree.scale(jnp.exp(log_scale + cosine), made)
        return made, GuardedState(log_scale, mean, square, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
