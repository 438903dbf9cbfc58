"""Splits of one pool of examples: rows of the pool, others for every seed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import Task
from benchmarks.tasks.frontier.problem import SEEDS, Scores

PyTree = Any


class Rows(NamedTuple):
    """Rows of the pool [seeds, n], or of one seed [n]."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array


class Data(NamedTuple):
    """A pool that all seeds share, and which rows of it are whose."""

    pool: PyTree
    rows: Rows


def of_seed(data: Data, seed: jax.Array) -> Data:
    """The same pool with the rows of one seed; after the last comes the first again."""
    return Data(data.pool, jax.tree.map(lambda x: x[seed % SEEDS], data.rows))


def stacked(splits: Sequence[tuple[np.ndarray, ...]]) -> Rows:
    """Rows of splits (training, validation, test), one for each seed."""
    parts = zip(*splits, strict=True)
    return Rows(*(jnp.asarray(np.stack(part), jnp.int32) for part in parts))


def random(total: int, validation: int, test: int, train: int | None = None) -> Rows:
    """Rows of random splits of so many examples.

    The rest is for training, or so many of it: then seeds share fewer examples.
    """
    cuts = (total - validation - test, total - test)
    orders = [np.random.default_rng(s).permutation(total) for s in range(SEEDS)]
    splits = [np.split(order, cuts) for order in orders]
    return stacked([(rest[:train], *others) for rest, *others in splits])


def together(task: Task) -> Task:
    """The task that trains on validation data too, which come first, with all labels.

    Its validation scores are of data that it has seen.
    """
    rows: Rows = task.data.rows
    both = jnp.concatenate([rows.validation, rows.train], axis=1)
    data = task.data._replace(rows=rows._replace(train=both))
    return dataclasses.replace(task, data=data)


def choose(rows: jax.Array, key: jax.Array, n: int) -> jax.Array:
    """So many of the rows, with replacement."""
    return rows[jax.random.randint(key, (n,), 0, len(rows))]


Measure = Callable[[PyTree, Data], dict[str, jax.Array]]
"""Scores of one model, from the data of its seed."""


def scores(measure: Measure, data: Data, models: PyTree, seeds: jax.Array) -> Scores:
    """Scores of models [lanes], each on the rows of its seed."""
    return _of_lanes(measure, data, models, jnp.asarray(seeds))


@functools.partial(jax.jit, static_argnums=0)
def _of_lanes(
    measure: Measure, data: Data, models: PyTree, seeds: jax.Array
) -> dict[str, jax.Array]:
    def of_one(lane: tuple[PyTree, jax.Array]) -> dict[str, jax.Array]:
        model, seed = lane
        return measure(model, of_seed(data, seed))

    return jax.lax.map(of_one, (models, seeds))


Classify = Callable[[PyTree, jax.Array], jax.Array]


def accuracy(
    classify: Classify,
    models: PyTree,
    x: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    seeds: jax.Array,
) -> jax.Array:
    """Accuracy in % of models [lanes], each on the rows of its seed.

    Args:
      classify: ``classify(model, x) -> logits [n, classes]``.
      models: The models.
      x: Inputs of the pool.
      labels: Labels of the pool.
      rows: The rows to look at, [seeds, n].
      seeds: Of the models, [lanes].
    """
    return _accuracy(classify, models, x, labels, rows, seeds)


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(
    classify: Classify,
    models: PyTree,
    x: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    seeds: jax.Array,
) -> jax.Array:
    def of_one(lane: tuple[PyTree, jax.Array]) -> jax.Array:
        model, seed = lane
        own = rows[seed % SEEDS]
        predicted = jnp.argmax(classify(model, x[own]), axis=-1)
        return 100 * jnp.mean(predicted == labels[own])

    return jax.lax.map(of_one, (models, jnp.asarray(seeds)))


def needs_seeds(models: PyTree) -> Any:
    """What a task has for ``validate`` and ``test``: its problem has the scores."""
    raise NotImplementedError("models of seeds with data of their own: see the scores")
