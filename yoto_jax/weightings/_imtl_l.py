"""Impartial multi-task learning, the half of it that looks at losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LOG_LIMIT
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each


@serializable_state
class ImtlLState(NamedTuple):
    """What :func:`imtl_l` has learned."""

    log_scales: jax.Array  # (K,)
    opt_state: optax.OptState  # with counters for each loss


def imtl_l(*, optimizer: optax.GradientTransformation | None = None) -> LossWeighting:
    r"""Learned scales that bring every loss to the same size (IMTL-L).

    .. math::
      \min_{\theta, s} \sum_i \left[ e^{s_i} L_i(\theta) - s_i \right],
      \qquad w_i = e^{s_i}.

    Model and :math:`s` step on the same objective at the same time. For fixed losses
    :math:`s` settles where every :math:`w_i L_i` is 1. This is twice the objective of
    :func:`yoto_jax.weightings.uncertainty` for regressions, with the sign of :math:`s`
    changed: twice the weights, and the same path under gradient descent with half the
    learning rate.

    Args:
      optimizer: What steps on the log-scales; ``optax.adam(0.025)`` if none is given.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses. The weights start at 1,
      have the unit of one over the loss and no fixed sum; they lie between
      :math:`e^{-20}` and :math:`e^{20}`.

    Raises:
      ValueError: In ``update`` outside ``jit``: a loss is not positive. Inside ``jit``
        such a batch leaves the weights as they were.

    Examples:
      >>> import jax
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.imtl_l()
      >>> state = weighting.init(losses)
      >>> update = jax.jit(weighting.update)
      >>> for _ in range(300):
      ...     weights, state = update(losses, state)
      >>> print({name: round(float(w), 2) for name, w in weights.items()})
      {'camera': 0.25, 'depth': 2.0}

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021.

    .. warning::
      The log-scales are clipped to [-20, 20] after every step. In the paper they are
      not, and the weight of a loss that goes to 0 grows without bound.
    """
    tx = chosen(optimizer, optax.adam(0.025))

    def init(spec: LossSpec) -> ImtlLState:
        log_scales = spec.full(0.0)
        return ImtlLState(log_scales, init_each(tx, log_scales))

    def update(
        losses: jax.Array, inner: ImtlLState, spec: LossSpec
    ) -> tuple[jax.Array, ImtlLState]:
        weights = jnp.exp(inner.log_scales)
        log_scales, state = descend(
            tx,
            weights * losses - 1.0,
            inner.opt_state,
            inner.log_scales,
            spec.present,
        )
        log_scales = jnp.clip(log_scales, -LOG_LIMIT, LOG_LIMIT)
        return weights, ImtlLState(log_scales, state)

    return make_weighting(init, update, positive=True)
