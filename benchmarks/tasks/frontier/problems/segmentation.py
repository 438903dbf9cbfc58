"""Small scenes, segmented by day; tested by night, in fog, rain and snow.

The losses and the shift of the segmentation task. Images are small, and boxes, balls
and poles one class, so that training levels off at a price that anybody can pay.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import scenes
from benchmarks.harness.training import PyTree, Task
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import (
    PERCENT,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
    Scores,
)
from benchmarks.tasks.segmentation import metrics
from benchmarks.tasks.segmentation import task as segmentation
from benchmarks.tasks.segmentation.task import Images

CLASSES = ("sky", "ground", "building", "object")


class Size(NamedTuple):
    """How large images are, how many there are, and how long they are trained on."""

    height: int
    width: int
    pool: int  # scenes that the seeds draw theirs from
    train: int  # of which half lend their images to the target conditions
    validation: int
    test: int
    steps: int
    batch: int
    features: int
    blocks: int


SIZES = {
    "quick": Size(8, 12, 80, 32, 16, 16, steps=10, batch=4, features=8, blocks=1),
    "cpu": Size(
        16, 24, 2048, 512, 256, 256, steps=3000, batch=8, features=32, blocks=1
    ),
}
LANES = 5
_POOL_KEY = 17
_STYLE_KEY = 18


class Pool(NamedTuple):
    """Scenes by day, and the same in every target condition."""

    day: Images
    conditions: jax.Array  # [conditions, n, h, w, 3]


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    size = SIZES[preset]
    model = _model(size)
    return Problem(
        task=_task(size, model),
        scores=functools.partial(_scores, model, _data(size)),
        unit=PERCENT,
        margin=1.0,
        validated_on="other scenes, by day and in styles as in training",
        bounds=((1e-2, 1e2),),
    )


def _model(size: Size) -> segmentation.Model:
    net = segmentation.SegmentationNet(size.features, size.blocks, len(CLASSES))
    return segmentation.Model(net, void=None)


def _task(size: Size, model: segmentation.Model) -> Task:
    data = _data(size)
    return Task(
        name="segmentation",
        settings=size._asdict(),
        primary=segmentation.PRIMARY,
        auxiliary=segmentation.AUXILIARY,
        data=data,
        init=lambda key: model.init(key, data.pool.day.images[:1]),
        draw=lambda data, key: _draw(size.batch, data, _labelled(data), key),
        draw_held_out=lambda data, key: _draw(
            size.batch, data, data.rows.validation, key
        ),
        encode=model.encode,
        losses=model.losses,
        downstream=model.downstream,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=size.steps,
        learning_rate=2e-2,  # of 0.005, 0.01, 0.02 and 0.04 what validates best
        weight_decay=segmentation.WEIGHT_DECAY,
        lanes=LANES,
        of_seed=splits.of_seed,
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
    shifted = segmentation.conditioned(
        jax.random.key(_STYLE_KEY), made.images, made.depth
    )
    conditions = jnp.stack([shifted[name] for name in segmentation.UNSEEN])
    rows = splits.random(size.pool, size.validation, size.test, size.train)
    return splits.Data(Pool(Images(made.images, labels), conditions), rows)


def _labelled(data: splits.Data) -> jax.Array:
    return jnp.split(data.rows.train, 2)[0]


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
    rows = splits.choose(jnp.split(data.rows.train, 2)[1], key_rows, n)
    conditions = data.pool.conditions
    return conditions[jax.random.randint(key_condition, (n,), 0, len(conditions)), rows]


def _scores(
    model: segmentation.Model, data: splits.Data, models: PyTree, seeds: jax.Array
) -> Scores:
    """Mean IoU by day and in styles as in training, and its mean over conditions."""
    found = _measured(model, data, models, jnp.asarray(seeds))
    return {name: np.asarray(x) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _measured(
    model: segmentation.Model, data: splits.Data, models: PyTree, seeds: jax.Array
) -> dict[str, jax.Array]:
    def of_one(lane: tuple[PyTree, jax.Array]) -> dict[str, jax.Array]:
        params, seed = lane
        own = splits.of_seed(data, seed)
        day, conditions = own.pool

        def score(images: jax.Array, rows: jax.Array) -> jax.Array:
            return _mean_iou(model, params, images, day.labels[rows])

        def seen(rows: jax.Array) -> jax.Array:
            x = day.images[rows]
            key_target, key_style = jax.random.split(jax.random.key(_STYLE_KEY))
            targets = _targets(own, len(rows), key_target)
            styled = segmentation.stylise(key_style, x, targets)
            return (score(x, rows) + score(styled, rows)) / 2

        test = own.rows.test
        shifted = jnp.stack([score(x[test], test) for x in conditions])
        return {
            TRAINING: seen(_labelled(own)),
            VALIDATION: seen(own.rows.validation),
            TEST: jnp.mean(shifted),
        }

    return jax.lax.map(of_one, (models, seeds))


def _mean_iou(
    model: segmentation.Model, params: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits = model.net.apply({"params": params}, images)
    counts = metrics.confusion(
        jnp.argmax(logits, axis=-1), labels, len(CLASSES), model.void
    )
    return 100 * metrics.mean_iou(counts)
