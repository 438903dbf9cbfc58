"""The geometric mean of the losses, as weights."""

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._weighting import LossWeighting


def geometric() -> LossWeighting:
    r"""The gradient of the geometric mean of the losses.

    .. math::
      \mathrm{GLS} = \Big(\prod_j L_j\Big)^{1/K}, \qquad
      w_i = \frac{\partial\, \mathrm{GLS}}{\partial L_i}
          = \frac{\mathrm{GLS}}{K L_i}.

    Computed in logarithms, so that a product of many losses neither overflows nor
    vanishes.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own, for positive losses.
      The weighted losses sum to the geometric mean: :math:`\sum_i w_i L_i =
      \mathrm{GLS}`.

    Raises:
      ValueError: In ``update`` outside ``jit``: a loss is not positive. Inside ``jit``
        such a batch leaves the weights as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 8.0}  # Geometric mean 2.
      >>> weighting = yoto.weightings.geometric()
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 0.125, 'depth': 2.0}

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric
      Loss Strategy for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_, 2019.

    .. warning::
      As one loss goes to 0, the weights of all the others go to 0 with it.
    """

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec
    ) -> tuple[jax.Array, tuple[()]]:
        logs = jnp.log(losses)
        return jnp.exp(spec.mean(logs) - logs) / spec.count, inner

    return make_weighting(
        lambda spec: (),
        update,
        positive=True,
        first_weights=LossSpec.equal,
    )
