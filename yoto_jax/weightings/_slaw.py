"""Gradient norms guessed from how much the losses move."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_decay, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import equal_if_unknown


@serializable_state
class SlawState(NamedTuple):
    """What :func:`slaw` remembers of the losses."""

    loss_means: jax.Array  # (K,) running means
    loss_deviations: jax.Array  # (K,) running standard deviations
    num_seen: jax.Array  # int32 (K,), updates with that loss


def slaw(*, decay: float = 0.99, eps: float = 1e-5) -> LossWeighting:
    r"""The inverse of gradient norms that are guessed from the spread of the losses.

    .. math::
      w_i = \frac{K / s_i}{\sum_j 1 / s_j}, \qquad
      s_i^2 = \mathrm{E}[L_i^2] - \mathrm{E}[L_i]^2, \qquad
      s_i \ge \epsilon\, |\mathrm{E}[L_i]|,

    with exponential means E over the updates, the present one included. Steps of about
    one length move a loss by about the norm of its gradient: this balances gradients
    without a backward pass for each. All weights are 1 at the first update, and the
    weight of a loss that has come but once, or always was 0, is 1.

    Args:
      decay: Of the means, in [0, 1). They begin as plain ones.
      eps: :math:`\epsilon`, positive: bounds the weight of a loss that does not move.

    Returns:
      A :class:`yoto_jax.LossWeighting` for losses of any sign; its weights are positive
      and sum to K.

    Raises:
      ValueError: ``decay`` is not in [0, 1), or ``eps`` is not positive.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.slaw()
      >>> state = weighting.init({"depth": 1.0, "camera": 1.0})
      >>> for depth, camera in [(1.0, 20.0), (0.9, 20.3)]:
      ...     losses = {"depth": depth, "camera": camera}
      ...     weights, state = weighting.update(losses, state)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 0.5, 'depth': 1.5}

    References:
      Crawshaw and Košecká, `SLAW: Scaled Loss Approximate Weighting for Efficient
      Multi-Task Learning <https://arxiv.org/abs/2109.08218>`_, 2021; plain means first
      as in the `authors' code <https://github.com/mtcrawshaw/meta>`_.

    .. warning::
      Deviations are updated without squares, as a difference of two means of squares
      would be lost to rounding in float32. The authors bound them from below by 1e-5,
      which depends on the unit of the loss. A loss that stands still, or is 0 from
      some step on, takes nearly all the weight.
    """
    check_decay(decay=decay)
    check_positive(eps=eps)

    def init(spec: LossSpec) -> SlawState:
        return SlawState(
            loss_means=spec.full(0.0),
            loss_deviations=spec.full(0.0),
            num_seen=jnp.zeros((spec.size,), jnp.int32),
        )

    def update(
        losses: jax.Array, inner: SlawState, spec: LossSpec
    ) -> tuple[jax.Array, SlawState]:
        count = inner.num_seen + 1
        rate = jnp.maximum(1.0 / count.astype(losses.dtype), 1.0 - decay)
        step = losses - inner.loss_means
        means = inner.loss_means + rate * step
        # E[L^2] - E[L]^2 becomes (1 - rate) (it + rate step^2), with no difference.
        deviations = jnp.sqrt(1.0 - rate) * jnp.hypot(
            inner.loss_deviations, jnp.sqrt(rate) * step
        )
        spread = jnp.maximum(deviations, eps * jnp.abs(means))
        known = (count >= 2) & (spread > 0)
        logits = -jnp.log(jnp.where(known, spread, 1.0))
        weights = equal_if_unknown(logits, known, spec)
        return weights, SlawState(means, deviations, count)

    return make_weighting(init, update)
