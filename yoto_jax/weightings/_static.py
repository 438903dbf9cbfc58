"""Weights that stay what they are."""

from typing import Literal

import jax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import Weights
from yoto_jax._make_weighting import make_weighting
from yoto_jax._weighting import LossWeighting


def static(weights: Weights) -> LossWeighting:
    """Fixed loss weights: the baseline that every other method has to beat.

    Args:
      weights: The weight of every loss: a tree like the losses, one number per loss in
        the order of ``jax.tree.leaves``, or one number for all. Used as they are.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own.

    Raises:
      ValueError: In ``init`` and ``update``: the weights do not fit the losses.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.static({"depth": 1.0, "camera": 0.25})
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.25, 'depth': 1.0}

    References:
      Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning Even
      Help? <https://arxiv.org/abs/2209.11379>`_, 2022, on how far tuned fixed weights
      go.
    """

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        return spec.vector("weights", weights), inner

    return make_weighting(
        lambda spec: (),
        update,
        first_weights=lambda spec: spec.vector("weights", weights),
    )


def equal(*, reduction: Literal["mean", "sum"] = "mean") -> LossWeighting:
    """The same weight for every loss.

    Args:
      reduction: ``"mean"`` gives each loss the weight 1/K, ``"sum"`` the weight 1. They
        differ by a factor K in the effective learning rate.

    Returns:
      A :class:`yoto_jax.LossWeighting` without a state of its own.

    Raises:
      ValueError: ``reduction`` is neither.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.equal()
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.5, 'depth': 0.5}

    References:
      Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, 2022.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")

    def weight(spec: LossSpec) -> jax.Array:
        return spec.equal() if reduction == "mean" else spec.full(1.0)

    return make_weighting(
        lambda spec: (),
        lambda losses, inner, spec: (weight(spec), inner),
        first_weights=weight,
    )
