"""Unconflicting projections of the gradients."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import solve_axis_qps, unit_trace
from yoto_jax._weighting import LossWeighting


def upgrad(*, preference: PyTree = None, regularization: float = 1e-4) -> LossWeighting:
    r"""Projects each gradient onto the directions that increase no loss, and adds up.

    .. math::
      w = \sum_i v_i, \qquad
      v_i = \arg\min_{v \ge p_i e_i} v^\top
      \Bigl(\frac{G}{\mathrm{tr}\, G} + \varepsilon I\Bigr) v .

    The combined gradient conflicts with no gradient, follows positive factors of the
    losses linearly, and does not vanish unless the parameters are Pareto stationary.

    Args:
      preference: p, one positive number per loss or one for all; 1/K if none is given.
      regularization: :math:`\varepsilon`. It makes the solution unique; the combined
        gradient conflicts by about this much of the mean squared norm.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are no less
      than the preference, and equal to it without conflict.

    Raises:
      ValueError: ``preference`` is not positive or ``regularization`` is negative. In
        ``init`` and ``update``: the preference does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.upgrad()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 1.111, 'b': 0.789}

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, Eq. 5 and Proposition 1.
    """
    check_all_positive(preference=preference)
    check_not_negative(regularization=regularization)

    def preferred(spec: LossSpec) -> jax.Array:
        return spec.preference(preference)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        eye = jnp.eye(spec.size, dtype=spec.dtype)
        matrix = unit_trace(gramian) + regularization * eye
        return jnp.sum(solve_axis_qps(matrix, preferred(spec)), axis=0), inner

    return make_weighting(
        lambda spec: (), update, needs=("gramian",), first_weights=preferred
    )
