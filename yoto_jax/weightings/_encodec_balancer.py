"""The loss balancer of EnCodec."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_decay, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import unbiased_mean
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._grad_norm_balance import NormsState


def encodec_balancer(
    *,
    preference: PyTree = None,
    total_norm: float = 1.0,
    decay: float = 0.999,
    eps: float = 1e-12,
) -> LossWeighting:
    r"""Gradients at the model's output of fixed lengths, in given ratios.

    .. math::
      w_i = \frac{p_i}{\sum_j p_j}\, \frac{R}{\varepsilon + \bar n_i},

    with bias-corrected running means :math:`\bar n` of the gradient norms, which
    include the present batch. The norms are to be those at the model's output:
    :func:`yoto_jax.of_representation` with the whole decoder as the encoder.

    Args:
      preference: p, the ratios of the lengths, called *weights* by the authors: one
        positive number per loss, in a tree like the losses or in their order. Equal if
        none is given.
      total_norm: R, the sum of the lengths.
      decay: Of the running means, in [0, 1).
      eps: :math:`\varepsilon`, in units of gradient norms; a loss that never had a
        gradient has a weight of about R/eps.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs the
      gradient norms; its weights are positive.

    Raises:
      ValueError: ``preference``, ``total_norm`` or ``eps`` is not positive, or
        ``decay`` is not in [0, 1). In ``init``: the preference does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"adversarial": -0.2, "mel": 4.0}
      >>> ratios = {"adversarial": 3.0, "mel": 1.0}
      >>> weighting = yoto.weightings.encodec_balancer(preference=ratios)
      >>> state, norms = weighting.init(losses), jnp.array([0.5, 2.0])
      >>> weights, state = weighting.update(losses, state, norms=norms)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'adversarial': 1.5, 'mel': 0.125}

    References:
      Défossez et al., `High Fidelity Neural Audio Compression
      <https://arxiv.org/abs/2210.13438>`_, 2022, Section 3.4, and its code.

    .. warning::
      The norm is that of the gradient of the whole batch, as with
      ``per_batch_item=False`` in the authors' code. Its default is the mean of the
      norms of the single examples, which is smaller by the square root of the batch
      size where all are equally long: give ``total_norm`` that factor to have steps of
      the same size.
    """
    check_all_positive(preference=preference)
    check_positive(total_norm=total_norm, eps=eps)
    check_decay(decay=decay)

    def init(spec: LossSpec) -> NormsState:
        spec.ratios(preference)  # It has to fit the losses.
        return NormsState(spec.full(0.0), spec.full(0.0).astype(jnp.int32))

    def update(
        losses: jax.Array, inner: NormsState, spec: LossSpec, *, norms: jax.Array
    ) -> tuple[jax.Array, NormsState]:
        del losses
        mean = unbiased_mean(inner.average_norms, norms, inner.num_seen, decay)
        lengths = spec.ratios(preference) * (total_norm / spec.count)
        return lengths / (eps + mean), NormsState(mean, inner.num_seen + 1)

    return make_weighting(init, update, needs=("norms",))
