"""VICReg on digits without labels; judged by a linear classifier of a few labels.

No loss knows a label. After the training, ridge regression on the features of a tenth
of the training images, which have labels, tells the classes of all others. It has a
closed form, so that methods which are steered follow it through a batch of held-out
images: fitted to one half of them, judged by the other.

With half the steps the score on other images is a point less, which are two of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import Losses, PyTree, Task
from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import (
    PERCENT,
    SEEDS,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
)
from benchmarks.tasks.pretraining import task as pretraining

STEPS = {"quick": 10, "cpu": 4000}
PUBLISHED = (1.0, 0.04)  # 25, 25 and 1
CLASSES = 10
LANES = 5
RIDGE = 1.0
_PIXELS = (8, 8, 1)
_SMALL = 1e-4


class Batch(NamedTuple):
    views: jax.Array  # [2 n, 8, 8, 1], the first views come first
    labels: jax.Array  # [n], for the downstream loss alone


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    return Problem(
        task=_task(STEPS[preset]),
        scores=functools.partial(splits.scores, _measure, _data()),
        unit=PERCENT,
        margin=1.0,
        validated_on="other digits, by a classifier of the same labels",
        bounds=((1e-2, 1e2), (1e-3, 1e1)),
        published=PUBLISHED,
    )


@functools.cache
def _data() -> splits.Data:
    images, labels = digits.pool()
    each = [digits.split(np.asarray(labels), seed) for seed in range(SEEDS)]
    pool = digits.Split(images[..., None], labels)
    return splits.Data(pool, splits.stacked(each))


def _task(steps: int) -> Task:
    primary, *auxiliary = pretraining.LOSSES
    return Task(
        name="pretraining",
        settings={"steps": steps, "batch": pretraining.DIGITS.batch},
        primary=primary,
        auxiliary=tuple(auxiliary),
        data=_data(),
        init=_init,
        draw=lambda data, key: _draw(data, data.rows.train, key),
        draw_held_out=lambda data, key: _draw(data, data.rows.validation, key),
        encode=lambda model, batch: _features(model, batch.views),
        losses=_losses,
        downstream=_downstream,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=steps,
        learning_rate=8e-3,  # of half, once and twice it what validates best
        weight_decay=0.0,
        lanes=LANES,
        of_seed=splits.of_seed,
    )


def _init(key: jax.Array) -> PyTree:
    made = pretraining.init_model(key, pretraining.DIGITS, _PIXELS, CLASSES)
    return {name: made[name] for name in ("encoder", "projector")}


def _draw(data: splits.Data, rows: jax.Array, key: jax.Array) -> Batch:
    """Two views each of images in these rows."""
    key_rows, key_views = jax.random.split(key)
    rows = splits.choose(rows, key_rows, pretraining.DIGITS.batch)
    twice = jnp.tile(data.pool.images[rows], (2, 1, 1, 1))
    views = pretraining.view(key_views, twice, pretraining.DIGITS.views)
    return Batch(views, data.pool.labels[rows])


def _features(model: PyTree, images: jax.Array) -> jax.Array:
    return pretraining.encode(model, images, pretraining.DIGITS.patch)


def _losses(model: PyTree, z: jax.Array, batch: Batch) -> Losses:
    del batch
    return pretraining.vicreg(model, z)


def _downstream(model: PyTree, z: jax.Array, batch: Batch) -> jax.Array:
    """The squared error of a classifier on the half of a batch that it has not seen."""
    del model
    first, second = jnp.split(jnp.split(z, 2)[0], 2)
    known, asked = jnp.split(batch.labels, 2)
    told = classify(first, known, second)
    return jnp.mean((told - jax.nn.one_hot(asked, CLASSES)) ** 2)


def classify(known: jax.Array, labels: jax.Array, z: jax.Array) -> jax.Array:
    """Scores of the classes, by ridge regression on standardised features.

    Args:
      known: Features [m, width] whose labels are known.
      labels: [m].
      z: Features [n, width].

    Returns:
      Scores [n, classes], near 1 for the class and near 0 for others.
    """
    mean, deviation = jnp.mean(known, axis=0), jnp.std(known, axis=0) + _SMALL
    x = (known - mean) / deviation
    truth = jax.nn.one_hot(labels, CLASSES)
    usual = jnp.mean(truth, axis=0)
    gram = x.T @ x / len(x) + RIDGE * jnp.eye(x.shape[1])
    weights = jnp.linalg.solve(gram, x.T @ (truth - usual) / len(x))
    return (z - mean) / deviation @ weights + usual


def labelled(rows: jax.Array) -> jax.Array:
    """Those of the rows to train on whose labels are known."""
    return rows[: round(pretraining.LABELLED * len(rows))]


def _measure(model: PyTree, own: splits.Data) -> dict[str, jax.Array]:
    """How many images in % the classifier of the few labels knows."""
    images, labels = own.pool
    z = _features(model, images)
    known = labelled(own.rows.train)
    predicted = jnp.argmax(classify(z[known], labels[known], z), axis=-1)
    right = 100.0 * (predicted == labels)
    return {
        TRAINING: jnp.mean(right[own.rows.train]),
        VALIDATION: jnp.mean(right[own.rows.validation]),
        TEST: jnp.mean(right[own.rows.test]),
    }
