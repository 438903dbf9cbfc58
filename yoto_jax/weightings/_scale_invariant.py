"""Weights that make the units of the losses irrelevant."""

from yoto_jax._make_weighting import make_weighting
from yoto_jax._weighting import LossWeighting


def scale_invariant() -> LossWeighting:
    r"""The gradient of the sum of the logarithms of the losses.

    .. math::
      w_i = \frac{1}{L_i}, \qquad
      \sum_i w_i \nabla L_i = \nabla \sum_i \log L_i.

    Multiplying a loss by a constant changes nothing.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own, for positive losses.
      The weights have the unit of one over the loss and no fixed sum.

    Raises:
      ValueError: In ``update`` outside ``jit``: a loss is not positive. Inside ``jit``
        such a batch leaves the weights as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.scale_invariant()
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.25, 'depth': 2.0}

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022, where it is the baseline SI.

    .. warning::
      The weight of a loss grows without bound as the loss goes to 0.
    """
    return make_weighting(
        lambda spec: (),
        lambda losses, inner, spec: (1.0 / losses, inner),
        positive=True,
    )
