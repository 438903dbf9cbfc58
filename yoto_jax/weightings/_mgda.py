"""Multiple Gradient Descent Algorithm."""

from typing import Literal

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import safe_divide, smallest_convex_combination
from yoto_jax._weighting import LossWeighting


def mgda(
    normalization: Literal["l2", "loss", "loss+"] | None = None,
) -> LossWeighting:
    r"""The convex combination of the gradients that is smallest.

    .. math::
      w = \arg\min_{w \ge 0,\; 1^\top w = 1}\ \Bigl\| \sum_k w_k g_k \Bigr\|^2

    The combined gradient descends every loss, or is zero: then the parameters are
    Pareto stationary. It follows the small gradients and can all but stop when one loss
    has converged; normalisation of the gradients helps.

    Args:
      normalization: What each gradient is divided by before: ``None`` nothing, ``"l2"``
        its norm, ``"loss"`` the loss, ``"loss+"`` both. The losses must not be zero in
        the last two.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are
      non-negative, many of them exactly zero, and sum to 1.

    Raises:
      ValueError: ``normalization`` is none of these.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.mgda()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> weights, _ = weighting.update(
      ...     losses, weighting.init(losses), gramian=gramian
      ... )
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.6, 'b': 0.4}

    References:
      Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012.

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, Eq. 3.

    .. warning::
      With normalisation the weights of the raw losses are those of the normalised
      gradients divided by the normaliser, brought back to the sum 1. The authors' code
      puts the undivided weights on the raw losses, and the combination then need not
      descend every loss.
    """
    if normalization not in (None, "l2", "loss", "loss+"):
        raise ValueError(
            "normalization must be None, 'l2', 'loss' or 'loss+', "
            f"got {normalization!r}."
        )

    by_loss = normalization in ("loss", "loss+")

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        factor = spec.full(1.0)
        if normalization in ("l2", "loss+"):
            factor *= jnp.sqrt(jnp.diagonal(gramian))
        if by_loss:
            factor *= jnp.abs(losses)
        # Relative to the largest: no overflow, and the sum is 1 in the end anyway.
        factor = spec.of_present(factor)
        factor = safe_divide(factor, jnp.max(factor))
        factor = jnp.where(factor > 0, factor, 1)
        scaled = gramian / factor[:, None] / factor[None, :]
        weights = smallest_convex_combination(scaled, spec.present) / factor
        return weights / jnp.sum(weights), inner

    return make_weighting(
        lambda spec: (),
        update,
        needs=("losses", "gramian") if by_loss else ("gramian",),
        first_weights=LossSpec.equal,
    )
