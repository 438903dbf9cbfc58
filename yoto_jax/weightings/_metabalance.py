"""MetaBalance: auxiliary gradients partly as long as the primary one."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_decay, check_fraction
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import unbiased_mean
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._grad_norm_balance import NormsState


def metabalance(
    primary: str | int, *, relax: float = 0.7, decay: float = 0.9
) -> LossWeighting:
    r"""Brings auxiliary gradients part of the way to the length of the primary one.

    .. math::
      w_i = r \frac{\bar n_q}{\bar n_i} + (1 - r),

    with bias-corrected running means :math:`\bar n` of the gradient norms, which
    include the present batch.

    Args:
      primary: q, the path of one loss, or its index in a sequence of losses.
      relax: r, in [0, 1]: 0 leaves the gradients as they are, with 1 all are as long as
        the primary one.
      decay: Of the running means, in [0, 1).

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs the
      gradient norms; its weights are at least 1 - r, and 1 for the primary loss and for
      one that never had a gradient.

    Raises:
      ValueError: ``relax`` is not in [0, 1], or ``decay`` not in [0, 1). In ``init``:
        an unknown ``primary``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"click": 0.3, "buy": 0.1}
      >>> weighting = yoto.weightings.metabalance("buy")
      >>> norms = jnp.array([1.0, 2.0])  # buy, click
      >>> weights, _ = weighting.update(losses, weighting.init(losses), norms=norms)
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'buy': 1.0, 'click': 0.65}

    References:
      He et al., `MetaBalance: Improving Multi-Task Recommendations via Adapting
      Gradient Magnitudes of Auxiliary Tasks <https://arxiv.org/abs/2203.06801>`_, 2022,
      and its code.

    .. warning::
      The paper has norms, and so weights, for every tensor of parameters; here they are
      of all parameters that the gradients are taken of. The documentation has the other
      form too, under *Keep given ratios*.
    """
    check_fraction(relax=relax)
    check_decay(decay=decay)

    def position(spec: LossSpec) -> int:
        return spec.position("primary", primary)

    def init(spec: LossSpec) -> NormsState:
        position(spec)
        return NormsState(spec.full(0.0), spec.full(0.0).astype(jnp.int32))

    def update(
        losses: jax.Array, inner: NormsState, spec: LossSpec, *, norms: jax.Array
    ) -> tuple[jax.Array, NormsState]:
        del losses
        mean = unbiased_mean(inner.average_norms, norms, inner.num_seen, decay)
        mean = spec.of_present(mean, inner.average_norms)
        place = position(spec)
        # Until the primary loss has been there, there is nothing to balance with.
        seen = spec.of_present(inner.num_seen + 1, inner.num_seen)
        some = (mean > 0) & (seen[place] > 0)
        ratio = jnp.where(some, mean[place] / jnp.where(some, mean, 1), 1)
        return relax * ratio + (1 - relax), NormsState(mean, inner.num_seen + 1)

    return make_weighting(init, update, needs=("norms",))
