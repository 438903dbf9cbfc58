"""Gradient Vaccine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import as_key, check_fraction
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import cosines, safe_divide, surgery, weights_of_rows
from yoto_jax._weighting import LossWeighting


@serializable_state
class GradVacState(NamedTuple):
    """What :func:`gradvac` has learned."""

    cosine_targets: jax.Array  # (K, K), row i: seen from the gradient of loss i
    key: jax.Array  # typed key


def gradvac(*, decay: float = 0.99, key: jax.Array | int = 0) -> LossWeighting:
    r"""Turns gradients towards each other until they are as similar as usual.

    As :func:`pcgrad`, with a target for the cosine in place of 0. For every loss i
    start from :math:`g = g_i` and, for all :math:`j \ne i` in a random order, if the
    cosine :math:`\phi` of g and :math:`g_j` is below the target :math:`T_{ij}`,

    .. math::
      g \leftarrow g + \frac{\|g\| \bigl(T_{ij} \sqrt{1 - \phi^2}
      - \phi \sqrt{1 - T_{ij}^2}\bigr)}{\|g_j\| \sqrt{1 - T_{ij}^2}}\, g_j, \qquad
      T_{ij} \leftarrow \mathtt{decay}\; T_{ij} + (1 - \mathtt{decay})\, \phi .

    Args:
      decay: Of the moving average of the cosines; 0.99 is :math:`\beta = 0.01` of the
        paper.
      key: Random key or seed of the orders.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian. The targets begin with
      0, so that the first update is that of :func:`pcgrad`; the weights are 1 or more.

    Raises:
      TypeError: ``key`` is neither a typed key nor an integer.
      ValueError: ``decay`` is not between 0 and 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.gradvac()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> state = weighting.init(losses)
      >>> weights, state = weighting.update(losses, state, gramian=J @ J.T)
      >>> print(state.inner.cosine_targets.round(4))
      [[ 0.     -0.0084]
       [-0.0084  0.    ]]

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, 2020, Eqs. 3 and 4, Algorithm 1.

    .. warning::
      The gradients are those of all parameters that the Gramian is made of. The paper
      has one set of targets per layer or block of parameters.
    """
    check_fraction(decay=decay)
    key = as_key(key)

    def init(spec: LossSpec) -> GradVacState:
        shape = (spec.size, spec.size)
        return GradVacState(jnp.zeros(shape, spec.dtype), key)

    def update(
        losses: jax.Array, inner: GradVacState, spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, GradVacState]:
        del losses
        cosine, norms = cosines(gramian)
        following, order_key = jax.random.split(inner.key)
        nearly_one = 1 - 4 * jnp.finfo(spec.dtype).eps
        kept = jnp.asarray(decay, spec.dtype)
        sine = lambda x: jnp.sqrt(1 - x**2)

        # Rows are coefficients of the gradients at unit length: row i is what g_i
        # becomes, relative to its norm. Its products with all gradients go along.
        def turn(
            carry: tuple[jax.Array, jax.Array, jax.Array], i: jax.Array, j: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            row, products, targets = carry
            length = jnp.sqrt(jnp.maximum(jnp.vdot(row, products), 0))
            seen = safe_divide(products[j], length)
            seen = jnp.clip(seen, -nearly_one, nearly_one)
            target = jnp.clip(targets[j], -nearly_one, nearly_one)
            change = length * (target * sine(seen) / sine(target) - seen)
            other = (i != j) & (norms[i] > 0) & (norms[j] > 0)
            change = jnp.where(other & (seen < target), change, 0)
            new = kept * targets[j] + (1 - kept) * seen
            targets = targets.at[j].set(jnp.where(other, new, targets[j]))
            return row.at[j].add(change), products + change * cosine[j], targets

        eye = jnp.eye(spec.size, dtype=spec.dtype)
        start = (eye, cosine, inner.cosine_targets)
        rows, _, targets = surgery(turn, start, order_key)
        weights = weights_of_rows(rows, norms)
        return weights, GradVacState(jnp.asarray(targets, spec.dtype), following)

    return make_weighting(init, update, needs=("gramian",))
