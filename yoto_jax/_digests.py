"""Digests of arrays that do not depend on where their parts lie."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def digests(leaves: dict[str, Any]) -> dict[str, str]:
    """A digest of 64 bits of the contents of every array, by name.

    Every word is mixed with its position in the array and the results are added modulo
    2^32. A sum has no order: the digest is the same however the array is sharded, over
    however many devices and processes, and it is formed where the array lies, in one
    pass over its memory. It finds every change of a single word; another accident goes
    unnoticed about once in 2^64. It is no protection against one who wants to deceive.

    Args:
      leaves: JAX or NumPy arrays of numbers; no typed random keys.

    Returns:
      Sixteen hexadecimal digits for each array.
    """
    sums = {
        name: _sums_on_device(leaf) if isinstance(leaf, jax.Array) else _sums(leaf)
        for name, leaf in leaves.items()
    }
    # The same on all devices, of any process.
    one = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
    here = jax.device_get({name: one(x) for name, x in sums.items()})
    return {name: "".join(f"{x:08x}" for x in pair) for name, pair in here.items()}


@jax.jit
def _sums_on_device(x: jax.Array) -> jax.Array:
    words = _words_on_device(x)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        # Wraps around, for arrays of more than 2^32 words.
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + index * np.uint32(stride) if size > 1 else place
    terms = _terms(words, place)
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in terms])


def _sums(x: Any) -> np.ndarray:
    words = _words(np.asarray(x))
    place = np.arange(words.size, dtype=np.uint64).astype(np.uint32)
    return np.stack([np.sum(x, dtype=np.uint32) for x in _terms(words, place)])


def _terms(words: Any, place: Any) -> tuple[Any, Any]:
    """For each place a one-to-one map of words, and the same with odd factors."""
    place = place * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15)
    mixed = words ^ place
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # those of Murmur3
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return mixed, mixed * (place | np.uint32(1))


def _words_on_device(x: jax.Array) -> jax.Array:
    """The bits of an array as words, those of a wide entry on a new last axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = min(_bits(x.dtype), 32)
    unsigned = getattr(jnp, f"uint{bits}")
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _words(x: np.ndarray) -> np.ndarray:
    """The same words of an array on the host, in the same order."""
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype.itemsize >= 4:
        return x.view(np.uint32)
    words = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    if x.dtype == np.bool_:
        return words
    return words & np.uint32(2 ** _bits(x.dtype) - 1)  # Four bits come in a byte.


@functools.cache
def _bits(dtype: Any) -> int:
    information = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return information(dtype).bits
