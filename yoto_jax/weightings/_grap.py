"""Weights whose composite gradient points where a downstream loss falls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import dot
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._grap_statistics import (
    Alignment,
    Batch,
    GrapStatistics,
    to_ellipsoid,
)
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each


@serializable_state
class GrapState(NamedTuple):
    """What :func:`grap` has learned; K counts the losses without the downstream one."""

    raw_weights: jax.Array  # (K,), phi
    statistics: GrapStatistics
    opt_state: optax.OptState  # with counters for each loss


def grap(
    downstream: str | int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    regularization: float = 0.0,
    gramian_decay: float = 0.9,
    norm_decay: float = 0.9,
    warmup: int = 10,
    initial: PyTree = 1.0,
) -> LossWeighting:
    r"""GraP: weights that align the composite gradient with a downstream gradient.

    With :math:`\nu`, C and p the running means of the norms of the gradients, of their
    cosines, and of those with the downstream gradient, and :math:`\tau` the gain of the
    encoder (1 for gradients of parameters), loss k has the weight :math:`\lambda_k`:

    .. math::
      u_k = |\phi_k| \, \nu_k / \tau, \qquad w = u / \sqrt{u^T C u}, \qquad
      \lambda_k = \tau \, w_k / \nu_k .

    The raw weights :math:`\phi` descend :math:`-p^T w + \rho \, (\|u\| - 1)^2`.

    Args:
      downstream: The loss that steers: its path or its index among the losses.
      optimizer: Of the raw weights; ``optax.adam(0.01, b1=0.0, b2=0.99)`` if not given.
      regularization: :math:`\rho`; the published runs have 1.0. It draws
        :math:`\phi` to one over the norms, so that the units of the losses matter: with
        norms far from 1, set ``initial`` or the optimizer's rate accordingly.
      gramian_decay: Decay of the running means C and p, in [0, 1).
      norm_decay: Decay of the running means :math:`\nu` and :math:`\tau`, in [0, 1).
      warmup: Steps for which C and p are plain means of all that was seen.
      initial: First raw weights: one number, one for each, or a tree like the losses.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian of all losses.

    Raises:
      ValueError: An option out of its range. In ``init``: no such, or no other, loss.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> losses = {"contrastive": 1.0, "label": 0.7, "next": 2.0}
      >>> weighting = yoto.weightings.grap("label")
      >>> state, update = weighting.init(losses), jax.jit(weighting.update)
      >>> J = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])  # one gradient per row
      >>> for _ in range(50):
      ...     weights, state = update(losses, state, gramian=J @ J.T)
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'contrastive': 0.1, 'label': 0.0, 'next': 0.24}

    References:
      Karpukhin and Savchenko, `When Losses Align: Gradient-Based Composite Loss
      Weighting for Efficient Pretraining <https://arxiv.org/abs/2605.07756>`_, 2026.

    .. warning::
      The composite gradient never shrinks, not at the optimum either: let the learning
      rate decay. The documentation lists deviations from the published code.
    """
    alignment = Alignment(downstream, gramian_decay, norm_decay, warmup)
    check_not_negative(regularization=regularization)
    tx = chosen(optimizer, optax.adam(0.01, b1=0.0, b2=0.99))

    def init(spec: LossSpec) -> GrapState:
        spec.check_others("grap")
        _, others = spec.apart(downstream)
        raw = spec.vector("initial", initial)[others]
        if not isinstance(raw, jax.core.Tracer) and not jnp.all(jnp.isfinite(raw)):
            raise ValueError(f"initial must be finite, got {initial!r}.")
        return GrapState(raw, alignment.init(spec), init_each(tx, raw))

    def update(
        losses: jax.Array, inner: GrapState, spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, GrapState]:
        del losses
        statistics, batch = alignment.measure(inner.statistics, gramian, spec)
        slope, w = jax.grad(_objective, has_aux=True)(
            inner.raw_weights, statistics, batch, regularization
        )
        moves = batch.aligned & batch.there
        raw, opt_state = descend(tx, slope, inner.opt_state, inner.raw_weights, moves)
        weights = alignment.loss_weights(w, statistics, spec)
        return weights, GrapState(raw, statistics, opt_state)

    def first_weights(spec: LossSpec) -> jax.Array:
        position, _ = spec.apart(downstream)
        return jnp.abs(spec.vector("initial", initial)).at[position].set(0)

    return make_weighting(
        init,
        update,
        needs=("gramian",),
        downstream=downstream,
        first_weights=first_weights,
        observe=alignment.observe,
    )


def _objective(
    raw: jax.Array, statistics: GrapStatistics, batch: Batch, regularization: float
) -> tuple[jax.Array, jax.Array]:
    """The negative cosine of composite and downstream gradient, and the weights w."""
    # The derivative of |x| at 0 is 1 here, not 0: a raw weight can leave it.
    positive = raw * jnp.where(raw < 0, -1, 1)
    factors = statistics.gradient_norms / statistics.encoder_gain
    u = jnp.where(batch.there, factors * positive, 0)
    w = to_ellipsoid(u, statistics.cosines)
    # Nothing else depends on the norm of u: without this term it drifts.
    pull = jnp.square(optax.safe_norm(u, jnp.finfo(u.dtype).tiny) - 1)
    aligned = dot(statistics.alignments, w)
    return jnp.asarray(regularization, u.dtype) * pull - aligned, w
