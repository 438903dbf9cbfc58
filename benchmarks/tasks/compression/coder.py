"""A range coder for what the model of the compression benchmark has to say.

Symbols are integers, each with one of 64 tables of probabilities: logistic
distributions of geometrically spaced scales, computed once in float64.
"""

import functools
import math
from typing import Any, NamedTuple

import constriction
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.compression import task
from benchmarks.tasks.compression.task import (
    BLOCK,
    LARGEST,
    SMALLEST,
    Params,
    Statistics,
)

LEVELS = np.geomspace(SMALLEST, LARGEST, 64)
TAIL = 16  # scales that a table reaches to either side; the rest escapes


def reach(level: int) -> int:
    return math.ceil(TAIL * LEVELS[level]) + 1


@functools.cache
def table(level: int) -> np.ndarray:
    """Probabilities of -reach, ..., reach, and of the escape, in float64."""
    reached = reach(level)
    edges = (np.arange(-reached, reached + 2) - 0.5) / LEVELS[level]
    below = 1 / (1 + np.exp(-np.minimum(edges, -edges)))  # the smaller side, exactly
    inside = np.where(edges[1:] <= 0, np.diff(below), -np.diff(below))
    inside[reached] = 1 - 2 * below[reached]
    return np.append(inside, 2 * below[0])


@functools.cache
def _model(level: int) -> Any:
    return constriction.stream.model.Categorical(table(level), perfect=False)


def level_of(scale: np.ndarray) -> np.ndarray:
    """The nearest level, by logarithm."""
    position = np.log(scale.astype(np.float64) / SMALLEST) / math.log(
        LARGEST / SMALLEST
    )
    last = len(LEVELS) - 1
    return np.clip(np.round(last * position), 0, last).astype(np.int32)


_BIT = constriction.stream.model.Uniform(2)


def encode_symbols(encoder: Any, symbols: np.ndarray, levels: np.ndarray) -> None:
    """Append integers [m], with the table of each, to a range coder."""
    for level in np.unique(levels):
        these, reached = symbols[levels == level].astype(np.int64), reach(level)
        escaped = np.abs(these) > reached
        entries = np.where(escaped, 2 * reached + 1, these + reached)
        encoder.encode(entries.astype(np.int32), _model(level))
        for symbol in these[escaped]:
            encoder.encode(_golomb(int(symbol), reached), _BIT)


def decode_symbols(decoder: Any, levels: np.ndarray) -> np.ndarray:
    symbols = np.zeros(len(levels), np.int64)
    for level in np.unique(levels):
        where, reached = np.flatnonzero(levels == level), reach(level)
        entries = decoder.decode(_model(level), len(where)).astype(np.int64)
        symbols[where] = entries - reached
        for i in where[entries == 2 * reached + 1]:
            symbols[i] = _ungolomb(decoder, reached)
    return symbols


def _golomb(symbol: int, reached: int) -> np.ndarray:
    """Sign and Elias' gamma code of what goes beyond the table."""
    beyond = abs(symbol) - reached
    digits = f"{beyond:b}"
    text = f"{int(symbol < 0)}{'0' * (len(digits) - 1)}{digits}"
    return np.array(list(text), np.int32)


def _ungolomb(decoder: Any, reached: int) -> int:
    negative = decoder.decode(_BIT)
    zeros = 0
    while not decoder.decode(_BIT):
        zeros += 1
    beyond = 1
    for _ in range(zeros):
        beyond = 2 * beyond + int(decoder.decode(_BIT))
    return (-1 if negative else 1) * (reached + beyond)


