"""Projecting Conflicting Gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import as_key
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import HIGHEST, cosines, surgery, weights_of_rows
from yoto_jax._varying import varying_like
from yoto_jax._weighting import LossWeighting


@serializable_state
class PCGradState(NamedTuple):
    """What :func:`pcgrad` remembers."""

    key: jax.Array  # typed key


def pcgrad(*, key: jax.Array | int = 0) -> LossWeighting:
    r"""Takes out of each gradient what conflicts with the others, and adds them up.

    For every loss i start from :math:`g = g_i` and, for all :math:`j \ne i` in a random
    order of its own, while :math:`g \cdot g_j < 0`,

    .. math::
      g \leftarrow g - \frac{g \cdot g_j}{\|g_j\|^2}\, g_j .

    Args:
      key: Random key or seed of the orders. With one or two losses there is no chance
        in it.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are 1 or
      more, and 1 without conflict.

    Raises:
      TypeError: ``key`` is neither a typed key nor an integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.pcgrad()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 2.222, 'b': 1.579}

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020, Algorithm 1.

    .. warning::
      The projections are onto the original gradients of the other losses, as in the
      paper, and every loss draws its own order; some implementations draw one for all.
    """
    key = as_key(key)

    def update(
        losses: jax.Array, inner: PCGradState, spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, PCGradState]:
        del losses
        cosine, norms = cosines(gramian)
        following, order_key = jax.random.split(inner.key)

        # Rows are coefficients of the gradients at unit length: row i is what g_i
        # becomes, relative to its norm.
        def project(row: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
            along = jnp.minimum(jnp.vdot(cosine[j], row, precision=HIGHEST), 0)
            return row.at[j].add(jnp.where(i == j, 0, -along))

        start = varying_like(jnp.eye(spec.size, dtype=spec.dtype), cosine)
        rows = surgery(project, start, order_key)
        return weights_of_rows(rows, norms), PCGradState(following)

    return make_weighting(lambda spec: PCGradState(key), update, needs=("gramian",))
