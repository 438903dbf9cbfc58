"""Conflict-Free Inverse Gradients."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive
from yoto_jax._loss_spec import LossSpec, stateless
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import cosines, dot, projection_weights, safe_divide
from yoto_jax._weighting import LossWeighting


def config(*, preference: PyTree = None) -> LossWeighting:
    r"""A direction with the same angle to all gradients, as long as they support it.

    .. math::
      d = \Bigl(\sum_k g_k \cdot x\Bigr) x, \qquad
      x = \frac{U^{+} p}{\|U^{+} p\|}, \qquad
      U = \Bigl(\frac{g_1}{\|g_1\|}, \ldots, \frac{g_K}{\|g_K\|}\Bigr)^\top .

    Since :math:`U^{+} p = U^\top C^{+} p`, the cosines C are all that is needed. (The
    name is that of the method.)

    Args:
      preference: p, the ratios of the cosines of the angles, the *direction weights* of
        the authors' code: one positive number per loss, in a tree like the losses or in
        their order. Equal if none is given.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian.

    Raises:
      ValueError: ``preference`` is not positive. In ``init`` and ``update``: it does
        not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.config()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 1.226, 'b': 0.844}

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, 2024, Eqs. 2 and 3.

    .. warning::
      Weights may be negative. Where gradients depend on each other linearly, equal
      angles may be impossible; they are then as equal as least squares make them.
    """
    check_all_positive(preference=preference)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        cosine, norms = cosines(gramian)
        b = projection_weights(cosine, spec.ratios(preference))
        towards = dot(cosine, b)  # p wherever such angles are possible
        square = jnp.vdot(b, towards)
        length = jnp.where(square > 0, safe_divide(jnp.vdot(norms, towards), square), 0)
        return length * safe_divide(b, norms), inner

    return make_weighting(
        stateless(preference),
        update,
        needs=("gramian",),
        first_weights=LossSpec.equal,
    )
