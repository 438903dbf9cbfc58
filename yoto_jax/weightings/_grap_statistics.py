"""What GraP measures of gradients, for :func:`grap` and :func:`grap_closed_form`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_decay, check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._numerics import running_mean
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import dot, safe_divide


@serializable_state
class GrapStatistics(NamedTuple):
    """Running means over batches; K counts the losses without the downstream one."""

    gradient_norms: jax.Array  # (K,), nu
    cosines: jax.Array  # (K, K), between the gradients, C
    alignments: jax.Array  # (K,), cosines with the downstream gradient, p
    encoder_gain: jax.Array  # scalar, norm of cotangent by norm of gradient, tau
    num_batches: jax.Array  # int32 (K, K), batches with both losses
    num_compared: jax.Array  # int32 (K,), of them with a downstream gradient
    num_observed: jax.Array  # int32 scalar, times that the encoder's gain was observed


class Batch(NamedTuple):
    """What there is in a batch."""

    aligned: jax.Array  # bool scalar, whether the downstream gradient is not zero
    there: jax.Array  # bool (K,), which of the losses are present


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How gradients are measured, and how weights of unit gradients become ours."""

    downstream: str | int
    gramian_decay: float
    norm_decay: float
    warmup: int

    def __post_init__(self) -> None:
        if not isinstance(self.downstream, str | int):
            raise TypeError(
                "downstream must be the path or the index of a loss, got "
                f"{self.downstream!r}."
            )
        check_decay(gramian_decay=self.gramian_decay, norm_decay=self.norm_decay)
        check_not_negative(warmup=self.warmup)

    def init(self, spec: LossSpec) -> GrapStatistics:
        """Nothing is known yet."""
        _, others = spec.apart(self.downstream)
        size = len(others)
        zeros = lambda *shape: jnp.zeros(shape, spec.dtype)
        return GrapStatistics(
            gradient_norms=zeros(size),
            cosines=zeros(size, size),
            alignments=zeros(size),
            encoder_gain=jnp.ones((), spec.dtype),
            num_batches=jnp.zeros((size, size), jnp.int32),
            num_compared=jnp.zeros((size,), jnp.int32),
            num_observed=jnp.zeros((), jnp.int32),
        )

    def measure(
        self, old: GrapStatistics, gramian: jax.Array, spec: LossSpec
    ) -> tuple[GrapStatistics, Batch]:
        """The running means with one more batch in them."""
        position, others = spec.apart(self.downstream)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        norm, own_norms = norms[position], norms[others]
        aligned = norm > 0
        there = jnp.full(own_norms.shape, True)
        if spec.present is not None:
            there = spec.present[others]
        both = there[:, None] & there[None, :]
        compared = aligned & there

        nu = running_mean(
            old.gradient_norms,
            own_norms,
            jnp.diagonal(old.num_batches),
            0,
            self.norm_decay,
        )
        nu = jnp.where(there, nu, old.gradient_norms)
        # A gradient far below its running mean counts as zero: it is rounding error.
        inverse = safe_divide(jnp.ones_like(nu), jnp.maximum(own_norms, 1e-8 * nu))
        cosines = gramian[others][:, others] * inverse[:, None] * inverse[None, :]
        alignments = safe_divide(gramian[others, position] * inverse, norm)
        cosines = self._mean(old.cosines, cosines, old.num_batches)
        alignments = self._mean(old.alignments, alignments, old.num_compared)
        statistics = old._replace(
            gradient_norms=nu,
            cosines=jnp.where(both, cosines, old.cosines),
            alignments=jnp.where(compared, alignments, old.alignments),
            num_batches=old.num_batches + both.astype(jnp.int32),
            num_compared=old.num_compared + compared.astype(jnp.int32),
        )
        return statistics, Batch(aligned, there)

    def _mean(self, old: jax.Array, x: jax.Array, count: jax.Array) -> jax.Array:
        return running_mean(old, x, count, self.warmup, self.gramian_decay)

    def loss_weights(
        self, w: jax.Array, statistics: GrapStatistics, spec: LossSpec
    ) -> jax.Array:
        """Weights of the raw losses, with 0 in the place of the downstream one."""
        _, others = spec.apart(self.downstream)
        weights = safe_divide(statistics.encoder_gain * w, statistics.gradient_norms)
        return spec.full(0.0).at[others].set(weights)

    def observe(
        self,
        inner: Any,
        spec: LossSpec,
        *,
        cotangent_norm: jax.Array,
        gradient_norm: jax.Array,
    ) -> Any:
        """A state whose running mean of the encoder's gain has one more step in it."""
        del spec
        old = inner.statistics
        ratio = cotangent_norm / jnp.maximum(gradient_norm, 1e-16)
        gain = running_mean(
            old.encoder_gain, ratio, old.num_observed, 0, self.norm_decay
        )
        # A step without weights, or without any path to the encoder, tells nothing.
        telling = (cotangent_norm > 0) & (gradient_norm > 0)
        statistics = old._replace(
            encoder_gain=jnp.where(telling, gain, old.encoder_gain),
            num_observed=old.num_observed + telling.astype(jnp.int32),
        )
        return inner._replace(statistics=statistics)


def to_ellipsoid(u: jax.Array, cosines: jax.Array) -> jax.Array:
    """Weights along u with w^T C w = 1; zeros if u is zero."""
    size = jnp.sum(u * jnp.where(u < 0, -1, 1))
    some = size > 0
    unit = safe_divide(u, size)  # Its squares neither under- nor overflow.
    # Gradients that cancel give 0 or less: the weights, or the raw weights' gradient,
    # would be infinite.
    rounding = jnp.finfo(u.dtype).eps
    length = jnp.sqrt(jnp.maximum(dot(unit, dot(cosines, unit)), rounding))
    return jnp.where(some, unit / jnp.where(some, length, 1), u)
