"""GradNorm: gradient norms balanced by the rates of training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_all_positive, check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each


@serializable_state
class GradNormState(NamedTuple):
    """What :func:`gradnorm` has learned."""

    task_weights: jax.Array  # (K,) absolute values sum to K
    initial_losses: jax.Array  # (K,) of the first update with that loss
    has_initial: jax.Array  # bool (K,)
    opt_state: optax.OptState  # with counters for each loss


def gradnorm(
    *,
    preference: PyTree = None,
    alpha: float = 1.5,
    optimizer: optax.GradientTransformation | None = None,
) -> LossWeighting:
    r"""Gradient norms that are larger for the losses that train more slowly.

    .. math::
      \min_w \sum_i \left| G_i - \mathrm{sg}(\bar G\, p_i r_i^\alpha) \right|, \qquad
      G_i = |w_i|\, n_i, \qquad
      r_i = \frac{L_i / L_i(0)}{\frac1K \sum_j L_j / L_j(0)},

    where :math:`n_i` is the gradient norm of loss i, :math:`\bar G` the mean of
    :math:`G`, sg stops the gradient, and :math:`L_i(0)` is the loss at the first
    update. The weights take one step at every update and are then rescaled to sum to K.

    Args:
      preference: p, the ratios of the norms at equal rates: one positive number per
        loss, in a tree like the losses or in their order. Brought to mean 1; equal, as
        in the paper, if none is given.
      alpha: How strongly slower losses are pulled along; 0 gives all norms the
        ratios p. 1.5 and 0.12 in the paper.
      optimizer: What steps on the weights; ``optax.adam(0.025, eps=1e-16)`` if none is
        given, whose eps is small enough for gradient norms from 1e-17 to 1e18.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses, which needs the gradient
      norms; its weights start at 1, are not negative (one that would be changes its
      sign) and sum to K. Those of an update are the ones before its step.

    Raises:
      ValueError: ``preference`` is not positive, or ``alpha`` negative. In ``init``:
        ``preference`` does not fit the losses. In ``update`` outside ``jit``: a loss is
        not positive. Inside ``jit`` such a batch leaves the weights as they were.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"camera": 1.0, "depth": 1.0}
      >>> weighting = yoto.weightings.gradnorm()
      >>> state = weighting.init(losses)
      >>> update = jax.jit(weighting.update)
      >>> for _ in range(300):
      ...     norms = jnp.array([3.0, 1.0])
      ...     weights, state = update(losses, state, norms=norms)
      >>> print({name: round(float(w), 1) for name, w in weights.items()})
      {'camera': 0.5, 'depth': 1.5}

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks <https://arxiv.org/abs/1711.02257>`_, 2018, Eqs. 1 and 2.

    .. warning::
      The paper takes the norms over the last shared layer; here they are over the
      parameters, or the representation, that the gradients are taken of.
    """
    check_all_positive(preference=preference)
    check_not_negative(alpha=alpha)
    tx = chosen(optimizer, optax.adam(0.025, eps=1e-16))

    def init(spec: LossSpec) -> GradNormState:
        spec.ratios(preference)  # It has to fit the losses.
        weights = spec.full(1.0)
        return GradNormState(
            task_weights=weights,
            initial_losses=spec.full(1.0),
            has_initial=jnp.zeros((spec.size,), jnp.bool_),
            opt_state=init_each(tx, weights),
        )

    def update(
        losses: jax.Array, inner: GradNormState, spec: LossSpec, *, norms: jax.Array
    ) -> tuple[jax.Array, GradNormState]:
        w, scale = inner.task_weights, 1.0
        if spec.present is not None:
            # Those present weigh their number together, and keep their part of K.
            scale = spec.sum(jnp.abs(w)) / spec.count
            scale = jnp.where(scale > 0, scale, 1.0)
            w = w / scale
        initial = jnp.where(inner.has_initial, inner.initial_losses, losses)
        rates = jnp.minimum(losses / initial, LARGEST_RATIO / spec.size)
        rates /= spec.mean(rates)
        weighted = jnp.abs(w) * norms
        target = spec.mean(weighted) * rates**alpha * spec.ratios(preference)
        # The norms do not depend on w, so that no second derivative is needed. At 0 the
        # slope of |w| is taken as 1: a weight must be able to leave 0.
        slope = jnp.sign(weighted - target) * norms * jnp.where(w < 0, -1.0, 1.0)
        new, state = descend(tx, slope, inner.opt_state, w, spec.present)
        total = spec.sum(jnp.abs(new))
        new = jnp.where(total > 0, spec.count * new / total, 1.0) * scale
        return jnp.abs(w), GradNormState(
            task_weights=new,
            initial_losses=initial,
            has_initial=jnp.ones_like(inner.has_initial),
            opt_state=state,
        )

    return make_weighting(init, update, needs=("losses", "norms"), positive=True)
