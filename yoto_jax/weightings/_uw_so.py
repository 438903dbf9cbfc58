"""Uncertainty weighting in closed form, softened."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO


def uw_so(*, temperature: float = 1.0) -> LossWeighting:
    r"""A softmax of the inverse losses: soft optimal uncertainty weighting (UW-SO).

    .. math::
      w_i = \mathrm{Softmax}_i\!\left(\frac{1}{T L_i}\right).

    The variances that :func:`yoto_jax.weightings.uncertainty` learns have the optimum
    :math:`\sigma_i^2 \propto L_i`, and the weights :math:`1 / L_i`, which are those of
    :func:`yoto_jax.weightings.scale_invariant`; the softmax bounds them.

    Args:
      temperature: T, in units of one over the loss: the paper tunes it. The larger it
        is, the more even are the weights; as it goes to 0, the smallest loss has all.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own, for positive losses;
      its weights are positive and sum to 1.

    Raises:
      ValueError: ``temperature`` is not positive. In ``update`` outside ``jit``: a loss
        is not positive. Inside ``jit`` such a batch leaves the weights as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.uw_so(temperature=2.0)
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 0.294, 'depth': 0.706}

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task
      Learning <https://arxiv.org/abs/2408.07985>`_, 2024.

    .. warning::
      The temperature has a unit, so that the weights depend on the units of the losses:
      losses that are c times as large need one c times as small. Losses over their
      running means, by :func:`yoto_jax.weightings.normalize`, have none.
    """
    check_positive(temperature=temperature)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec
    ) -> tuple[jax.Array, tuple[()]]:
        return spec.softmax(
            jnp.minimum(1.0 / losses / temperature, LARGEST_RATIO)
        ), inner

    return make_weighting(
        lambda spec: (),
        update,
        positive=True,
        first_weights=LossSpec.equal,
    )
