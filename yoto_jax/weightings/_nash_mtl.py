"""Nash bargaining between the losses."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec, stateless
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import combined_norm, cosines, safe_divide, solve_power_equation
from yoto_jax._weighting import LossWeighting


def nash_mtl(
    *,
    preference: PyTree = None,
    max_norm: float | None = 1.0,
    regularization: float = 1e-4,
) -> LossWeighting:
    r"""The Nash bargaining solution: the product of the losses' gains is largest.

    .. math::
      \sum_j (g_i \cdot g_j)\, a_j = \frac{p_i}{a_i}, \qquad a > 0,

    where :math:`a` minimises :math:`\frac12 a^\top G a - \sum_i p_i \log a_i`, a
    strictly convex function: Newton's method solves it without a quadratic programme.
    The direction does not change when losses are rescaled. Gain times weight of loss i,
    its part of the squared norm, is its share :math:`p_i / K` of the bargain.

    Args:
      preference: p, the bargaining powers: one positive number per loss, in a tree like
        the losses or in their order. Brought to mean 1; equal if none is given.
        Ratios up to 1000 are solved to rounding.
      max_norm: The largest norm of the combined gradient, or ``None``: without a limit
        the norm is the square root of the number of losses, wherever gradients are
        independent.
      regularization: Added to the squared norms of the gradients, relative to them.
        It keeps the weights finite near Pareto stationary points, and float32 accurate.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are
      positive, and 0 for gradients that are zero.

    Raises:
      ValueError: ``preference`` or ``max_norm`` is not positive, or ``regularization``
        is negative. In ``init`` and ``update``: the preference does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.nash_mtl()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.418, 'b': 0.288}

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022, Claim 3.1 and Section 3.2.

    .. warning::
      The authors' code divides the Gramian by its norm and solves a sequence of convex
      programmes, so that small gradients are lost in the tolerance. Here the matrix of
      cosines is solved for, which keeps the weights exactly inverse to the scale of
      their gradients. To update the weights every few steps only, as the paper does to
      save time, use :func:`yoto_jax.weightings.every`.
    """
    check_all_positive(preference=preference)
    if max_norm is not None:
        check_positive(max_norm=max_norm)
    check_not_negative(regularization=regularization)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        cosine, norms = cosines(gramian)
        some = norms > 0
        ridge = jnp.where(some, regularization, 1)
        p = spec.ratios(preference)
        b = solve_power_equation(cosine + jnp.diag(ridge), p, 1.0, steps=12)
        b = jnp.where(some, b, 0)
        if max_norm is not None:
            norm = combined_norm(cosine, b)
            b = b / jnp.maximum(norm / max_norm, 1)
        return safe_divide(b, norms), inner

    return make_weighting(stateless(preference), update, needs=("gramian",))
