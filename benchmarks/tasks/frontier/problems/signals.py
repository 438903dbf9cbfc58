"""What the problems on MNIST-1D share: signals, splits of them, an encoder."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import mnist1d
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import TEST, TRAINING, VALIDATION, Scores

PyTree = Any

FEATURES = 64
_POOL_SEED = 0
_WIDTH, _STRIDE = 5, 2
CHANNELS = (16, 32, 32)
"""Of the convolutions, where a problem does not choose its own."""


class Size(NamedTuple):
    """How many signals there are, and how long they are trained on."""

    train: int
    validation: int
    test: int
    steps: int
    batch: int


@functools.cache
def signals(size: Size) -> splits.Data:
    """Signals as arrays of JAX, and the rows of every seed."""
    total = size.train + size.validation + size.test
    pool = jax.tree.map(jnp.asarray, mnist1d.generate(total, _POOL_SEED))
    return splits.Data(pool, splits.random(total, size.validation, size.test))


def init_encoder(key: jax.Array, channels: tuple[int, ...]) -> PyTree:
    """Convolutions that halve the signal each, and a layer over the rest."""
    *keys, last = jax.random.split(key, 1 + len(channels))
    convolutions = [
        init_layer(k, _WIDTH * a, b)
        for k, (a, b) in zip(keys, itertools.pairwise((1, *channels)), strict=True)
    ]
    points = mnist1d.LENGTH // _STRIDE ** len(channels)
    dense = init_layer(last, points * channels[-1], FEATURES)
    return {"convolutions": convolutions, "dense": dense}


def init_layer(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    weights = jax.nn.initializers.he_normal()(key, (inputs, outputs))
    return {"w": weights, "b": jnp.zeros((1, outputs))}


def init_mlp(key: jax.Array, *widths: int) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    pairs = itertools.pairwise(widths)
    return [init_layer(k, *pair) for k, pair in zip(keys, pairs, strict=True)]


def linear(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(linear(layer, x))
    return linear(layers[-1], x)


def features(encoder: PyTree, x: jax.Array) -> jax.Array:
    """Features [n, 64] of signals [n, 40]."""
    z = x[..., None]
    for layer in encoder["convolutions"]:
        z = _convolved(layer, z)
    return jax.nn.relu(linear(encoder["dense"], z.reshape(len(z), -1)))


def _convolved(layer: dict[str, jax.Array], z: jax.Array) -> jax.Array:
    """A convolution as one product of matrices: quick side by side with others."""
    n, length, channels = z.shape
    padded = jnp.pad(z, ((0, 0), (_WIDTH // 2, _WIDTH // 2), (0, 0)))
    starts = np.arange(0, length, _STRIDE)
    windows = padded[:, starts[:, None] + np.arange(_WIDTH)[None]]
    flat = windows.reshape(n * len(starts), _WIDTH * channels)
    return jax.nn.relu(linear(layer, flat)).reshape(n, len(starts), -1)


def init_model(
    key: jax.Array, channels: tuple[int, ...], **heads: tuple[int, ...]
) -> PyTree:
    """An encoder with these channels, and heads of these widths over its features."""
    key_encoder, *keys = jax.random.split(key, 1 + len(heads))
    made = {
        name: init_mlp(k, FEATURES, *widths)
        for k, (name, widths) in zip(keys, heads.items(), strict=True)
    }
    return {"encoder": init_encoder(key_encoder, channels), **made}


def classify(model: PyTree, x: jax.Array) -> jax.Array:
    """Logits [n, 10] of the head ``class``."""
    return mlp(model["class"], features(model["encoder"], x))


def scores(data: splits.Data, models: PyTree, seeds: jax.Array) -> Scores:
    """Accuracy in % on signals trained on, most without a label, and on others."""
    x, labels = data.pool.x, data.pool.label
    parts = {
        TRAINING: data.rows.train,
        VALIDATION: data.rows.validation,
        TEST: data.rows.test,
    }
    return {
        name: splits.accuracy(classify, models, x, labels, rows, seeds)
        for name, rows in parts.items()
    }
