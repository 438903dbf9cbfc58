"""Depth of small scenes outdoors; tested through another lens, in rooms, and both.

The losses and the shift of the depth task, on images that are small, so that training
levels off at a price that anybody can pay: twice the steps change the score on other
scenes of the training domain by less than a point on average. On the scenes trained on
it still rises by five: they are learned by heart.

It does not separate the weights of its box: the points that validate best and worst are
level in the test, where a network is little better than one that ignores the image.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.data import scenes
from benchmarks.data.scenes import Scenes
from benchmarks.harness.training import PyTree, Task
from benchmarks.tasks.depth import task as depth
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import (
    DELTA1,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
)
from benchmarks.tasks.frontier.problems import small_scenes
from benchmarks.tasks.frontier.problems.small_scenes import Size

SIZES = {
    "quick": Size(8, 12, 64, 16, 16, 16, steps=10, batch=4, features=8, blocks=1),
    "cpu": Size(
        16, 24, 1024, 256, 256, 256, steps=3000, batch=8, features=32, blocks=1
    ),
}
PUBLISHED = (0.25, 0.1)
_POOL_KEY = 19


class Pool(NamedTuple):
    """Scenes as in training, and of every domain of the test."""

    seen: Scenes
    unseen: tuple[Scenes, ...]


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    size = SIZES[preset]
    model = depth.Model(depth.DepthNet(size.features, size.blocks), further=())
    return Problem(
        task=_task(size, model),
        scores=functools.partial(
            splits.scores, functools.partial(_measure, model), _data(size)
        ),
        unit=DELTA1,
        margin=1.0,
        validated_on="other scenes of the training domain",
        bounds=((1e-3, 1e1), (1e-3, 1e1)),
        published=PUBLISHED,
    )


def _task(size: Size, model: depth.Model) -> Task:
    data = _data(size)
    return small_scenes.task(
        size.batch,
        data,
        model,
        _draw,
        lambda data: data.rows.train,
        data.pool.seen.images[:1],
        name="depth",
        settings=size._asdict(),
        steps=size.steps,
        primary=depth.PRIMARY,
        auxiliary=depth.AUXILIARY,
        learning_rate=depth.LEARNING_RATE,  # of half, once and twice it the best
        weight_decay=depth.WEIGHT_DECAY,
    )


@functools.cache
def _data(size: Size) -> splits.Data:
    def render(number: int, domain: str) -> Scenes:
        key = jax.random.fold_in(jax.random.key(_POOL_KEY), number)
        look = scenes.DOMAINS[domain]
        made = scenes.render(key, size.pool, look, size.height, size.width)
        return depth.vignette(made)

    unseen = tuple(render(1 + i, domain) for i, domain in enumerate(depth.UNSEEN))
    pool = Pool(render(0, depth.SEEN), unseen)
    return splits.Data(pool, small_scenes.rows(size))


def _draw(n: int, data: splits.Data, rows: jax.Array, key: jax.Array) -> depth.Batch:
    key_rows, *keys = jax.random.split(key, 6)
    chosen = splits.choose(rows, key_rows, n)
    return depth.two_views(_some(data.pool.seen, chosen), keys)


def _some(data: Scenes, rows: jax.Array) -> Scenes:
    return jax.tree.map(lambda x: x[rows], data)


def _measure(
    model: depth.Model, params: PyTree, own: splits.Data
) -> dict[str, jax.Array]:
    """Pixels in % whose depth is right to a quarter, over images and domains."""
    pool, rows = own

    def score(domain: Scenes, rows: jax.Array) -> jax.Array:
        some = _some(domain, rows)
        return depth.measure_model(model.net, params, some)["delta1"]

    unseen = jnp.stack([score(domain, rows.test) for domain in pool.unseen])
    return {
        TRAINING: score(pool.seen, rows.train),
        VALIDATION: score(pool.seen, rows.validation),
        TEST: jnp.mean(unseen),
    }
