"""The weights that align the composite gradient best with a downstream gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import dot, safe_divide, solve_bounded_qp
from yoto_jax._varying import varying_like
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._grap_statistics import (
    Alignment,
    Batch,
    GrapStatistics,
    to_ellipsoid,
)

MAX_ZERO_STEPS = 5
"""So many steps in a row may have weights of 0, as in the published implementation."""


@serializable_state
class GrapClosedFormState(NamedTuple):
    """What :func:`grap_closed_form` has learned; K leaves out the downstream loss."""

    solution: jax.Array  # (K,), the last w that was not 0; 1 before the first
    statistics: GrapStatistics
    num_zero_steps: jax.Array  # int32 scalar, weights of 0 in a row


def grap_closed_form(
    downstream: str | int,
    *,
    gramian_decay: float = 0.9,
    norm_decay: float = 0.9,
    warmup: int = 10,
) -> LossWeighting:
    r"""GraP in closed form: in every step the best weights for the running means.

    .. math::
      w = \arg\max_{w \ge 0,\; w^T C w = 1} p^T w, \qquad \lambda_k = \tau w_k / \nu_k,

    with C, p, :math:`\nu`, :math:`\tau` those of :func:`yoto_jax.weightings.grap`, of
    which this is a variant: no raw weights, and no optimizer of them.

    Args:
      downstream: The loss that steers: its path or its index among the losses.
      gramian_decay: Decay of the running means C and p, in [0, 1).
      norm_decay: Decay of the running means :math:`\nu` and :math:`\tau`, in [0, 1).
      warmup: Steps for which C and p are plain means of all that was seen.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian of all losses. Its
      weights are not negative, many of them exactly zero; that of the downstream loss
      is 0.

    Raises:
      TypeError: ``downstream`` is neither a path nor an index.
      ValueError: An option out of its range. In ``init``: no loss, or more than one, is
        called ``downstream``, or there is no other loss.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> losses = {"contrastive": 1.0, "label": 0.7, "next": 2.0}
      >>> weighting = yoto.weightings.grap_closed_form("label")
      >>> J = jnp.array([[3.0, 0.0], [3.0, 4.0], [0.0, 4.0]])  # one gradient per row
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'contrastive': 0.2, 'label': 0.0, 'next': 0.2}

    References:
      Karpukhin and Savchenko, `When Losses Align: Gradient-Based Composite Loss
      Weighting for Efficient Pretraining <https://arxiv.org/abs/2605.07756>`_, 2026.

    .. warning::
      If all losses pull against the downstream one, the weights are 0; after 5 such
      steps in a row they are equal. The documentation says where both forms of
      GraP differ from the published implementation.
    """
    alignment = Alignment(downstream, gramian_decay, norm_decay, warmup)

    def init(spec: LossSpec) -> GrapClosedFormState:
        spec.check_others("grap_closed_form")
        statistics = alignment.init(spec)
        return GrapClosedFormState(
            solution=jnp.ones_like(statistics.gradient_norms),
            statistics=statistics,
            num_zero_steps=jnp.zeros((), jnp.int32),
        )

    def update(
        losses: jax.Array,
        inner: GrapClosedFormState,
        spec: LossSpec,
        *,
        gramian: jax.Array,
    ) -> tuple[jax.Array, GrapClosedFormState]:
        del losses
        statistics, batch = alignment.measure(inner.statistics, gramian, spec)
        w, inner = _solve(inner._replace(statistics=statistics), batch)
        return alignment.loss_weights(w, statistics, spec), inner

    def first_weights(spec: LossSpec) -> jax.Array:
        position, _ = spec.apart(downstream)
        return spec.full(1.0).at[position].set(0)

    return make_weighting(
        init,
        update,
        needs=("gramian",),
        downstream=downstream,
        first_weights=first_weights,
        observe=alignment.observe,
    )


def _solve(
    inner: GrapClosedFormState, batch: Batch
) -> tuple[jax.Array, GrapClosedFormState]:
    """Weights of unit gradients, and the state that remembers them."""
    aligned, there = batch
    cosines = jnp.where(there[:, None] & there[None, :], inner.statistics.cosines, 0)
    alignments = jnp.where(there, inner.statistics.alignments, 0)
    best = lax.cond(
        aligned,
        lambda: maximise_alignment(cosines, alignments),
        lambda: varying_like(jnp.zeros_like(inner.solution), cosines, alignments),
    )
    solved = jnp.linalg.norm(best) >= 1e-8
    solution = jnp.where(solved & there, best, inner.solution)

    # Without a downstream gradient the last solution goes on, rescaled.
    held = to_ellipsoid(jnp.where(there, solution, 0), cosines)
    patient = inner.num_zero_steps < MAX_ZERO_STEPS
    gave_up = jnp.where(patient, jnp.zeros_like(best), jnp.ones_like(best))
    w = jnp.where(solved, solution, jnp.where(aligned, gave_up, held))
    helpless = aligned & jnp.any(there) & ~solved
    zero_steps = inner.num_zero_steps + helpless.astype(jnp.int32)
    return w, inner._replace(
        solution=solution, num_zero_steps=jnp.where(solved, 0, zero_steps)
    )


def maximise_alignment(cosines: jax.Array, alignments: jax.Array) -> jax.Array:
    r"""The w that maximises p^T w with w^T C w = 1 and no negative entry, or zeros.

    It is the solution of :math:`\min_{w \ge 0} w^T C w / 2 - p^T w`, brought to the
    ellipsoid. Zeros come out if no w has a positive p^T w beyond rounding error.

    Args:
      cosines: (K, K), C, positive semi-definite.
      alignments: (K,), p.

    Returns:
      (K,), with exact zeros where the bound holds.
    """
    size = jnp.max(jnp.abs(cosines))
    some = (size >= 1e-12) & (jnp.max(jnp.abs(alignments)) >= 1e-12)
    matrix = safe_divide(cosines, size)
    # Among solutions that are equally good the ridge takes the shortest.
    ridge = 1e-10 + 8 * jnp.finfo(matrix.dtype).eps
    ridged = matrix + ridge * jnp.eye(len(alignments), dtype=matrix.dtype)
    x = solve_bounded_qp(ridged, alignments, jnp.zeros_like(alignments))
    # Here p^T x is x^T C x, and p^T w its root, the best cosine.
    some &= dot(alignments, x) > 1e-12 * size
    w = safe_divide(to_ellipsoid(x, matrix), jnp.sqrt(size))
    return jnp.where(some, w, 0)
