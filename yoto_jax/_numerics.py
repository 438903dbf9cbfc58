"""Dtypes, stacking, sums and softmax of a few numbers."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._losses import PyTree

_UNROLL = 9
"""Vectors of up to this many losses are computed entry by entry.

XLA fuses elementwise operations into one kernel but starts a new kernel at every
reduction and concatenation. With few losses, sums written out save those kernels, of
which the step of a small model consists.
"""


def upcast(x: jax.Array) -> jax.Array:
    """Casts to float32; float64 stays."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def float_type(values: Iterable[Any]) -> Any:
    """float64 if one of the values (numbers, arrays, dtypes) is, else float32.

    Python numbers are weakly typed: they count only if all values are such.
    """
    values = list(values)
    typed = [x for x in values if type(x) not in (bool, int, float)]
    wide = jnp.float64 in map(jax.dtypes.result_type, typed or values)
    return jnp.float64 if wide else jnp.float32


def stack(entries: Sequence[jax.Array]) -> jax.Array:
    """Stacks arrays on a new last axis, by fusible selections if they are few."""
    if len(entries) > _UNROLL:
        return jnp.stack(entries, axis=-1)
    shape = (*entries[0].shape, len(entries))
    positions = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    stacked = jnp.broadcast_to(entries[-1][..., None], shape)
    for position in reversed(range(len(entries) - 1)):
        entry = entries[position][..., None]
        stacked = jnp.where(positions == position, entry, stacked)
    return stacked


def sum_of_products(x: jax.Array, y: Sequence[jax.Array]) -> jax.Array:
    """Sum of ``x[..., k] * y[k]``, written out for a few terms."""
    if len(y) > _UNROLL:
        return jnp.sum(x * stack(y), axis=-1)
    terms = (x[..., k] * entry for k, entry in enumerate(y))
    return sum(terms, jnp.zeros(x.shape[:-1], x.dtype))


def unstack(x: jax.Array) -> list[jax.Array]:
    """The entries along the last axis."""
    return [x[..., k] for k in range(x.shape[-1])]


# Arithmetic on logits. The primary loss comes first in these functions, wherever it
# stands in the tree: its constant logit 0 is put in front of the learned ones.


@jax.custom_jvp
def _softmax(logits: jax.Array) -> jax.Array:
    if logits.shape[-1] > _UNROLL:
        most = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(jnp.where(logits == most, 0.0, logits - most))
        return powers / jnp.sum(powers, axis=-1, keepdims=True)
    # 1 / sum_j exp(x_j - x_i) needs neither a maximum nor a common denominator. An
    # exponential that overflows leaves the weight 0, as it should; infinite logits
    # must not meet as inf - inf.
    entries = [entry[..., None] for entry in unstack(logits)]
    ratios = [jnp.where(x == logits, 1.0, jnp.exp(x - logits)) for x in entries]
    return 1.0 / sum(ratios[1:], ratios[0])


@_softmax.defjvp
def _softmax_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (tangent,) = tangents
    weights = _softmax(*primals)
    return weights, weights * (
        tangent - jnp.sum(weights * tangent, axis=-1, keepdims=True)
    )


def with_primary(learned: jax.Array, has_primary: bool) -> jax.Array:
    """The learned logits, with the primary loss's constant 0 in front."""
    if not has_primary:
        return learned
    zero = jnp.zeros(learned.shape[:-1], learned.dtype)
    return stack([zero, *unstack(learned)])


def softmax(
    learned: jax.Array, has_primary: bool, present: jax.Array | None = None
) -> jax.Array:
    """Loss weights on the last axis, the primary loss (if there is one) first.

    ``present``, in the same order, tells which losses share the weight.
    """
    logits = with_primary(learned, has_primary)
    if present is None:
        return _softmax(logits)
    return jnp.where(present, _softmax(jnp.where(present, logits, -jnp.inf)), 0)


def where_rows(chosen: jax.Array, x: jax.Array, y: Any) -> jax.Array:
    """Selects row k of ``x`` if entry k is chosen, else that of ``y``."""
    return jnp.where(chosen.reshape(chosen.shape + (1,) * (x.ndim - 1)), x, y)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether all floating-point numbers of a tree are finite."""
    leaves = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, leaves, jnp.asarray(True))


def running_mean(
    mean: jax.Array, x: jax.Array, count: jax.Array, warmup: Any, decay: Any
) -> jax.Array:
    """Updates a running mean: plain during the warmup, exponential afterwards."""
    number, decay = count.astype(x.dtype), jnp.asarray(decay, x.dtype)
    early = (count == 0) | (number < warmup)
    return jnp.where(
        early, (mean * number + x) / (number + 1), decay * mean + (1 - decay) * x
    )


def unbiased_mean(
    mean: jax.Array, x: jax.Array, count: jax.Array, decay: Any
) -> jax.Array:
    """Updates an exponential running mean from 0, divided by the sum of its weights."""
    rate = 1 - decay
    # 1 - decay^n, exact also where the decay is nearly 1.
    rate /= -jnp.expm1((count.astype(x.dtype) + 1) * jnp.log1p(-rate))
    # Not of their difference, in which a mean is lost that is far below the last one.
    return (1 - rate) * mean + rate * x


def stacked(tree: PyTree) -> jax.Array:
    return jnp.stack([upcast(jnp.asarray(x)) for x in jax.tree.leaves(tree)])


def select(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``ok`` else ``old``, leaf by leaf: no branch, no wait for the device.

    The old state is read in any case, so that the selection is free.
    """
    return jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, old)
