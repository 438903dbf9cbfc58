"""Small scenes, segmented by day; tested by night, in fog, rain and snow.

The losses and the shift of the segmentation task. Images are small, and boxes, balls
and poles one class, so that training levels off at a price that anybody can pay: twice
the steps change the score on other scenes of the training domain by half a point at
most. On the scenes trained on it still rises by one or two: they are learned by heart.

It does not separate the weights of its box: the points that validate best and worst are
no two points apart in the test. Without invariance, or with little else, much is lost.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.data import scenes
from benchmarks.harness.training import PyTree
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import (
    MEAN_IOU,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
)
from benchmarks.tasks.frontier.problems import small_scenes
from benchmarks.tasks.frontier.problems.small_scenes import Size
from benchmarks.tasks.segmentation import metrics
from benchmarks.tasks.segmentation import task as segmentation
from benchmarks.tasks.segmentation.task import Images

CLASSES = ("sky", "ground", "building", "object")
SIZES = {
    "quick": Size(8, 12, 80, 32, 16, 16, steps=10, batch=4, features=8, blocks=1),
    "cpu": Size(
        16, 24, 2048, 512, 256, 256, steps=3000, batch=8, features=32, blocks=1
    ),
}
_POOL_KEY = 17
_STYLE_KEY = 18


class Pool(NamedTuple):
    """Scenes by day, and the same in every target condition."""

    day: Images
    conditions: jax.Array  # [conditions, n, h, w, 3]


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    size = SIZES[preset]
    net = segmentation.SegmentationNet(size.features, size.blocks, len(CLASSES))
    return problem(
        segmentation.Model(net, void=None),
        size.batch,
        _data(size),
        validated_on="other scenes, by day and in styles as in training",
        name="segmentation",
        settings=size._asdict(),
        steps=size.steps,
        learning_rate=2e-2,  # of 0.005, 0.01 and 0.02 what validates best
    )


def problem(
    model: segmentation.Model,
    batch: int,
    data: splits.Data,
    validated_on: str,
    **own: Any,
) -> Problem:
    """By day, and the same in every target condition.

    Args:
      model: The network, which knows the classes.
      batch: Images of a batch.
      data: A :class:`Pool`, and the rows of all seeds.
      validated_on: In words.
      **own: What else a :class:`Task` has.
    """
    task = small_scenes.task(
        batch,
        data,
        model,
        _draw,
        _labelled,
        data.pool.day.images[:1],
        primary=segmentation.PRIMARY,
        auxiliary=segmentation.AUXILIARY,
        weight_decay=segmentation.WEIGHT_DECAY,
        **own,
    )
    measure = functools.partial(_measure, model)
    return Problem(
        task=task,
        scores=functools.partial(splits.scores, measure, data),
        unit=MEAN_IOU,
        margin=1.0,
        validated_on=validated_on,
        bounds=((1e-2, 1e2),),
    )


@functools.cache
def _data(size: Size) -> splits.Data:
    made = scenes.render(
        jax.random.key(_POOL_KEY),
        size.pool,
        scenes.DOMAINS["train"],
        size.height,
        size.width,
    )
    labels = jnp.minimum(made.labels, len(CLASSES) - 1)
    pool = in_conditions(Images(made.images, labels), made.depth)
    return splits.Data(pool, small_scenes.rows(size))


def in_conditions(day: Images, depth: jax.Array | None = None) -> Pool:
    """The images by day, and in every target condition."""
    key = jax.random.key(_STYLE_KEY)
    shifted = segmentation.conditioned(key, day.images, depth)
    return Pool(day, jnp.stack([shifted[name] for name in segmentation.UNSEEN]))


def _labelled(data: splits.Data) -> jax.Array:
    """One half of the training scenes: the other has no labels."""
    return jnp.split(data.rows.train, 2)[0]


def _lent(data: splits.Data) -> jax.Array:
    """The other half, which is seen in the target conditions alone."""
    return jnp.split(data.rows.train, 2)[1]


def _draw(
    n: int, data: splits.Data, rows: jax.Array, key: jax.Array
) -> segmentation.Batch:
    """A batch of these rows, in the styles of scenes that have no labels."""
    key_rows, key_target, *keys = jax.random.split(key, 4)
    chosen = splits.choose(rows, key_rows, n)
    images = jax.tree.map(lambda x: x[chosen], data.pool.day)
    return segmentation.views(images, _targets(data, n, key_target), *keys)


def _targets(data: splits.Data, n: int, key: jax.Array) -> jax.Array:
    """Images in target conditions, any of the lent ones in any condition."""
    key_rows, key_condition = jax.random.split(key)
    rows = splits.choose(_lent(data), key_rows, n)
    conditions = data.pool.conditions
    return conditions[jax.random.randint(key_condition, (n,), 0, len(conditions)), rows]


def _measure(
    model: segmentation.Model, params: PyTree, own: splits.Data
) -> dict[str, jax.Array]:
    """Mean IoU by day and in styles as in training, and its mean over conditions."""
    day, conditions = own.pool

    def score(images: jax.Array, rows: jax.Array) -> jax.Array:
        return _mean_iou(model, params, images[rows], day.labels[rows])

    def seen(rows: jax.Array) -> jax.Array:
        key_target, key_style = jax.random.split(jax.random.key(_STYLE_KEY))
        targets = _targets(own, len(rows), key_target)
        styled = segmentation.stylise(key_style, day.images[rows], targets)
        clean = score(day.images, rows)
        return (clean + _mean_iou(model, params, styled, day.labels[rows])) / 2

    shifted = jnp.stack([score(images, own.rows.test) for images in conditions])
    return {
        TRAINING: seen(_labelled(own)),
        VALIDATION: seen(own.rows.validation),
        TEST: jnp.mean(shifted),
    }


def _mean_iou(
    model: segmentation.Model, params: PyTree, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = model.net.apply({"params": params}, images)
    predicted = jnp.argmax(logits, axis=-1)
    counts = metrics.confusion(predicted, labels, model.net.classes, model.void)
    return 100 * metrics.mean_iou(counts)
