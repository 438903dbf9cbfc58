"""The rule for batches with outlying losses, of both ``skip_outliers``."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_flag, check_hyperparameter, check_not_negative
from yoto_jax._numerics import running_mean, select
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import of_inner

_DECAY = 0.99
"""The running means remember about a hundred batches."""


@serializable_state
class LossScales(NamedTuple):
    """Running statistics of the size of every loss."""

    means: jax.Array  # (K,) running means of the sizes of accepted losses
    num_seen: jax.Array  # int32 (K,), batches in them since their last restart
    streaks: jax.Array  # int32 (K,), batches in a row far above; negative: far below


Columns = tuple[dict[str, optax.EmptyState], ...]  # Of one name each, in order.


@serializable_state
class SkipOutliersState(NamedTuple):
    """State of :func:`skip_outliers`, of an optimizer or of a weighting."""

    num_skipped: jax.Array  # int32 scalar, bad batches: absurd or not finite
    accepted: jax.Array  # bool scalar, whether the last batch was good
    loss_scales: LossScales
    inner: Any
    columns: Columns = ()  # no arrays: names of the losses, if they are known

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")

    @property
    def names(self) -> list[str]:
        """Of the losses, in order; empty if they are not known."""
        return [name for one in self.columns for name in one]


@dataclasses.dataclass(frozen=True)
class OutlierRule:
    r"""Which batches are bad: one rule for an optimizer and for a weighting.

    A batch is bad if a loss is not finite, or if for any loss

    .. math::
      |L_k| > \mathtt{limit} \cdot m_k,

    with :math:`m_k` the running mean of :math:`|L_k|` over the batches accepted so far:
    the plain mean of the first hundred, then one with decay 0.99.

    Args:
      limit: How many times larger than usual a loss may be (larger than 1, no unit).
      patience: How many finite batches in a row may be bad because of the same loss.
        The next such batch is accepted, and the running mean of that loss restarts
        from it, since the losses have changed for good. A loss far *below* its mean
        never makes a batch bad; its mean restarts after as many batches.
      positive: Whether every loss must be positive. A batch with a loss of 0 or less is
        then bad, however many follow each other, like a batch that is not finite.
      floor: Smallest size that counts, in the unit of the losses. Smaller losses are
        taken as this size, so that variation near zero does not make a batch bad.

    Raises:
      ValueError: ``limit`` is not larger than 1, or ``patience`` or ``floor`` is
        negative.

    Examples:
      >>> import optax, yoto_jax as yoto
      >>> rule = yoto.OutlierRule(limit=100.0, positive=True)
      >>> tx = yoto.skip_outliers(optax.adam(1e-3), rule, losses=2)
      >>> weighting = yoto.weightings.skip_outliers(yoto.weightings.famo(), rule)

    .. warning::
      Correct batches with rare losses above ``limit`` times the mean are skipped too.
      Watch ``num_skipped``, and raise ``limit`` if it grows although data and code are
      right: 1e6 still catches overflows. The guide to long runs lists what the rule
      cannot detect.
    """

    limit: jax.typing.ArrayLike = 1e3
    _: dataclasses.KW_ONLY
    patience: jax.typing.ArrayLike = 10
    positive: bool = False
    floor: jax.typing.ArrayLike = 1e-6

    def __post_init__(self) -> None:
        check_hyperparameter("limit", self.limit, lambda x: x > 1, "be larger than 1")
        check_not_negative(patience=self.patience, floor=self.floor)
        check_flag(positive=self.positive)

    def init(
        self, count: int, dtype: Any, inner: Any, names: Sequence[str] = ()
    ) -> SkipOutliersState:
        """The state of a wrapper: nothing is known of ``count`` losses yet."""
        zeros = lambda dtype: jnp.zeros((count,), dtype)
        scales = LossScales(zeros(dtype), zeros(jnp.int32), zeros(jnp.int32))
        return SkipOutliersState(
            jnp.zeros((), jnp.int32),
            jnp.ones((), jnp.bool_),
            scales,
            inner,
            tuple({name: optax.EmptyState()} for name in names),
        )

    def step(
        self,
        state: SkipOutliersState,
        losses: jax.Array,
        sound: Any = True,
        present: jax.Array | None = None,
    ) -> SkipOutliersState:
        """The state after a batch, but for what is inside; see :meth:`judge`."""
        ok, scales = self.judge(losses, state.loss_scales, sound, present)
        skipped = state.num_skipped + (~ok).astype(jnp.int32)
        return state._replace(num_skipped=skipped, accepted=ok, loss_scales=scales)

    def judge(
        self,
        losses: jax.Array,
        scales: LossScales,
        sound: Any = True,
        present: jax.Array | None = None,
    ) -> tuple[jax.Array, LossScales]:
        """Whether a batch is good, and what is known after it.

        Args:
          losses: (K,) the losses of the batch.
          scales: What was known before.
          sound: Whether all else that the batch brought is finite.
          present: (K,) which losses there are, all if not given.

        Returns:
          A boolean, and the new scales.
        """
        if present is not None:
            losses = jnp.where(present, losses, 1)
        sound &= jnp.all(jnp.isfinite(losses))
        if self.positive:
            sound &= jnp.all(losses > 0)
        means, num_seen, streaks = scales
        # A loss of exactly 0 tells nothing of the usual size: a hinge loss is often 0.
        silent = losses == 0
        sizes = jnp.maximum(jnp.abs(losses), self.floor)
        known = num_seen > 0 if present is None else (num_seen > 0) & present
        high = known & (sizes / self.limit > means)  # the product might overflow
        low = known & (sizes < means / self.limit) & ~silent
        streaks = jnp.where(
            high,
            jnp.maximum(streaks, 0) + 1,
            jnp.where(low, jnp.minimum(streaks, 0) - 1, jnp.where(silent, streaks, 0)),
        )
        # What goes on for longer than patience is no outlier but another regime.
        strange = high | low
        restart = strange & (jnp.abs(streaks) > self.patience)
        ok = sound & ~jnp.any(high & ~restart)

        usual = ok & ~strange & ~silent
        restart &= ok
        longer = running_mean(means, sizes, num_seen, _DECAY / (1 - _DECAY), _DECAY)
        longer = longer.astype(means.dtype)
        new = LossScales(
            jnp.where(restart, sizes, jnp.where(usual, longer, means)),
            jnp.where(restart, 1, num_seen + usual.astype(jnp.int32)),
            jnp.where(restart, 0, jnp.where(sound, streaks, scales.streaks)),
        )
        return ok, new if present is None else select(present, new, scales)


def as_rule(rule: OutlierRule | None) -> OutlierRule:
    """The rule, or the default one; anything else, such as a bare limit, is refused."""
    if rule is None:
        return OutlierRule()
    if not isinstance(rule, OutlierRule):
        raise TypeError(
            "rule must be an OutlierRule, such as yoto.OutlierRule(limit=100.0), got "
            f"{rule!r}."
        )
    return rule
