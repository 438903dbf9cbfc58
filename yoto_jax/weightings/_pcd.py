"""Priority-constrained descent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_fractions, check_decay, check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import unbiased_mean
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import cosines, dot, safe_divide, solve_bounded_qp
from yoto_jax._weighting import LossWeighting


@serializable_state
class PcdState(NamedTuple):
    """What :func:`pcd` remembers."""

    average_squares: jax.Array  # (K,) running means of squared gradient norms
    num_seen: jax.Array  # int32 (K,), batches they are of


def pcd(
    primary: str | int,
    tau: PyTree = 0.02,
    *,
    decay: float = 0.999,
    eps: float = 1e-8,
) -> LossWeighting:
    r"""Follows the primary gradient as far as every other loss makes some progress.

    .. math::
      \min_d \tfrac12 \| d - \tilde g_q \|^2 \ \text{ subject to }\
      \tilde g_j \cdot d \ge \tau_j \|\tilde g_j\|^2 \text{ for } j \ne q, \qquad
      \tilde g_i = \frac{g_i}{\sqrt{v_i + \varepsilon}},

    with bias-corrected running means v of the squared gradient norms, which include the
    present batch. The solution,
    :math:`\tilde g_q + \sum_j \mu_j \tilde g_j` with multipliers :math:`\mu \ge 0`, is
    that of a quadratic programme in the Gramian. It is made as long as :math:`g_q`. If
    the demands contradict each other, they are dropped.

    Args:
      primary: q, the path of one loss, or its index in a sequence of losses.
      tau: The progress that each auxiliary loss is due, as a fraction of what a step
        along its own gradient would give it; in [0, 1]. One number, or one for each
        loss, in a tree like the losses, where that of the primary one is not looked at.
      decay: Of the running means, in [0, 1).
      eps: :math:`\varepsilon`, in units of squared gradient norms.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights are not
      negative, and 0 for losses that need no help. Without a primary gradient, or where
      the solution vanishes, all are 0.

    Raises:
      ValueError: ``tau`` is not in [0, 1], ``decay`` is not in [0, 1), or ``eps`` is
        negative. In ``init``: an unknown ``primary``, or a ``tau`` that does not fit
        the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.pcd("task", tau=0.5)
      >>> losses = {"size": 1.0, "task": 2.0}
      >>> J = jnp.array([[0.0, 4.0], [3.0, 0.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'size': 0.335, 'task': 0.894}

    References:
      Varam and AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained
      Descent for Hierarchical Multi-Objective Optimization
      <https://arxiv.org/abs/2606.29521>`_, 2026.

    .. warning::
      The authors' code tries all sets of active demands, TorchJD an active set method
      in float64; here an interior point method solves the same problem in the dtype of
      the losses. Demands that only gradients which nearly cancel could meet, to within
      rounding of that dtype, count as contradictions.
    """
    check_all_fractions(tau=tau)
    check_decay(decay=decay)
    check_not_negative(eps=eps)

    def position(spec: LossSpec) -> int:
        return spec.position("primary", primary)

    def init(spec: LossSpec) -> PcdState:
        position(spec)
        spec.vector("tau", tau)  # It has to fit the losses.
        return PcdState(spec.full(0.0), spec.full(0.0).astype(jnp.int32))

    def update(
        losses: jax.Array, inner: PcdState, spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, PcdState]:
        del losses
        squares = unbiased_mean(
            inner.average_squares, jnp.diagonal(gramian), inner.num_seen, decay
        )
        cosine, norms = cosines(gramian)
        q = position(spec)
        # In units of the primary gradient: what each loss is due of its own length.
        lengths = norms / jnp.sqrt(jnp.where(norms > 0, squares + eps, 1))
        due = spec.vector("tau", tau) * safe_divide(lengths, lengths[q])
        b = _directions(cosine, due, q, norms > 0)
        weights = safe_divide(b, norms) * norms[q]
        return weights, PcdState(squares, inner.num_seen + 1)

    return make_weighting(init, update, needs=("gramian",))


def _directions(
    cosine: jax.Array, due: jax.Array, q: int, some: jax.Array
) -> jax.Array:
    """Coefficients of the unit gradients in a direction of length 1, or zeros.

    Args:
      cosine: (K, K) of the gradients.
      due: (K,) the least product of each unit gradient with the direction, whose part
        of the primary gradient is 1.
      q: Position of the primary loss.
      some: bool (K,), which gradients are not zero.
    """
    size, dtype = due.shape[0], due.dtype
    others = some & (jnp.arange(size) != q)
    lacking = jnp.where(others, due - cosine[q], -1)
    both = others[:, None] & others[None, :]
    matrix = jnp.where(both, cosine, jnp.eye(size, dtype=dtype))
    extra = solve_bounded_qp(matrix, lacking, jnp.zeros_like(lacking))
    extra = jnp.where(others, extra, 0)

    # Contradictions: a combination of gradients that vanishes and yet lacks something.
    # The multipliers then grow along it until rounding stops them.
    rounding = 10 * size * jnp.finfo(dtype).eps
    total, gains = jnp.sum(extra), dot(matrix, extra)
    vanishing = jnp.vdot(extra, gains) <= rounding * total**2
    height = jnp.maximum(jnp.max(lacking), 1)
    met = jnp.all(gains - lacking >= -jnp.sqrt(rounding) * height)
    feasible = met & ~(vanishing & (total > 0))

    b = jnp.where(feasible, extra, 0).at[q].set(1)
    square = jnp.vdot(b, dot(cosine, b))
    zero = ~some[q] | (square <= rounding * jnp.sum(b) ** 2)
    return jnp.where(zero, 0, b / jnp.sqrt(jnp.where(zero, 1, square)))
