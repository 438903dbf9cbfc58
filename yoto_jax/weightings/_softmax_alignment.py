"""Softmax weights, as in YOTO, that follow a downstream gradient, as in GraP."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_decay
from yoto_jax._loss_logits import LossLogits, init_loss_logits, loss_weights
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import running_mean
from yoto_jax._optimizers import adamw
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import cosines, dot, safe_divide
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each


@serializable_state
class SoftmaxAlignmentState(NamedTuple):
    """What :func:`softmax_alignment` has learned; K leaves out the downstream loss."""

    mu: LossLogits  # of the K losses
    cosines: jax.Array  # (K + 1, K + 1), running mean of those between all gradients
    gradient_norms: jax.Array  # (K + 1,), running means
    opt_state: optax.OptState  # with counters for each loss
    num_seen: jax.Array  # int32 (K + 1, K + 1), batches with both gradients
    num_batches: jax.Array  # int32 (K + 1,), batches with that loss


def softmax_alignment(
    downstream: str | int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    decay: float = 0.9,
) -> LossWeighting:
    r"""Softmax weights whose composite gradient turns to that of a downstream loss.

    The weights are those of YOTO and what they descend is the objective of GraP, the
    negative cosine between the composite gradient and the downstream gradient d,

    .. math::
      \lambda = \mathrm{Softmax}(\mu), \qquad
      H(\mu) = -\frac{\langle \sum_k \lambda_k g_k, d \rangle}
      {\|\sum_k \lambda_k g_k\| \, \|d\|},

    with running means of angles and lengths of gradients.

    Args:
      downstream: The loss that steers, with weight 0: its path or its index.
      optimizer: Steps on the logits; ``yoto_jax.adamw(0.02, hyperparameter_decay=0.1)``
        if none is given.
      decay: Decay of the running means, in [0, 1).

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian of all losses. Its
      weights are positive and sum to 1.

    Raises:
      ValueError: ``decay`` is out of its range. In ``init``: no single loss is called
        ``downstream``, or there is no other loss.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> losses = {"contrastive": 1.0, "label": 0.7, "next": 2.0}
      >>> weighting = yoto.weightings.softmax_alignment("label")
      >>> state, update = weighting.init(losses), jax.jit(weighting.update)
      >>> J = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])  # One gradient per row.
      >>> for _ in range(100):  # The gradient of "next" points along that of "label".
      ...     weights, state = update(losses, state, gramian=J @ J.T)
      >>> print({name: round(float(weight), 1) for name, weight in weights.items()})
      {'contrastive': 0.1, 'label': 0.0, 'next': 0.9}

    References:
      The combination is this library's. Sakaridis, `You Only Train Once
      <https://arxiv.org/abs/2506.04349>`_, 2025; Karpukhin and Savchenko, `When Losses
      Align: Gradient-Based Composite Loss Weighting for Efficient Pretraining
      <https://arxiv.org/abs/2605.07756>`_, 2026.

    .. warning::
      The start, and the prior, are equal weights of the losses as they come: bring
      losses of very different units to one scale first.
    """
    check_decay(decay=decay)
    tx = chosen(optimizer, adamw(0.02, hyperparameter_decay=0.1))

    def mean(old: jax.Array, x: jax.Array, count: jax.Array) -> jax.Array:
        """The plain mean of all batches until that is as long as the one with decay."""
        return running_mean(old, x, count, decay / (1 - decay), decay)

    def logits(spec: LossSpec) -> LossLogits:
        spec.check_others("softmax_alignment")
        _, others = spec.apart(downstream)
        zeros = [jnp.zeros((), spec.dtype)] * len(others)
        mu = init_loss_logits(zeros, None, epsilon=1.0)
        return jax.tree.map(lambda x: x.astype(spec.dtype), mu)

    def weights(mu: LossLogits, spec: LossSpec) -> jax.Array:
        _, others = spec.apart(downstream)
        values = spec.full(0.0).at[others].set(jnp.stack(loss_weights(mu)))
        if spec.present is None:
            return values
        return safe_divide(values, spec.sum(values))

    def init(spec: LossSpec) -> SoftmaxAlignmentState:
        mu: Any = logits(spec)
        n = spec.size
        return SoftmaxAlignmentState(
            mu,
            jnp.zeros((n, n), spec.dtype),
            spec.full(0.0),
            init_each(tx, mu),
            jnp.zeros((n, n), jnp.int32),
            jnp.zeros((n,), jnp.int32),
        )

    def update(
        losses: jax.Array,
        inner: SoftmaxAlignmentState,
        spec: LossSpec,
        *,
        gramian: jax.Array,
    ) -> tuple[jax.Array, SoftmaxAlignmentState]:
        del losses
        position, others = spec.apart(downstream)
        seen, norms = cosines(gramian)
        some = (norms > 0)[:, None] & (norms > 0)[None, :]
        angles = mean(inner.cosines, seen, inner.num_seen)
        angles = jnp.where(some, angles, inner.cosines)
        nu = mean(inner.gradient_norms, norms, inner.num_batches)

        def objective(mu: LossLogits) -> jax.Array:
            share = jnp.stack(loss_weights(mu)) * spec.of_present(nu)[others]
            share = safe_divide(share, jnp.sum(share))
            squared = dot(share, dot(angles[others][:, others], share))
            rounding = jnp.finfo(spec.dtype).eps
            length = jnp.sqrt(jnp.maximum(squared, rounding))
            return -dot(share, angles[others, position]) / length

        slope = jax.grad(objective)(inner.mu)
        moves = jnp.full((len(others),), norms[position] > 0)
        there = None
        if spec.present is not None:
            moves &= spec.present[others]
            there = [spec.present[k] for k in others]
        mu, opt_state = descend(
            tx, slope, inner.opt_state, inner.mu, moves, present=there
        )
        return weights(inner.mu, spec), SoftmaxAlignmentState(
            mu,
            angles,
            nu,
            opt_state,
            inner.num_seen + some.astype(jnp.int32),
            inner.num_batches + 1,
        )

    return make_weighting(
        init,
        update,
        needs=("gramian",),
        downstream=downstream,
        first_weights=lambda spec: weights(logits(spec), spec),
    )
