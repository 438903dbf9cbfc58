"""Two digits in one image: data, a small model with or without conditioning, training.

Each image shows a digit at the upper left and one at the lower right, which overlap.
The two tasks are to name them. They share a trunk too narrow to do both well.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tasks.digits import task as digits
from yoto_jax import conditional

Array = jax.Array
PyTree = Any

TASKS = ("left", "right")
CLASSES = 10
SHIFT = 2  # of the right digit against the left one, down and to the right
JITTER = 1  # pixels by which each of them may be off, either way
SIDE = 8 + SHIFT + JITTER
WIDTHS = (SIDE * SIDE, 64, 3)

SLOPE = 0.2  # no unit of the narrow layer can die
FILM = (32,)
BATCH = 128
LEARNING_RATE = 3e-3
_EVALUATION_SEED = 2025


class Digits(NamedTuple):
    """Source digits on the canvas, in either place."""

    left: Array  # (places, n, SIDE * SIDE), from 0 to 1
    right: Array
    labels: Array  # (n,)


class Batch(NamedTuple):
    images: Array  # (n, SIDE * SIDE)
    labels: dict[str, Array]  # (n,) each


class Data(NamedTuple):
    """No source digit is in two of these."""

    train: Digits
    validation: Batch
    test: Batch


def load(pairs: int) -> Data:
    """The digits, and ``pairs`` random pairs of them for each evaluation."""
    train, *others = (_on_canvas(split) for split in digits.load())
    keys = jax.random.split(jax.random.key(_EVALUATION_SEED), len(others))
    return Data(train, *(draw(k, s, pairs) for k, s in zip(keys, others, strict=True)))


def _on_canvas(split: digits.Split) -> Digits:
    def place(down: int, across: int) -> Array:
        pad = lambda before: (before, SIDE - 8 - before)
        canvas = jnp.pad(split.images, ((0, 0), pad(down), pad(across)))
        return canvas.reshape(-1, SIDE * SIDE)

    places = list(itertools.product(range(JITTER + 1), repeat=2))
    left = jnp.stack([place(y, x) for y, x in places])
    right = jnp.stack([place(SHIFT + y, SHIFT + x) for y, x in places])
    return Digits(left, right, split.labels)


def draw(key: Array, source: Digits, n: int) -> Batch:
    """Random pairs in random places, the lighter of two pixels on top."""
    pair_key, place_key = jax.random.split(key)
    i, j = jax.random.randint(pair_key, (2, n), 0, len(source.labels))
    p, q = jax.random.randint(place_key, (2, n), 0, len(source.left))
    images = jnp.maximum(source.left[p, i], source.right[q, j])
    return Batch(images, {"left": source.labels[i], "right": source.labels[j]})


# The model.


def init(key: Array, encoding_size: int) -> PyTree:
    """Parameters; with an encoding of size 0, of a model without conditioning."""
    trunk_key, head_key, film_key = jax.random.split(key, 3)
    pairs = list(itertools.pairwise(WIDTHS))
    widths = WIDTHS[1:] if encoding_size else ()
    return {
        "trunk": [
            _dense(k, *pair)
            for k, pair in zip(_split(trunk_key, len(pairs)), pairs, strict=True)
        ],
        "heads": {
            name: _dense(k, WIDTHS[-1], CLASSES)
            for k, name in zip(_split(head_key, len(TASKS)), TASKS, strict=True)
        },
        "film": [
            conditional.init_film(k, encoding_size, width, hidden=FILM)
            for k, width in zip(_split(film_key, len(widths)), widths, strict=True)
        ],
    }


def _split(key: Array, n: int) -> Array:
    return jax.random.split(key, max(n, 1))[:n]


def _dense(key: Array, inputs: int, outputs: int) -> PyTree:
    normal = jax.nn.initializers.he_normal()
    return {"w": normal(key, (inputs, outputs)), "b": jnp.zeros(outputs)}


def logits(params: PyTree, images: Array, encoding: Array | None) -> dict[str, Array]:
    """Logits (n, CLASSES) of both tasks. The encoding is (n, E) or (1, E)."""
    x = images
    for i, layer in enumerate(params["trunk"]):
        x = x @ layer["w"] + layer["b"][None]
        if encoding is not None:
            x = conditional.film(params["film"][i], x, encoding)
        x = jax.nn.leaky_relu(x, SLOPE)
    return {
        name: x @ head["w"] + head["b"][None] for name, head in params["heads"].items()
    }


def losses(params: PyTree, batch: Batch, encoding: Array | None) -> dict[str, Array]:
    """Cross-entropies (n,) of both tasks."""
    return jax.tree.map(
        optax.softmax_cross_entropy_with_integer_labels,
        logits(params, batch.images, encoding),
        batch.labels,
    )


def parameters(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


# Training.


class Conditioning(NamedTuple):
    """How one model is trained for all weightings.

    Attributes:
      concentration: Of the Dirichlet distribution of the weights.
      groups: Draws in a batch; ``None`` for one per example.
      scalarization: What is minimised, of losses and weights.
      of_groups: Whether it is taken of the mean losses of a group.
    """

    concentration: float
    groups: int | None
    scalarization: Callable[..., Array]
    of_groups: bool

    @property
    def support(self) -> conditional.Dirichlet:
        return conditional.Dirichlet(dict.fromkeys(TASKS, self.concentration))


def encoding_size(how: Conditioning | None) -> int:
    return 0 if how is None else conditional.encoding_size(how.support)


def objective(
    how: Conditioning | None, params: PyTree, batch: Batch, key: Array, weights: PyTree
) -> Array:
    """What is minimised: with these weights, or with ones drawn for the batch."""
    if how is None:
        means = jax.tree.map(jnp.mean, losses(params, batch, None))
        return conditional.weighted_sum(means, weights)
    drawn = how.support.sample(key, len(batch.images), groups=how.groups)
    return conditional.conditional_loss(
        losses(params, batch, conditional.encode(drawn, how.support)),
        drawn,
        scalarization=how.scalarization,
        groups=how.groups if how.of_groups else None,
    )


@functools.partial(jax.jit, static_argnums=0)
def train(
    how: Conditioning | None,
    seeds: Array,
    weights: PyTree,
    steps: Array,
    source: Digits,
) -> PyTree:
    """Train models side by side.

    Args:
      how: How to condition them; ``None`` for models with weights of their own.
      seeds: (runs,): decides initialisation and batches.
      weights: Tree of (runs,), for models without conditioning.
      steps: Training steps of each model.
      source: The training digits.

    Returns:
      Parameters, with a leading axis (runs,).
    """
    rate = lambda i: LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
    tx = optax.adam(rate)
    gradient = jax.grad(functools.partial(objective, how))

    def run(seed: Array, weights: PyTree) -> PyTree:
        start, data = jax.random.split(jax.random.key(seed))
        params = init(start, encoding_size(how))

        def step(i: Array, carry: Any) -> Any:
            params, state = carry
            pairs, draws = jax.random.split(jax.random.fold_in(data, i))
            batch = draw(pairs, source, BATCH)
            updates, state = tx.update(gradient(params, batch, draws, weights), state)
            return optax.apply_updates(params, updates), state

        # The number of steps is an argument: one program for all of them.
        params, _ = jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))
        return params

    return jax.vmap(run)(seeds, weights)


def flops(how: Conditioning | None, source: Digits) -> float:
    """Floating-point operations of one gradient, as written."""
    params = jax.eval_shape(lambda: init(jax.random.key(0), encoding_size(how)))
    gradient = jax.grad(functools.partial(objective, how))
    key = jax.random.key(0)
    batch = jax.eval_shape(lambda: draw(key, source, BATCH))
    weights = dict.fromkeys(TASKS, 0.5)
    analysis = jax.jit(gradient).lower(params, batch, key, weights).cost_analysis()
    return float(analysis["flops"])


# Evaluation.


def rays(n: int) -> dict[str, np.ndarray]:
    """Weightings (n,) that sum to 1, evenly spread in angle, short of the corners.

    One is that of equal weights.
    """
    ends = (CORNER, np.pi / 2 - CORNER)
    angles = np.linspace(*ends, n) if n > 1 else np.mean(ends, keepdims=True)
    ray = np.stack([np.sin(angles), np.cos(angles)])
    return dict(zip(TASKS, (ray / ray.sum(axis=0)).astype(np.float32), strict=True))


CORNER = 0.05  # radians: weights of 0.048 and 0.952


def measure(params: PyTree, batch: Batch, encoding: Array | None) -> PyTree:
    """Mean cross-entropy and error rate of both tasks."""
    found = logits(params, batch.images, encoding)
    wrong = jax.tree.map(lambda x, y: x.argmax(-1) != y, found, batch.labels)
    entropies = losses(params, batch, encoding)
    return jax.tree.map(jnp.mean, {"ce": entropies, "error": wrong})


@jax.jit
def evaluate(params: PyTree, batch: Batch) -> PyTree:
    """Of models (..., runs) without conditioning."""
    return jax.lax.map(lambda p: measure(p, batch, None), params)


@jax.jit
def sweep(params: PyTree, batch: Batch, weights: PyTree) -> PyTree:
    """Of conditional models (runs,) at weightings (n,): arrays (runs, n)."""
    support = conditional.Dirichlet(dict.fromkeys(TASKS, 1.0))

    def at(params: PyTree, weights: PyTree) -> PyTree:
        # How concentrated the weights were in training is no part of their encoding.
        return measure(params, batch, conditional.encode(weights, support)[None])

    def of_one(params: PyTree) -> PyTree:
        return conditional.sweep(functools.partial(at, params), weights, batch_size=1)

    return jax.lax.map(of_one, params)
