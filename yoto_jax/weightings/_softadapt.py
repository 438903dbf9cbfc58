"""SoftAdapt: weights by the latest change of the losses."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO, SMALLEST_LOSS


@serializable_state
class SoftAdaptState(NamedTuple):
    """What :func:`softadapt` remembers of the losses."""

    last_losses: jax.Array  # (K,)
    has_last: jax.Array  # bool (K,)


def softadapt(
    *,
    beta: float = 1.0,
    form: Literal["ratio", "difference"] = "ratio",
    loss_weighted: bool = False,
) -> LossWeighting:
    r"""More weight for the losses that fell least, or rose, since the last update.

    .. math::
      w_i = K\, \mathrm{Softmax}_i(\beta s_i), \qquad
      s_i = \frac{L_i(t)}{L_i(t-1) + 10^{-12}}
      \quad\text{or}\quad s_i = L_i(t) - L_i(t-1).

    The ratio is the form of NVIDIA's PhysicsNeMo, which does not depend on the units of
    losses far above 1e-12; the difference is that of the paper. With
    ``loss_weighted`` the exponentials are multiplied by the losses,
    :math:`w_i \propto L_i e^{\beta s_i}`. All weights are 1 at the first update.

    Args:
      beta: Sharpness. Positive values favour the losses that do worst, negative ones
        those that do best. With differences, in units of one over the loss.
      form: Which :math:`s` to take.
      loss_weighted: Whether to multiply by the losses, the paper's second variant.

    Returns:
      A :class:`yoto_jax.LossWeighting`; its weights sum to K. The ratio and
      ``loss_weighted`` are for positive losses.

    Raises:
      ValueError: An unknown ``form``. In ``update`` outside ``jit``: a loss is not
        positive where it has to be.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.softadapt()
      >>> state = weighting.init({"depth": 1.0, "camera": 1.0})
      >>> for losses in {"depth": 1.0, "camera": 2.0}, {"depth": 0.5, "camera": 2.0}:
      ...     weights, state = weighting.update(losses, state)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 1.245, 'depth': 0.755}

    References:
      Heydari, Thompson and Mehmood, `SoftAdapt: Techniques for Adaptive Loss Weighting
      of Neural Networks with Multi-Part Loss Functions
      <https://arxiv.org/abs/1912.12355>`_, 2019.

    .. warning::
      The paper's weights sum to 1, these sum to K. The paper looks back over several
      updates, this over one: wrap it in :func:`yoto_jax.weightings.every` to look at
      every k-th batch alone, or in :func:`yoto_jax.weightings.smooth`.
    """
    if form not in ("ratio", "difference"):
        raise ValueError(f"form must be 'ratio' or 'difference', got {form!r}.")

    def init(spec: LossSpec) -> SoftAdaptState:
        return SoftAdaptState(spec.full(1.0), jnp.zeros((spec.size,), jnp.bool_))

    def update(
        losses: jax.Array, inner: SoftAdaptState, spec: LossSpec
    ) -> tuple[jax.Array, SoftAdaptState]:
        if form == "ratio":
            change = jnp.minimum(
                losses / (inner.last_losses + SMALLEST_LOSS), LARGEST_RATIO
            )
        else:
            change = losses - inner.last_losses
        # A loss without a past has not changed.
        change = jnp.where(inner.has_last, change, 1.0 if form == "ratio" else 0.0)
        exponents = beta * change
        if loss_weighted:
            exponents += jnp.log(losses)
        softmax = spec.count * spec.softmax(exponents)
        some = jnp.any(spec.of_present(inner.has_last, False))
        weights = jnp.where(some, softmax, 1.0)
        return weights, SoftAdaptState(losses, jnp.ones_like(inner.has_last))

    return make_weighting(init, update, positive=form == "ratio" or loss_weighted)
