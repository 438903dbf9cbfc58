"""Which batches have absurd losses: the rule of both ``skip_outliers``."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._checks import check_decay, check_hyperparameter, check_not_negative
from yoto_jax._losses import PyTree, check_structure, scalar_losses
from yoto_jax._numerics import running_mean
from yoto_jax._serialization import serializable_state


@serializable_state
class LossScales(NamedTuple):
    """What is known of the usual size of every loss."""

    means: jax.Array  # (K,) running means of the sizes of accepted losses
    num_seen: jax.Array  # int32 (K,), batches in them since their last restart
    streaks: jax.Array  # int32 (K,), batches in a row far above; negative: far below


@dataclasses.dataclass(frozen=True)
class OutlierRule:
    """Which batches are bad; shared by the weighting and the optimizer."""

    limit: Any
    decay: Any
    patience: Any
    positive: bool
    two_sided: bool
    floor: Any

    def __post_init__(self) -> None:
        check_hyperparameter("limit", self.limit, lambda x: x > 1, "be larger than 1")
        check_decay(decay=self.decay)
        check_not_negative(patience=self.patience, floor=self.floor)

    def init(self, count: int, dtype: Any) -> LossScales:
        """Nothing is known yet."""
        zeros = lambda dtype: jnp.zeros((count,), dtype)
        return LossScales(zeros(dtype), zeros(jnp.int32), zeros(jnp.int32))

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
        low = known & (sizes < means / self.limit)
        if not self.two_sided:
            low &= ~silent
        streaks = jnp.where(
            high,
            jnp.maximum(streaks, 0) + 1,
            jnp.where(low, jnp.minimum(streaks, 0) - 1, jnp.where(silent, streaks, 0)),
        )
        # What goes on for longer than patience is no outlier but another regime.
        strange = high | low
        restart = strange & (jnp.abs(streaks) > self.patience)
        blocked = (strange if self.two_sided else high) & ~restart
        ok = sound & ~jnp.any(blocked)

        usual = ok & ~strange & ~silent
        restart &= ok
        longer = running_mean(
            means, sizes, num_seen, self.decay / (1 - self.decay), self.decay
        ).astype(means.dtype)
        new = LossScales(
            jnp.where(restart, sizes, jnp.where(usual, longer, means)),
            jnp.where(
                restart, jnp.where(silent, 0, 1), num_seen + usual.astype(jnp.int32)
            ),
            jnp.where(restart, 0, jnp.where(sound, streaks, scales.streaks)),
        )
        return ok, new if present is None else choose(present, new, scales)


def loss_vector(losses: PyTree, structure: Any, scales: LossScales) -> jax.Array:
    """The losses as one vector, checked against those of ``init``."""
    _, leaves, given = scalar_losses(losses)
    check_structure(given, structure, "the loss weights")
    dtype = scales.means.dtype
    return lax.stop_gradient(jnp.stack([jnp.asarray(x, dtype) for x in leaves]))


def choose(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``ok`` else ``old``, leaf by leaf: no branch, no wait for the device.

    The old state is read in any case, so that the selection is free.
    """
    return jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, old)
