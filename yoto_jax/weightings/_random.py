"""Loss weights drawn anew at every update."""

from typing import NamedTuple

import jax

from yoto_jax._checks import as_key
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting


@serializable_state
class RandomState(NamedTuple):
    """What :func:`random` carries from one update to the next."""

    key: jax.Array  # typed key, split at every update


def random(*, key: jax.Array | int = 0) -> LossWeighting:
    r"""Random loss weighting: the softmax of fresh standard normals at every update.

    .. math::
      w = \mathrm{Softmax}(z), \qquad z \sim \mathcal{N}(0, I_K).

    A baseline: a learned weighting that does not beat it has learned nothing of use.

    Args:
      key: A typed key, ``jax.random.key(...)``, or an integer seed.

    Returns:
      A :class:`yoto_jax.LossWeighting`; its weights are positive and sum to 1.

    Raises:
      TypeError: In ``init``: ``key`` is neither a typed key nor an integer.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.random(key=0)
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print(round(float(weights["depth"] + weights["camera"]), 6))
      1.0

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, 2022.

    .. warning::
      The weights sum to 1. Multiply them, or the learning rate, by the number of
      losses to compare with a plain sum of the losses.
    """

    def init(spec: LossSpec) -> RandomState:
        return RandomState(jax.random.fold_in(as_key(key), 0))

    def update(
        losses: jax.Array, inner: RandomState, spec: LossSpec
    ) -> tuple[jax.Array, RandomState]:
        key, draw = jax.random.split(inner.key)
        normals = jax.random.normal(draw, losses.shape, spec.dtype)
        return spec.softmax(normals), RandomState(key)

    return make_weighting(init, update, first_weights=LossSpec.equal)
