"""MNIST-1D whose labels are missing: few classes, many parities.

Which label a signal has is drawn for each, so that a batch lacks one now and then.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.data.mnist1d import CLASSES, LENGTH, Signals
from benchmarks.harness.training import PyTree, Task
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import PERCENT, Problem
from benchmarks.tasks.frontier.problems import signals
from benchmarks.tasks.frontier.problems.signals import Size

SIZES = {
    "quick": Size(train=300, validation=50, test=100, steps=10, batch=16),
    "cpu": Size(train=4000, validation=500, test=2000, steps=3000, batch=48),
}
RATES = {"class": 0.05, "parity": 0.5, "size": 0.03, "clean": 0.5}
"""The share of the signals that have a label."""

PRIMARY, *_AUXILIARY = RATES
LANES = 5
_MASK_SEED = 1
_SPREAD = 0.4 * 12**-0.5  # standard deviation of the sizes


class Pool(NamedTuple):
    signals: Signals
    masks: dict[str, jax.Array]  # [n] each


class Batch(NamedTuple):
    signals: Signals
    masks: dict[str, jax.Array]  # [n] each: whether the label is there


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    size = SIZES[preset]
    return Problem(
        task=_task(size),
        scores=functools.partial(signals.scores, signals.signals(size)),
        unit=PERCENT,
        margin=1.0,
        validated_on="other signals of the same kind, with all labels",
        bounds=((1e-2, 1e2),) * len(_AUXILIARY),
    )


def _task(size: Size) -> Task:
    return Task(
        name="missing_labels",
        settings={**size._asdict(), "rates": RATES},
        primary=PRIMARY,
        auxiliary=tuple(_AUXILIARY),
        data=_data(size),
        init=_init,
        draw=functools.partial(_draw, size.batch),
        draw_held_out=functools.partial(_draw_held_out, size.batch),
        encode=_encode,
        losses=_losses,
        downstream=lambda model, z, batch: jnp.mean(_errors(model, z, batch)[PRIMARY]),
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=size.steps,
        learning_rate=1.5e-2,  # of those tried what validates best
        weight_decay=1e-4,
        lanes=LANES,
        of_seed=splits.of_seed,
    )


@functools.cache
def _data(size: Size) -> splits.Data:
    pool, rows = signals.signals(size)
    rng = np.random.default_rng(_MASK_SEED)
    total = len(pool.label)
    masks = {name: jnp.asarray(rng.random(total) < r) for name, r in RATES.items()}
    return splits.Data(Pool(pool, masks), rows)


def _init(key: jax.Array) -> PyTree:
    heads = {"class": (CLASSES,), "parity": (2,), "size": (1,), "clean": (LENGTH,)}
    return signals.init_model(key, signals.CHANNELS, **heads)


def _draw(n: int, data: splits.Data, key: jax.Array) -> Batch:
    """A batch of which each signal has some labels; validation data have all."""
    rows = splits.choose(data.rows.train, key, n)
    chosen, masks = jax.tree.map(lambda x: x[rows], data.pool)
    known = jnp.isin(rows, data.rows.validation)
    return Batch(chosen, {name: mask | known for name, mask in masks.items()})


def _draw_held_out(n: int, data: splits.Data, key: jax.Array) -> Batch:
    """A batch with all labels."""
    rows = splits.choose(data.rows.validation, key, n)
    chosen = jax.tree.map(lambda x: x[rows], data.pool.signals)
    return Batch(chosen, dict.fromkeys(RATES, jnp.ones(n, bool)))


def _encode(model: PyTree, batch: Batch) -> jax.Array:
    return signals.features(model["encoder"], batch.signals.x)


def _losses(model: PyTree, z: jax.Array, batch: Batch) -> yoto.MaskedLosses:
    return yoto.masked_mean(_errors(model, z, batch), batch.masks)


def _errors(model: PyTree, z: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The losses of every signal; errors relative to the spread of what is told."""
    truth = batch.signals
    told = {name: signals.mlp(model[name], z) for name in RATES}
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "class": entropy(told["class"], truth.label),
        "parity": entropy(told["parity"], truth.label % 2),
        "size": (told["size"][:, 0] - (truth.size - 1) / _SPREAD) ** 2,
        "clean": jnp.mean((told["clean"] - truth.clean) ** 2, axis=1),
    }
