"""MNIST-1D, half of it without labels: a classifier, and VICReg on all signals."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.data.mnist1d import CLASSES, LENGTH
from benchmarks.harness.training import Losses, PyTree, Task
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import PERCENT, Problem
from benchmarks.tasks.frontier.problems import signals
from benchmarks.tasks.frontier.problems.signals import Size

SIZES = {
    "quick": Size(train=300, validation=50, test=100, steps=10, batch=16),
    "cpu": Size(train=1000, validation=500, test=2000, steps=10_000, batch=32),
}
CHANNELS = (8, 16, 16)
LANES = 5
PUBLISHED = (25.0, 25.0, 1.0)

_SHIFT = 6  # points, at most, to either side
_SIZE = 0.2
_SLOPE = 0.4
_MARGIN = 1e-4


class Batch(NamedTuple):
    x: jax.Array  # [n, 40], a view each of signals with labels
    label: jax.Array  # [n]
    views: jax.Array  # [2, n, 40], two of each of other signals


class Features(NamedTuple):
    """Of the signals with labels [n, 64], and of both views of the others [2 n, 64]."""

    labelled: jax.Array
    views: jax.Array


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    size = SIZES[preset]
    return Problem(
        task=_task(size),
        scores=functools.partial(signals.scores, signals.signals(size)),
        unit=PERCENT,
        margin=1.0,
        validated_on="other signals of the same kind",
        bounds=((1e-2, 1e3), (1e-2, 1e3), (1e-3, 1e2)),
        published=PUBLISHED,
    )


def _task(size: Size) -> Task:
    return Task(
        name="mnist1d",
        settings={**size._asdict(), "labelled": size.train - _unlabelled(size)},
        primary="ce",
        auxiliary=("invariance", "variance", "covariance"),
        data=signals.signals(size),
        init=_init,
        draw=functools.partial(_draw, size.batch, _unlabelled(size)),
        draw_held_out=functools.partial(_draw_held_out, size.batch),
        encode=_encode,
        losses=_losses,
        downstream=_cross_entropy,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=size.steps,
        learning_rate=1.5e-2,  # of those tried what validates best
        weight_decay=1e-4,
        lanes=LANES,
        of_seed=splits.of_seed,
    )


def _init(key: jax.Array) -> PyTree:
    wide = signals.FEATURES
    heads = {"class": (CLASSES,), "expander": (wide, wide)}
    return signals.init_model(key, CHANNELS, **heads)


def _unlabelled(size: Size) -> int:
    """How many signals, the last ones of those to train on, have no label."""
    return size.train // 2


def _draw(n: int, unlabelled: int, data: splits.Data, key: jax.Array) -> Batch:
    """A batch of the signals with labels, and views of any."""
    return _batch(n, data, data.rows.train[:-unlabelled], data.rows.train, key)


def _draw_held_out(n: int, data: splits.Data, key: jax.Array) -> Batch:
    return _batch(n, data, data.rows.validation, data.rows.validation, key)


def _batch(
    n: int, data: splits.Data, labelled: jax.Array, others: jax.Array, key: jax.Array
) -> Batch:
    key_labelled, key_others, key_views = jax.random.split(key, 3)
    rows = splits.choose(labelled, key_labelled, n)
    twice = jnp.tile(splits.choose(others, key_others, n), 2)
    both = view(key_views, data.pool.x[jnp.concatenate([rows, twice])])
    return Batch(both[:n], data.pool.label[rows], both[n:].reshape(2, n, LENGTH))


def view(key: jax.Array, x: jax.Array) -> jax.Array:
    """Signals moved, scaled and sheared, each by its own amount."""
    key_shift, key_size, key_slope = jax.random.split(key, 3)
    n = len(x)
    shift = jax.random.randint(key_shift, (n, 1), -_SHIFT, _SHIFT + 1)
    columns = (jnp.arange(LENGTH)[None] - shift) % LENGTH
    size = 1 + _SIZE * jax.random.uniform(key_size, (n, 1), minval=-1, maxval=1)
    slope = _SLOPE * jax.random.uniform(key_slope, (n, 1), minval=-1, maxval=1)
    x = size * jnp.take_along_axis(x, columns, axis=1)
    return x + slope * jnp.linspace(-1, 1, LENGTH)[None]


def _encode(model: PyTree, batch: Batch) -> Features:
    encoder = model["encoder"]
    views = batch.views.reshape(-1, LENGTH)
    return Features(
        signals.features(encoder, batch.x), signals.features(encoder, views)
    )


def _losses(model: PyTree, z: Features, batch: Batch) -> Losses:
    a, b = jnp.split(signals.mlp(model["expander"], z.views), 2)
    return {
        "ce": _cross_entropy(model, z, batch),
        "invariance": jnp.mean((a - b) ** 2),
        "variance": (_variance(a) + _variance(b)) / 2,
        "covariance": _covariance(a) + _covariance(b),
    }


def _cross_entropy(model: PyTree, z: Features, batch: Batch) -> jax.Array:
    logits = signals.mlp(model["class"], z.labelled)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def _variance(z: jax.Array) -> jax.Array:
    """How far standard deviations are below 1."""
    deviation = jnp.sqrt(jnp.var(z, axis=0, ddof=1) + _MARGIN)
    return jnp.mean(jax.nn.relu(1 - deviation))


def _covariance(z: jax.Array) -> jax.Array:
    """Squared covariances of different features."""
    n, width = z.shape
    z = z - jnp.mean(z, axis=0, keepdims=True)
    covariance = z.T @ z / (n - 1)
    others = 1 - jnp.eye(width)
    return jnp.sum(others * covariance**2) / width
