"""Moving averages of weights, for methods that balance gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_decay
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting


@serializable_state
class AverageState(NamedTuple):
    """A moving average of weights."""

    average_weights: jax.Array  # (K,)


def averaged(
    target: Callable[..., jax.Array],
    decay: float,
    needs: tuple[str, ...],
    *,
    positive: bool = False,
    check: Callable[[LossSpec], Any] | None = None,
    learns: Callable[..., jax.Array] | None = None,
) -> LossWeighting:
    """A moving average, from 1, of ``target(losses, spec, **statistics)``.

    What ``check(spec)`` raises, ``init`` raises. ``learns(spec, **statistics)`` tells
    whether a batch says anything; if not, the average is held.
    """
    check_decay(decay=decay)

    def init(spec: LossSpec) -> AverageState:
        if check is not None:
            check(spec)
        return AverageState(spec.full(1.0))

    def update(
        losses: jax.Array,
        inner: AverageState,
        spec: LossSpec,
        **statistics: jax.Array,
    ) -> tuple[jax.Array, AverageState]:
        latest = target(losses, spec, **statistics)
        average = decay * inner.average_weights + (1.0 - decay) * latest
        if learns is not None:
            told = learns(spec, **statistics)
            average = jnp.where(told, average, inner.average_weights)
        return average, AverageState(average)

    return make_weighting(init, update, needs=needs, positive=positive)


def bounded_ratio(over: jax.Array, under: jax.Array, eps: float) -> jax.Array:
    """``over / under``, but at most ``1 / eps``, and 1 where both are 0."""
    under = jnp.maximum(under, eps * over)
    positive = under > 0
    return jnp.where(positive, over / jnp.where(positive, under, 1.0), 1.0)
