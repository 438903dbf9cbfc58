"""Dynamic weight average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_counts, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO


@serializable_state
class DwaState(NamedTuple):
    """What :func:`dwa` remembers of the losses."""

    window_sum: jax.Array  # (K,) sum over the window under way
    window_count: jax.Array  # int32 (K,), updates in it
    last_average: jax.Array  # (K,) average over the window before
    earlier_average: jax.Array  # (K,) and over the one before that
    num_windows: jax.Array  # int32 (K,), complete windows, counted up to 2


def dwa(*, temperature: float = 2.0, window: int = 1) -> LossWeighting:
    r"""More weight for the losses that fall more slowly: dynamic weight average.

    .. math::
      w_i = K\, \mathrm{Softmax}_i\!\left(\frac{r_i}{T}\right), \qquad
      r_i = \frac{\bar L_i(e-1)}{\bar L_i(e-2)},

    where :math:`\bar L_i(e)` is the average of a loss over the ``window`` updates
    number :math:`e`, an epoch in the paper. All weights are 1 in the first two windows.

    Args:
      temperature: T. The larger it is, the more even are the weights.
      window: Updates to average over. The paper takes those of one epoch; ratios of
        single batches are mostly noise.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses; its weights are positive
      and sum to K.

    Raises:
      ValueError: ``temperature`` or ``window`` is not positive. In ``update`` outside
        ``jit``: a loss is not positive. Inside ``jit`` such a batch leaves the weights
        and the averages as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.dwa()
      >>> state = weighting.init({"depth": 1.0, "camera": 2.0})
      >>> for depth, camera in [(1.0, 2.0), (0.5, 4.0), (0.4, 4.0)]:
      ...     losses = {"depth": depth, "camera": camera}
      ...     weights, state = weighting.update(losses, state)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 1.358, 'depth': 0.642}

    References:
      Liu, Johns and Davison, `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019, Eq. 7.
    """
    check_positive(temperature=temperature)
    check_counts(window=window)

    def init(spec: LossSpec) -> DwaState:
        zero = jnp.zeros((spec.size,), jnp.int32)
        return DwaState(
            window_sum=spec.full(0.0),
            window_count=zero,
            last_average=spec.full(1.0),
            earlier_average=spec.full(1.0),
            num_windows=zero.copy(),
        )

    def update(
        losses: jax.Array, inner: DwaState, spec: LossSpec
    ) -> tuple[jax.Array, DwaState]:
        ratios = inner.last_average / inner.earlier_average
        known = inner.num_windows >= 2
        ratios = jnp.where(known, jnp.minimum(ratios, LARGEST_RATIO), 1.0)
        softmax = spec.count * spec.softmax(ratios / temperature)
        weights = jnp.where(jnp.any(spec.of_present(known, False)), softmax, 1.0)

        total, count = inner.window_sum + losses, inner.window_count + 1
        done = count >= window
        average = total / count.astype(total.dtype)
        return weights, DwaState(
            window_sum=jnp.where(done, 0.0, total),
            window_count=jnp.where(done, 0, count),
            last_average=jnp.where(done, average, inner.last_average),
            earlier_average=jnp.where(done, inner.last_average, inner.earlier_average),
            num_windows=jnp.minimum(inner.num_windows + done.astype(jnp.int32), 2),
        )

    return make_weighting(init, update, positive=True)
