"""Impartial Multi-Task Learning, gradients."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive
from yoto_jax._loss_spec import LossSpec, stateless
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import cosines, projection_weights, safe_divide
from yoto_jax._weighting import LossWeighting


def imtl_g(*, preference: PyTree = None) -> LossWeighting:
    r"""Weights for which the combined gradient has equal projections on all gradients.

    .. math::
      d \cdot \frac{g_i}{\|g_i\|} : d \cdot \frac{g_j}{\|g_j\|} = p_i : p_j
      \quad \text{for } d = \sum_k w_k g_k,\ \sum_k w_k = 1, \qquad
      w \propto \frac{C^{+} p}{\|g\|}

    with the cosines C of the gradients, and p = 1 unless told.

    Args:
      preference: p, the ratios of the projections: one positive number per loss, in a
        tree like the losses or in their order. Equal if none is given.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights sum to 1, or
      are all 0 where no such weights exist.

    Raises:
      ValueError: ``preference`` is not positive. In ``init`` and ``update``: it does
        not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.imtl_g()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.592, 'b': 0.408}

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021, Eq. 6.

    .. warning::
      Weights may be negative. Where gradients depend on each other linearly the
      pseudo-inverse of the cosines decides. A gradient that is zero gets the weight 0.
    """
    check_all_positive(preference=preference)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        cosine, norms = cosines(gramian)
        b = projection_weights(cosine, spec.ratios(preference))
        v = safe_divide(b, norms)
        # In units of the largest: sums of extreme weights do not overflow.
        v = safe_divide(v, jnp.max(jnp.abs(v)))
        total = jnp.sum(v)
        rounding = spec.size * jnp.finfo(spec.dtype).eps * jnp.sum(jnp.abs(v))
        nothing = jnp.abs(total) <= rounding
        return jnp.where(nothing, 0, v / jnp.where(nothing, 1, total)), inner

    return make_weighting(
        stateless(preference),
        update,
        needs=("gramian",),
        first_weights=LossSpec.equal,
    )
