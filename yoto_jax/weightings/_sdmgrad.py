"""The smallest combined gradient near a preferred one, from two batches."""

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._checks import check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import dot, safe_divide
from yoto_jax._varying import varying_like
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._moco import MocoState, project, shares_of

_STEPS, _MOMENTUM = 20, 0.5  # as in the authors' code


def sdmgrad(
    *,
    preference: PyTree = None,
    regularization: jax.typing.ArrayLike = 0.3,
    learning_rate: jax.typing.ArrayLike | None = None,
) -> LossWeighting:
    r"""Direction-oriented descent: as MGDA, drawn to a preferred mixture, two batches.

    .. math::
      w = \frac{v + \lambda p}{1 + \lambda}, \qquad
      v \approx \arg\min_{v \in \Delta} \tfrac12
      \bigl\| J^\top (v + \lambda p) \bigr\|^2.

    From the v before, 20 projected steps with momentum 0.5 along
    :math:`A (v + \lambda p)`, where A is :math:`J_1 J_2^\top` of two independent
    batches, over the squared mean of the gradients' norms as its diagonal tells them.

    Args:
      preference: p, one number per loss, or a tree like the losses: equal shares unless
        given.
      regularization: :math:`\lambda \ge 0`: 0 is a stochastic MGDA, a large one gives
        the preference.
      learning_rate: Of the steps; scales of the gradients make no difference to it. If
        none is given, 1, or less where that would not converge: 2 over the largest sum
        of a row of \|A\|.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs ``cross_gramian``, (K, K), see
      :func:`modo`; its weights are not negative, and sum to 1 if the preference does.

    Raises:
      ValueError: ``regularization`` is negative, or ``learning_rate`` not positive. In
        ``init``: ``preference`` does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> weighting = yoto.weightings.sdmgrad(regularization=0.0)
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # Without noise, as MGDA.
      >>> cross = yoto.cross_gramian(J, J)
      >>> weights, _ = weighting.update(
      ...     losses, weighting.init(losses), cross_gramian=cross
      ... )
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.6, 'b': 0.4}

    References:
      Xiao et al., `Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, 2023, Algorithm 1.

    .. warning::
      The authors' learning rate is 10, LibMTL's 5: there the steps do not converge,
      but jump from loss to loss, and rounding decides where they end. A diagonal entry
      below zero counts as 0, as in LibMTL; the authors add 1e-4 under the root. They
      take the combined gradient of a third batch.
    """
    check_not_negative(regularization=regularization)
    if learning_rate is not None:
        check_positive(learning_rate=learning_rate)

    def init(spec: LossSpec) -> MocoState:
        spec.preference(preference)  # To be told now if it does not fit.
        return MocoState(spec.equal())

    def update(
        losses: jax.Array, inner: MocoState, spec: LossSpec, *, cross_gramian: jax.Array
    ) -> tuple[jax.Array, MocoState]:
        strength = jnp.asarray(regularization, losses.dtype)
        drawn = strength * spec.preference(preference)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(cross_gramian), 0))
        # By one norm at a time: the square might underflow.
        matrix = safe_divide(cross_gramian, spec.mean(norms))
        matrix = safe_divide(matrix, spec.mean(norms))
        if learning_rate is None:
            # With the momentum, steps converge up to 3 over the largest eigenvalue.
            largest = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
            rate = 2 / jnp.maximum(largest, 2)
        else:
            rate = jnp.asarray(learning_rate, losses.dtype)

        def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            shares, velocity = carry
            velocity = _MOMENTUM * velocity + dot(matrix, shares + drawn)
            return project(shares - rate * velocity, spec), velocity

        start = shares_of(inner, spec)
        shares, _ = lax.fori_loop(
            0, _STEPS, step, varying_like((start, jnp.zeros_like(start)), start, matrix)
        )
        return (shares + drawn) / (1 + strength), MocoState(shares)

    return make_weighting(
        init, update, needs=("cross_gramian",), first_weights=LossSpec.equal
    )
