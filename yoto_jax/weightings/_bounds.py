"""Bounds on what weightings learn, and weights for losses of which little is known."""

import dataclasses

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec

LARGEST_RATIO = 1e30
"""Ratios of losses stay below this: a softmax of an infinite one would be NaN."""

SMALLEST_LOSS = 1e-12
"""Added to the denominator of such a ratio: losses of 0 leave it finite."""

LOG_LIMIT = 20.0
"""Learned log-weights stay within plus and minus this: e**20 is 5e8."""


def equal_if_unknown(logits: jax.Array, known: jax.Array, spec: LossSpec) -> jax.Array:
    """A softmax over losses of which enough is known, times their number; 1 for others.

    The weights of those present sum to their number.
    """
    known = spec.of_present(known, False)
    among = dataclasses.replace(spec, present=known)
    return jnp.where(known, among.count * among.softmax(logits), 1.0)
