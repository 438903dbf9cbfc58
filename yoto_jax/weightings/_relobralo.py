"""Relative loss balancing with random lookback."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import as_key, check_fraction, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO, SMALLEST_LOSS


@serializable_state
class RelobraloState(NamedTuple):
    """What :func:`relobralo` remembers of the losses."""

    last_weights: jax.Array  # (K,)
    first_losses: jax.Array  # (K,)
    last_losses: jax.Array  # (K,)
    num_seen: jax.Array  # int32 (K,), updates, counted up to 2
    key: jax.Array  # typed key, split at every update


def relobralo(
    *,
    alpha: float = 0.999,
    beta: float = 0.999,
    temperature: float = 1.0,
    key: jax.Array | int = 0,
) -> LossWeighting:
    r"""Relative loss balancing with random lookback (ReLoBRaLo).

    .. math::
      b_i(t, t') &= K\, \mathrm{Softmax}_i\!\left(
        \frac{L_i(t)}{T L_i(t') + 10^{-12}} \right), \\
      w_i(t) &= \alpha \left[ \rho\, w_i(t-1) + (1 - \rho)\, b_i(t, 0) \right]
        + (1 - \alpha)\, b_i(t, t-1), \qquad \rho \sim \mathrm{Bernoulli}(\beta).

    A moving average of weights by recent progress, which now and then looks back to the
    first losses instead of its own past. One :math:`\rho` is drawn for all losses. All
    weights are 1 at update 0 and :math:`b(1, 0)` at update 1, as in the authors' code.

    Args:
      alpha: Decay of the moving average, in [0, 1].
      beta: Probability of keeping the moving average in place of the lookback, in
        [0, 1].
      temperature: T. The larger it is, the more even are the weights.
      key: A typed key, ``jax.random.key(...)``, or an integer seed.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses; its weights are positive
      and sum to K.

    Raises:
      TypeError: In ``init``: ``key`` is neither a typed key nor an integer.
      ValueError: ``alpha`` or ``beta`` is not in [0, 1], or ``temperature`` is not
        positive. In ``update`` outside ``jit``: a loss is not positive.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.relobralo()
      >>> state = weighting.init({"depth": 1.0, "camera": 1.0})
      >>> for losses in {"depth": 1.0, "camera": 2.0}, {"depth": 0.5, "camera": 2.0}:
      ...     weights, state = weighting.update(losses, state)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 1.245, 'depth': 0.755}

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep
      Learning <https://arxiv.org/abs/2110.09813>`_, 2021.

    .. warning::
      Both terms :math:`b` carry the factor K, and the past weights take part in the
      average; some well-known implementations drop one or the other.
    """
    check_fraction(alpha=alpha, beta=beta)
    check_positive(temperature=temperature)

    def init(spec: LossSpec) -> RelobraloState:
        return RelobraloState(
            last_weights=spec.full(1.0),
            first_losses=spec.full(1.0),
            last_losses=spec.full(1.0),
            num_seen=jnp.zeros((spec.size,), jnp.int32),
            key=jax.random.fold_in(as_key(key), 0),
        )

    def balance(losses: jax.Array, earlier: jax.Array, spec: LossSpec) -> jax.Array:
        ratios = jnp.minimum(
            losses / (temperature * earlier + SMALLEST_LOSS), LARGEST_RATIO
        )
        return spec.count * spec.softmax(ratios)

    def update(
        losses: jax.Array, inner: RelobraloState, spec: LossSpec
    ) -> tuple[jax.Array, RelobraloState]:
        key, draw = jax.random.split(inner.key)
        keep = jax.random.bernoulli(draw, jnp.asarray(beta, spec.dtype))
        is_first = inner.num_seen == 0
        first = jnp.where(is_first, losses, inner.first_losses)
        last = jnp.where(is_first, losses, inner.last_losses)
        past = jnp.where(keep, inner.last_weights, balance(losses, first, spec))
        decay = jnp.where(inner.num_seen == 1, 0.0, alpha)
        recent = balance(losses, last, spec)
        weights = decay * past + (1.0 - decay) * recent

        weights = jnp.where(is_first, 1.0, weights)
        return weights, RelobraloState(
            last_weights=weights,
            first_losses=first,
            last_losses=losses,
            num_seen=jnp.minimum(inner.num_seen + 1, 2),
            key=key,
        )

    return make_weighting(init, update, positive=True)
