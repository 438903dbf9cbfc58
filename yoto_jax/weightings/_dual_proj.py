"""Projection of the mean gradient onto the dual cone."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import solve_bounded_qp, unit_trace
from yoto_jax._weighting import LossWeighting


def dual_proj(
    *, preference: PyTree = None, regularization: float = 1e-4
) -> LossWeighting:
    r"""Projects the mean gradient onto the directions that increase no loss.

    .. math::
      w = \arg\min_{v \ge p}\ v^\top
      \Bigl(\frac{G}{\mathrm{tr}\, G} + \varepsilon I\Bigr) v .

    Args:
      preference: p, one positive number per loss or one for all; 1/K if none is given.
      regularization: :math:`\varepsilon`. It makes the solution unique; the combined
        gradient conflicts by about this much of the mean squared norm.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are no less
      than the preference, and equal to it if the mean gradient conflicts with none.

    Raises:
      ValueError: ``preference`` is not positive or ``regularization`` is negative. In
        ``init`` and ``update``: the preference does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.dual_proj()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.611, 'b': 0.5}

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017, Eq. 11, for the mean gradient in
      place of the gradient of one task.
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
        lower = preferred(spec)
        return solve_bounded_qp(matrix, jnp.zeros_like(lower), lower), inner

    return make_weighting(
        lambda spec: (), update, needs=("gramian",), first_weights=preferred
    )
