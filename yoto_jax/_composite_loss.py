"""The weighted composite loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._loss_logits import LossLogits, losses_in_order, present_in_order
from yoto_jax._losses import Losses, Present
from yoto_jax._numerics import float_type, softmax, stack, sum_of_products


def composite_loss(
    losses: Losses, mu: LossLogits | Any, *, present: Present | None = None
) -> jax.Array:
    r"""Composite loss: convex combination of the losses with learned weights.

    .. math::
      L_e = \sum_i \lambda_i l_i, \quad \lambda = \mathrm{Softmax}(\mu), \qquad
      \frac{\partial L_e}{\partial l_i} = \lambda_i, \quad
      \frac{\partial L_e}{\partial \mu_i} = \lambda_i (l_i - L_e).

    Descent on it raises the weight of every loss below :math:`L_e`: weight flows to the
    smallest losses, so :func:`yoto_jax.add_hyperparameter_decay` goes with it.

    Args:
      losses: Tree of scalar losses (any floating-point dtype, non-negative in the
        paper), with the structure that ``mu`` was initialised with.
      mu: Loss logits.
      present: Tree of booleans like the losses, for batches without labels for some of
        them (see :func:`yoto_jax.masked_mean`). The others share the whole weight;
        absent losses and their logits get no gradient. Give the optimizer the same
        ``present=``, or its moments and decays still move absent logits.

    Returns:
      Scalar in float32, or in float64 if a loss or the logits are. A loss of NaN or
      infinity makes it (and its gradients) non-finite: ``optax.apply_if_finite`` then
      keeps parameters, logits and state as they were.

    Raises:
      TypeError: A loss is not a floating-point number, or ``mu`` is no ``LossLogits``.
      ValueError: The losses do not match ``mu`` (missing and unexpected ones are
        named), a loss is not a scalar, or ``mu`` has a batch axis (use ``vmap``) or
        another number of logits than the losses need.

    Examples:
      >>> import jax, yoto_jax as yoto
      >>> losses = {"depth": 2.0, "camera": 1.0}
      >>> mu = yoto.init_loss_logits(losses, primary="depth", epsilon=0.25)
      >>> print(round(float(yoto.composite_loss(losses, mu)), 2))  # 0.8 * 2 + 0.2 * 1
      1.8
      >>> gradient = jax.grad(yoto.composite_loss, argnums=1)(losses, mu)
      >>> print(round(float(gradient.learned[0]), 2))  # 0.2 * (1 - 1.8)
      -0.16

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Eqs. 2, 3, 5 and 6.
    """
    leaves = losses_in_order(losses, mu)
    if mu.learned.ndim != 1:
        raise ValueError(
            "composite_loss takes the logits of one run, of shape (K,); got shape "
            f"{mu.learned.shape}. Use vmap over losses and logits together."
        )
    dtype = float_type([mu.learned, *leaves])
    values = [jnp.asarray(leaf, dtype) for leaf in leaves]
    mask = present_in_order(present, mu)
    if mask is not None:
        values = [jnp.where(mask[k], x, 0) for k, x in enumerate(values)]
    learned = mu.learned.astype(dtype)
    return _weighted_sum(mu.primary is not None, values, learned, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_sum(
    has_primary: bool,
    values: list[jax.Array],
    learned: jax.Array,
    present: jax.Array | None,
) -> jax.Array:
    weights = softmax(learned, has_primary, present)
    return sum_of_products(weights, values)


@_weighted_sum.defjvp
def _weighted_sum_jvp(has_primary, primals, tangents):
    # Written in closed form (Eqs. 3 and 6), so that the transposed rule hands a weight
    # to every loss and one vector to mu. It is a single kernel of weights and losses,
    # and a sum of differences of losses: in that of (identity - weights) times losses
    # nothing is left of a dominant loss's slope but rounding.
    (values, learned, present), (d_values, d_learned, _) = primals, tangents
    weights = softmax(learned, has_primary, present)
    stacked = stack(values)
    above = stacked[:, None] - stacked[None, :]
    slope = weights * jnp.sum(weights[None, :] * above, axis=-1)
    total = sum_of_products(weights, values)
    d_total = sum_of_products(weights, d_values)
    return total, d_total + jnp.sum(slope[int(has_primary) :] * d_learned)