def quantize(
    difference: np.ndarray, scale: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """The nearest integers, or the next towards 0 where the bits saved are worth it."""
    nearest = np.round(difference)
    smaller = nearest - np.sign(nearest)

    def cost(symbols: np.ndarray) -> np.ndarray:
        rate = np.asarray(task.bits(symbols, scale))
        return rate + penalty * (difference - symbols) ** 2

    return np.where(cost(smaller) < cost(nearest), smaller, nearest).astype(np.int32)


class Coded(NamedTuple):
    data: bytes  # all images in one stream
    entropy: float  # bits that the entropy model estimates
    images: np.ndarray  # uint8, as the decoder sees them


class _Encoding:
    """Turns codes into symbols, and into bytes."""

    def __init__(self, code: np.ndarray, penalty: np.ndarray) -> None:
        self.code, self.penalty = code, penalty
        self.encoder = constriction.stream.queue.RangeEncoder()
        self.entropy = 0.0

    def __call__(self, where: Any, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Encode a part of the code; returns what the decoder will have there."""
        penalty = np.broadcast_to(self.penalty, self.code.shape)[where]
        symbols = quantize(self.code[where] - mean, scale, penalty)
        self.entropy += float(np.sum(task.bits(symbols.astype(np.float32), scale)))
        encode_symbols(self.encoder, symbols.ravel(), level_of(scale).ravel())
        return symbols.astype(np.float32) + mean


class _Decoding:
    """Turns bytes into codes."""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data, np.uint32)
        self.decoder = constriction.stream.queue.RangeDecoder(words)

    def __call__(self, where: Any, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        symbols = decode_symbols(self.decoder, level_of(scale).ravel())
        return symbols.reshape(mean.shape).astype(np.float32) + mean


class Codec:
    """Encoder and decoder of models of one kind, for images of one shape.

    Both sides call the same compiled functions on the same numbers, so that they agree
    to the last bit on one machine. On another, means might differ by a rounding.
    """

    def __init__(self, stats: Statistics) -> None:
        self._channels = len(stats.deviation)
        weigh = lambda params, weight, x: task.condition(
            params, jnp.full(len(x), weight)
        )

        def into(params: Params, weight: Any, images: jax.Array) -> Any:
            c = weigh(params, weight, images)
            return task.analysis(params, stats, c, images), task.penalty(c)

        def back(params: Params, weight: Any, code: jax.Array) -> jax.Array:
            images = task.synthesis(params, stats, weigh(params, weight, code), code)
            return jnp.round(jnp.clip(images, 0, 255)).astype(jnp.uint8)

        def predict(params: Params, weight: Any, known: jax.Array, p: int) -> Any:
            return task.predict(params, stats, weigh(params, weight, known), known, p)

        self._into, self._back = jax.jit(into), jax.jit(back)
        self._predict = jax.jit(predict, static_argnames="p")
        self._unit = jax.jit(
            lambda params, weight: task.unit(stats, weigh(params, weight, [0]))
        )

    def encode(
        self, params: Params, weight: float, images: np.ndarray
    ) -> tuple[bytes, float, np.ndarray]:
        """Bytes, bits by the entropy model, and the code as the decoder will see it."""
        exact = np.float32(weight)
        found = self._into(params, exact, images.astype(np.float32))
        encoding = _Encoding(*map(np.asarray, found))
        code = self._walk(params, exact, encoding.code.shape, encoding)
        return encoding.encoder.get_compressed().tobytes(), encoding.entropy, code

    def decode(
        self, params: Params, weight: float, data: bytes, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The code and the images, uint8, from bytes and the shape of the images."""
        n, h, w = shape[:3]
        of_code = (n, h // BLOCK, w // BLOCK, self._channels)
        code = self._walk(params, np.float32(weight), of_code, _Decoding(data))
        return code, self.reconstruct(params, weight, code)

    def reconstruct(
        self, params: Params, weight: float, code: np.ndarray
    ) -> np.ndarray:
        return np.asarray(self._back(params, np.float32(weight), code))

    def _walk(
        self, params: Params, weight: Any, shape: tuple[int, ...], visit: Any
    ) -> np.ndarray:
        """Fill in a code part by part, in the order that both sides keep to.

        Args:
          params: Of the model.
          weight: Of the distortion.
          shape: Of the code.
          visit: Called with an index into the code and the means and scales of this
            part, returns the part.
        """
        n, h, w, channels = shape
        (_, first), *rest = task.groups(channels)
        code = np.zeros(shape, np.float32)
        # Pass 0 goes block by block. In units, beside what tells blocks from borders:
        near = np.zeros((n, h + 1, w + 2, first + 1), np.float32)
        unit = np.asarray(self._unit(params, weight))[0, 0, 0, :first]
        for i, j in np.ndindex(h, w):
            known = [near[:, i + y, j + x] for y, x in task.BEFORE]
            known = np.concatenate(known, axis=-1)[:, None, None]
            mean, scale = map(np.asarray, self._predict(params, weight, known, 0))
            where = np.s_[:, i, j, :first]
            code[where] = visit(where, mean[:, 0, 0], scale[:, 0, 0])
            near[:, i + 1, j + 1] = np.insert(code[where] / unit, first, 1, axis=-1)
        for p, (start, stop) in enumerate(rest, start=1):
            mean, scale = map(np.asarray, self._predict(params, weight, code, p))
            where = np.s_[..., start:stop]
            code[where] = visit(where, mean, scale)
        return code


def compress(codec: Codec, params: Params, weight: float, images: np.ndarray) -> Coded:
    """Encode, decode, and check that the decoder sees what the encoder saw."""
    data, entropy, code = codec.encode(params, weight, images)
    decoded, reconstructed = codec.decode(params, weight, data, images.shape)
    if not np.array_equal(decoded, code):
        raise RuntimeError("the decoder lost track of the encoder")
    if not np.array_equal(reconstructed, codec.reconstruct(params, weight, code)):
        raise RuntimeError("the decoder's images are not the encoder's")
    return Coded(data, entropy, reconstructed)
