"""Causal weights for residuals in the order of time."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting, refuse_losses
from yoto_jax._weighting import LossWeighting


def causal(*, tolerance: float = 1.0) -> LossWeighting:
    r"""No weight for later times until the earlier ones are solved.

    .. math::
      w_k = \frac1M \exp\!\Big( -\epsilon \sum_{j<k} l_j \Big).

    The losses are the mean squared residuals :math:`l_1 \dots l_M` of a time-dependent
    equation in M intervals of time, the earliest first. The composite loss is their
    weighted mean.

    Args:
      tolerance: :math:`\epsilon`, in units of one over the loss. The larger it is, the
        better an interval must be solved before the next one counts.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own, for losses that are
      not negative. The weights do not grow with time and are at most 1/M; the first one
      is 1/M.

    Raises:
      ValueError: ``tolerance`` is negative. In ``update`` outside ``jit``: a loss is
        negative. Inside ``jit`` such a batch leaves the weights as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = [0.1, 1.0, 5.0, 5.0]  # A list, the earliest interval first.
      >>> weighting = yoto.weightings.causal()
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print([round(float(weight), 4) for weight in weights])
      [0.25, 0.2262, 0.0832, 0.0006]

    References:
      Wang, Sankaran and Perdikaris, `Respecting causality is all you need for training
      physics-informed neural networks <https://arxiv.org/abs/2203.07404>`_, 2022.

    .. warning::
      The order is that of ``jax.tree.leaves``. Use a list: the keys of a dict are
      sorted as text, and ``"t10"`` comes before ``"t2"``. Watch the smallest weight; it
      comes near 1/M once the whole time span is solved.
    """
    check_not_negative(tolerance=tolerance)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec
    ) -> tuple[jax.Array, tuple[()]]:
        refuse_losses(
            losses < 0,
            losses,
            spec,
            "losses that are not negative",
            "Take mean squared residuals.",
        )
        residuals = spec.of_present(jnp.where(losses < 0, jnp.nan, losses))
        earlier = jnp.concatenate([spec.full(0.0)[:1], jnp.cumsum(residuals)[:-1]])
        # The last one is in no sum.
        earlier = jnp.where(jnp.any(jnp.isnan(residuals)), jnp.nan, earlier)
        return jnp.exp(-tolerance * earlier) / spec.count, inner

    weighting = make_weighting(lambda spec: (), update, first_weights=LossSpec.equal)
    return weighting._replace(positive=True)
