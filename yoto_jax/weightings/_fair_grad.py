"""Alpha-fair gradients."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec, stateless
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import cosines, safe_divide, solve_power_equation
from yoto_jax._weighting import LossWeighting


def fair_grad(
    *,
    preference: PyTree = None,
    alpha: float = 2.0,
    regularization: float = 1e-4,
) -> LossWeighting:
    r"""Alpha-fair shares of the gain, from the sum of the losses to the worst of them.

    .. math::
      \sum_j (g_i \cdot g_j)\, a_j = \Bigl(\frac{p_i}{a_i}\Bigr)^{1/\alpha},
      \qquad a > 0 .

    With the gains :math:`u_i` on the left, :math:`a_i u_i^\alpha = p_i`: the largest
    :math:`\sum_i p_i\, u_i^{1 - \alpha} / (1 - \alpha)` for a direction of its norm.
    With :math:`\alpha = 1` it is :func:`nash_mtl` without a limit on the norm; towards
    0 it tends to the sum of the losses, and for large values to the best improvement
    of the loss that improves least.

    Args:
      preference: p, one positive number per loss, in a tree like the losses or in their
        order. Brought to mean 1; equal if none is given.
      alpha: Positive; 2 is the paper's choice. Between 0.5 and 5 the equations are
        solved to rounding even if the norms of gradients differ by a factor 1000. For
        tens of linearly dependent gradients this holds for 2; others may miss it.
      regularization: Added to the squared norms of the gradients, relative to them.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are
      positive, and 0 for gradients that are zero. Multiplying all losses by s
      multiplies them by :math:`s^{-2 \alpha / (\alpha + 1)}`.

    Raises:
      ValueError: ``preference`` or ``alpha`` is not positive, or ``regularization`` is
        negative. In ``init`` and ``update``: the preference does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.fair_grad()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.471, 'b': 0.319}

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, 2024, Eq. 6 and Algorithm 1.

    .. warning::
      The authors' code looks for the least squares of the equation with SciPy; here
      Newton's method minimises the convex function whose gradient it is.
    """
    check_all_positive(preference=preference)
    check_positive(alpha=alpha)
    check_not_negative(regularization=regularization)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        cosine, norms = cosines(gramian)
        some = norms > 0
        power = jnp.asarray(1 / alpha, spec.dtype)
        # In b = norm * a / unit the equation is C b = m b^(-1/alpha), with m = 1 for
        # the largest gradient, if preferences are equal.
        largest = jnp.where(jnp.any(some), jnp.max(norms), 1)
        tiny = jnp.finfo(spec.dtype).tiny ** 0.25
        share = jnp.where(some, norms / largest, 1)
        m = jnp.clip(share ** (power - 1), tiny, 1 / tiny)
        m = m * spec.ratios(preference) ** power
        matrix = cosine + jnp.diag(jnp.where(some, regularization, 1))
        b = solve_power_equation(matrix, m, power, steps=40)
        unit = largest ** ((power - 1) / (power + 1))
        return safe_divide(jnp.where(some, b * unit, 0), norms), inner

    return make_weighting(stateless(preference), update, needs=("gramian",))
