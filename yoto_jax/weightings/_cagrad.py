"""Conflict-Averse Gradient descent."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import where_rows
from yoto_jax._solvers import (
    combined_norm,
    dot,
    minimise_on_simplex,
    safe_divide,
    smallest_convex_combination,
    unit_trace,
)
from yoto_jax._weighting import LossWeighting


def cagrad(*, c: float = 0.5) -> LossWeighting:
    r"""The mean gradient, turned towards the loss that gains least from it.

    Of all directions within c times its norm from the mean gradient :math:`g_0`, it is
    the one with the largest worst local improvement :math:`\min_k g_k \cdot d`:

    .. math::
      d = g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w, \qquad g_w = \sum_k w_k g_k, \qquad
      w = \arg\min_{w \ge 0,\; 1^\top w = 1}\ g_w \cdot g_0 + c \|g_0\| \|g_w\| .

    Args:
      c: Radius of the ball; 0 is the mean gradient, and large values approach
        :func:`mgda`.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are at least
      1/K.

    Raises:
      ValueError: c is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.cagrad()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.704, 'b': 0.5}

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021, Eq. 3 and Algorithm 1.

    .. warning::
      For c below 1 the direction may still increase a loss. At Pareto stationary
      points, where some :math:`g_w` vanishes, the direction is the mean gradient.
      Taken literally, Eq. 3 shortens it there, by the factor :math:`1 - c` or to 0.
      The authors' code divides the direction by :math:`1 + c^2`, the paper does not.
    """
    check_not_negative(c=c)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        eps = jnp.finfo(spec.dtype).eps
        g = unit_trace(gramian)
        mean = spec.equal()
        radius = jnp.asarray(c, spec.dtype) * combined_norm(g, mean)
        basis = None
        if spec.present is not None:
            # In the place of an absent gradient the mean one, which lies between the
            # others anyway: it changes nothing, and no weight is left over.
            basis = jnp.eye(spec.size, dtype=spec.dtype)
            basis = where_rows(spec.present, basis, mean[None, :])
            g = dot(basis, dot(g, basis.T))
        to_mean = dot(g, mean)

        def derivatives(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            gw = dot(g, w)
            # The norm has a kink at 0; rounded off where float arithmetic ends.
            norm = jnp.sqrt(jnp.maximum(jnp.vdot(w, gw), 0) + eps)
            slope = gw / norm
            hessian = (g - slope[:, None] * slope[None, :]) / norm
            value = jnp.vdot(w, to_mean) + radius * norm
            return value, to_mean + radius * slope, radius * hessian

        w = minimise_on_simplex(derivatives, spec.size, spec.dtype)
        # Close to the kink its steps are short; there the shortest combination is best.
        shortest = smallest_convex_combination(g)
        w = jnp.where(derivatives(shortest)[0] < derivatives(w)[0], shortest, w)
        pull = safe_divide(radius, combined_norm(g, w))
        # Some combination of the gradients is zero, up to the rounding of their sum.
        summed = jnp.vdot(shortest, jnp.sqrt(jnp.diagonal(g)))
        stationary = combined_norm(g, shortest) <= summed * jnp.sqrt(
            8 * spec.size * eps
        )
        w = w if basis is None else dot(w, basis)
        return mean + jnp.where(stationary, 0, pull) * w, inner

    return make_weighting(
        lambda spec: (),
        update,
        needs=("gramian",),
        first_weights=LossSpec.equal,
    )
