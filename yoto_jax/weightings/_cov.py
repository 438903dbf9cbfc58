"""Weights by the coefficients of variation of the losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_decay
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import equal_if_unknown

_LARGEST = 1e15
"""Ratios stay below this, and their squares finite."""

_SMALLEST_SHARE = 1e-5
"""Of one update in a plain mean: what is smaller, float32 rounds away."""

_SMALLEST_VARIANCE = 1e-8
"""Added to the variances of ratios, as the authors do."""


@serializable_state
class CovState(NamedTuple):
    """What :func:`cov` remembers of the losses."""

    loss_means: jax.Array  # (K,)
    ratio_means: jax.Array  # (K,), of losses over their means before
    ratio_variances: jax.Array  # (K,)
    num_seen: jax.Array  # int32 (K,), updates with that loss


def cov(*, decay: float | None = None) -> LossWeighting:
    r"""More weight for the losses that vary more, relative to their size (CoV).

    .. math::
      w_i(t) \propto \frac{\sigma_i}{\mu_i}, \qquad
      \ell_i(s) = \frac{L_i(s)}{\bar L_i(s - 1)}, \qquad
      \sigma_i^2 = \mathrm{Var}_{s < t}\, \ell_i(s) + 10^{-8}.

    :math:`\bar L_i(s - 1)` is the mean of a loss before update s, and :math:`\mu_i` the
    mean of its ratios :math:`\ell_i`, of which the first is 1. All weights are equal at
    the first two updates, and a loss that has come less than twice has the share 1/K.

    Args:
      decay: Of exponential means :math:`\bar L_i` and :math:`\mu_i`, in [0, 1), the
        authors' ``mean_sort="decay"``; the variance is a plain mean in any case. Plain
        means over all updates if not given, over the last 100,000 or so in longer runs.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses; its weights are positive
      and sum to 1.

    Raises:
      ValueError: ``decay`` is not in [0, 1). In ``update`` outside ``jit``: a loss is
        not positive. Inside ``jit`` such a batch leaves weights and means as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.cov()
      >>> state = weighting.init({"depth": 1.0, "camera": 1.0})
      >>> for depth, camera in [(1.0, 2.0), (1.5, 2.2), (1.0, 2.0)]:
      ...     losses = {"depth": depth, "camera": camera}
      ...     weights, state = weighting.update(losses, state)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 0.192, 'depth': 0.808}

    References:
      Groenendijk et al., `Multi-Loss Weighting with Coefficient of Variations
      <https://arxiv.org/abs/2009.01717>`_, 2020; the means are updated as in the
      `authors' code <https://github.com/rickgroen/cov-weighting>`_.

    .. warning::
      The weights do not depend on the units of the losses, and so the weighted sum
      does: this is for losses of one scale, as of one task. What varies from batch to
      batch by chance gains weight too.
    """
    if decay is not None:
        check_decay(decay=decay)

    def init(spec: LossSpec) -> CovState:
        return CovState(
            loss_means=spec.full(0.0),
            ratio_means=spec.full(1.0),
            ratio_variances=spec.full(0.0),
            num_seen=jnp.zeros((spec.size,), jnp.int32),
        )

    def update(
        losses: jax.Array, inner: CovState, spec: LossSpec
    ) -> tuple[jax.Array, CovState]:
        deviations = jnp.sqrt(inner.ratio_variances + _SMALLEST_VARIANCE)
        weights = equal_if_unknown(
            jnp.log(deviations) - jnp.log(inner.ratio_means), inner.num_seen >= 2, spec
        )

        first = inner.num_seen == 0
        share = 1.0 / (inner.num_seen + 1).astype(losses.dtype)
        share = jnp.maximum(share, _SMALLEST_SHARE)
        rate = share if decay is None else jnp.where(first, 1.0, 1.0 - decay)
        usual = jnp.where(first, losses, inner.loss_means)
        ratios = jnp.minimum(losses / usual, _LARGEST)
        step = ratios - inner.ratio_means
        # Welford's product, of the deviations from the mean before and after.
        squares = (1.0 - rate) * step**2
        return weights / spec.count, CovState(
            loss_means=(1.0 - rate) * inner.loss_means + rate * losses,
            ratio_means=(1.0 - rate) * inner.ratio_means + rate * ratios,
            ratio_variances=(
                inner.ratio_variances + share * (squares - inner.ratio_variances)
            ),
            num_seen=inner.num_seen + 1,
        )

    return make_weighting(init, update, positive=True, first_weights=LossSpec.equal)
