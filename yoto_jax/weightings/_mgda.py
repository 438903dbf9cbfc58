"""Multiple Gradient Descent Algorithm."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_flag
from yoto_jax._loss_spec import LossSpec, stateless
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import safe_divide, smallest_convex_combination
from yoto_jax._weighting import LossWeighting


def mgda(*, preference: PyTree = None, normalize: bool = False) -> LossWeighting:
    r"""The convex combination of the gradients that is smallest.

    .. math::
      w = \arg\min_{w \ge 0,\; 1^\top w = 1}\ \Bigl\| \sum_k w_k g_k \Bigr\|^2

    The combined gradient descends every loss, or is zero: then the parameters are
    Pareto stationary. It follows the small gradients and can all but stop when one loss
    has converged; normalised gradients help. With a preference p it is the combination
    of the gradients :math:`g_k / p_k`, those of losses in units of their own: the gains
    :math:`g_k \cdot d` of the losses with a weight are in the ratios p, and no other
    loss gains less than its part.

    Args:
      preference: p, one positive number per loss, in a tree like the losses or in their
        order. Their ratios count; equal if none is given.
      normalize: Whether to combine gradients of length 1.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are
      non-negative, many of them exactly zero, and sum to 1.

    Raises:
      ValueError: ``preference`` is not positive. In ``init`` and ``update``: it does
        not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.mgda()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.6, 'b': 0.4}

    References:
      Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012.

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, Eq. 3.

    .. warning::
      With ``normalize`` the weights of the raw losses are those of the unit gradients
      divided by the norms, brought back to the sum 1. The authors' code puts the
      undivided weights on the raw losses, and the combination then need not descend
      every loss.
    """
    check_all_positive(preference=preference)
    check_flag(normalize=normalize)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        factor = spec.ratios(preference)
        if normalize:
            factor *= jnp.sqrt(jnp.diagonal(gramian))
        # Relative to the largest: no overflow, and the sum is 1 in the end anyway.
        factor = spec.of_present(factor)
        factor = safe_divide(factor, jnp.max(factor))
        factor = jnp.where(factor > 0, factor, 1)
        scaled = gramian / factor[:, None] / factor[None, :]
        weights = smallest_convex_combination(scaled, spec.present) / factor
        return weights / jnp.sum(weights), inner

    return make_weighting(
        stateless(preference),
        update,
        needs=("gramian",),
        first_weights=LossSpec.equal,
    )
