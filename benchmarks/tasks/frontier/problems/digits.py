"""Digits under shift: trained on clean digits and mild styles, tested on strong."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.training import PyTree, Task
from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.frontier import splits
from benchmarks.tasks.frontier.problem import (
    PERCENT,
    SEEDS,
    TEST,
    TRAINING,
    VALIDATION,
    Problem,
    Scores,
)

STEPS = {"quick": 10, "cpu": 4000}
LANES = 5
STYLISED = "stylised"


def make(preset: str) -> Problem:
    """The problem in one size, ``quick`` or ``cpu``."""
    return Problem(
        task=_task(STEPS[preset]),
        scores=functools.partial(_scores, _views()),
        unit=PERCENT,
        margin=1.0,
        validated_on="other digits, in styles as strong as in training",
        bounds=((1e-2, 1e3), (1e-2, 1e3)),
        # As in the digits' contest: one that scales features makes them invariant so.
        modulated=lambda path, leaf: leaf.ndim == 1,
    )


@functools.cache
def _data() -> splits.Data:
    pool = digits.pool()
    labels = np.asarray(pool.labels)
    each = [digits.split(labels, seed) for seed in range(SEEDS)]
    return splits.Data(pool, splits.stacked(each))


@functools.cache
def _views() -> dict[str, jax.Array]:
    """All digits in every domain, several draws of each: [n, draws, 8, 8]."""
    return jax.jit(_views_of)(_data().pool)


def _views_of(pool: digits.Split) -> dict[str, jax.Array]:
    many = digits.repeat(pool)
    stylised = digits.validation_domains(pool)[STYLISED].images
    domains = {STYLISED: stylised, **digits.unseen_domains(many.images)}
    shape = (len(pool.labels), digits.DRAWS, *pool.images.shape[1:])
    return {name: x.reshape(shape) for name, x in domains.items()}


def _task(steps: int) -> Task:
    return Task(
        name="digits",
        settings={"steps": steps, "batch": digits.BATCH},
        primary=digits.PRIMARY,
        auxiliary=digits.AUXILIARY,
        data=_data(),
        init=digits.init_model,
        draw=lambda data, key: digits.draw(data.pool, key, data.rows.train),
        draw_held_out=lambda data, key: digits.draw(
            data.pool, key, data.rows.validation
        ),
        encode=digits.encode,
        losses=lambda model, z, batch: digits.losses_of_features(model, z, *batch[:2]),
        downstream=digits.held_out_loss,
        validate=splits.needs_seeds,
        test=splits.needs_seeds,
        steps=steps,
        learning_rate=5e-3,  # with 1e-3 it takes 8,000 steps to level off
        weight_decay=1e-4,
        lanes=LANES,
        of_seed=splits.of_seed,
    )


def _scores(views: dict[str, jax.Array], models: PyTree, seeds: jax.Array) -> Scores:
    """Accuracy in styles as in training, and its mean over the unseen corruptions."""
    rows = _data().rows
    of = lambda domain, rows: _accuracy(models, views[domain], rows, seeds)
    return {
        TRAINING: of(STYLISED, rows.train),
        VALIDATION: of(STYLISED, rows.validation),
        TEST: _mean([of(domain, rows.test) for domain in digits.UNSEEN]),
    }


def _accuracy(
    models: PyTree, views: jax.Array, rows: jax.Array, seeds: jax.Array
) -> jax.Array:
    of_draws = [
        splits.accuracy(
            digits.classify, models, views[:, draw], _data().pool.labels, rows, seeds
        )
        for draw in range(digits.DRAWS)
    ]
    return _mean(of_draws)


def _mean(scores: Sequence[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(scores), axis=0)
