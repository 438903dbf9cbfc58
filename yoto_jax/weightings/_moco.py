"""Weights that descend the norm of the combined gradient, a step in each batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import dot, safe_divide
from yoto_jax._weighting import LossWeighting


@serializable_state
class MocoState(NamedTuple):
    """What :func:`moco`, :func:`modo` and :func:`sdmgrad` have learned."""

    shares: jax.Array  # (K,) not negative, sum 1 unless losses have been absent


def moco(
    *,
    learning_rate: jax.typing.ArrayLike = 0.1,
    regularization: jax.typing.ArrayLike = 0.0,
) -> LossWeighting:
    r"""Multi-objective gradient correction: one step towards the weights of MGDA.

    .. math::
      w \leftarrow \Pi_\Delta \bigl( w - \gamma (G + \rho I) w \bigr), \qquad
      G = Y Y^\top,

    with :math:`\Pi_\Delta` the projection onto non-negative weights of sum 1. In the
    method Y are running means of the gradients, one row each. ``aggregate`` behind
    ``per_loss(optax.ema(1 - beta, debias=False), losses)`` sees those; in
    ``value_and_grad``, and without that link, they are the gradients of the batch.

    Args:
      learning_rate: :math:`\gamma > 0`, in units of one over a squared gradient norm.
      regularization: :math:`\rho \ge 0`, in squared gradient norms: towards equal
        weights.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are not
      negative and sum to 1.

    Raises:
      ValueError: ``learning_rate`` is not positive, or ``regularization`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> moco = yoto.weightings.moco(learning_rate=0.1)
      >>> memory = yoto.per_loss(optax.ema(0.5, debias=False), 2)
      >>> tx = optax.chain(memory, yoto.aggregate(moco, 2), optax.sgd(1.0))
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     jacobian = jnp.array([[4.0, 0.0], [0.0, 2.0]])
      ...     updates, state = tx.update(jacobian, state, w)
      >>> print(jnp.stack(optax.tree.get(state, "loss_weights")).round(3))  # As MGDA.
      [0.2 0.8]

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably
      Convergent Approach <https://arxiv.org/abs/2210.12624>`_, 2022, Algorithm 1.

    .. warning::
      The step is not free of scale: with large gradients, set ``learning_rate`` to less
      than 2 over the largest eigenvalue of G. Weights and gradients of a step are those
      after its update, as in the authors' code; LibMTL has a softmax for the projection
      and rescales gradients by losses over norms.
    """
    return _descending("gramian", learning_rate, regularization)


def modo(
    *,
    learning_rate: jax.typing.ArrayLike = 0.1,
    regularization: jax.typing.ArrayLike = 0.0,
) -> LossWeighting:
    r"""Multi-objective gradient descent with double sampling: MoCo on two batches.

    .. math::
      w \leftarrow \Pi_\Delta \bigl( w - \gamma (J_1 J_2^\top + \rho I) w \bigr),

    with gradients :math:`J_1` and :math:`J_2` of two independent batches, so that the
    step is right in the mean; :math:`\Pi_\Delta` projects onto non-negative weights of
    sum 1. The caller provides the product, by :func:`yoto_jax.cross_gramian`: the
    engine has no second batch.

    Args:
      learning_rate: :math:`\gamma > 0`, in units of one over a squared gradient norm.
      regularization: :math:`\rho \ge 0`, in squared gradient norms: towards equal
        weights.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs ``cross_gramian``, (K, K); its
      weights are not negative and sum to 1.

    Raises:
      ValueError: ``learning_rate`` is not positive, or ``regularization`` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, yoto_jax as yoto
      >>> loss_fn = lambda w, x: (jnp.mean((w - x) ** 2), jnp.mean((w + x) ** 2))
      >>> gradients = yoto.value_and_jacobian(loss_fn)
      >>> tx = optax.chain(yoto.aggregate(yoto.weightings.modo(), 2), optax.sgd(0.1))
      >>> w, halves = jnp.zeros(()), jnp.array([[1.0, 2.0], [1.5, 2.5]])
      >>> state = tx.init(w)
      >>> (_, first), (_, second) = (gradients(w, x) for x in halves)
      >>> mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
      >>> cross = yoto.cross_gramian(first, second)
      >>> updates, state = tx.update(mean, state, w, cross_gramian=cross)
      >>> print(cross)
      [[ 12. -12.]
       [-12.  12.]]

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_, 2023,
      Algorithm 1.

    .. warning::
      The combined gradient is that of the batch you give to ``aggregate``: the mean of
      both is half of what the authors' code takes, LibMTL takes a third batch. With one
      batch for both it is :func:`moco`, and biased.
    """
    return _descending("cross_gramian", learning_rate, regularization)


def _descending(
    name: str,
    learning_rate: jax.typing.ArrayLike,
    regularization: jax.typing.ArrayLike,
) -> LossWeighting:
    check_positive(learning_rate=learning_rate)
    check_not_negative(regularization=regularization)

    def init(spec: LossSpec) -> MocoState:
        return MocoState(spec.equal())

    def update(
        losses: jax.Array, inner: MocoState, spec: LossSpec, **seen: jax.Array
    ) -> tuple[jax.Array, MocoState]:
        del losses
        shares = shares_of(inner, spec)
        slope = dot(seen[name], shares) + regularization * shares
        shares = project(shares - learning_rate * slope, spec)
        return shares, MocoState(shares)

    return make_weighting(init, update, needs=(name,), first_weights=LossSpec.equal)


def shares_of(inner: MocoState, spec: LossSpec) -> jax.Array:
    """What each loss that is there has of the sum 1."""
    total = spec.sum(inner.shares)
    shares = spec.of_present(safe_divide(inner.shares, total))
    return jnp.where(total > 0, shares, spec.equal())


def project(x: jax.Array, spec: LossSpec) -> jax.Array:
    """The closest weights that are not negative and sum to 1, 0 for absent losses."""
    # A constant makes no difference, and whoever is 1 below the largest gets nothing:
    # so numbers stay small, and absent losses are left out.
    lag = x - jnp.max(spec.of_present(x, -jnp.inf))
    lag = spec.of_present(jnp.maximum(lag, -1), -1)
    with jax.numpy_dtype_promotion("standard"):  # Optax divides by integers there,
        return optax.projections.projection_simplex(lag).astype(x.dtype)  # of int64.
