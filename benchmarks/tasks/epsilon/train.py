"""Trains lanes that measure their weights on the way."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import yoto_jax as yoto
from benchmarks.harness.results import rounded
from benchmarks.harness.training import Carry, PyTree, Task, prepare
from benchmarks.harness.variations import Switches
from benchmarks.tasks.epsilon.methods import BATCHES, Arm, Measured, config
from benchmarks.tasks.frontier.methods import SOFTMAX
from benchmarks.tasks.frontier.problem import Problem

PARTS = 50
"""Of a training: the first one is the warm-up."""
LOOKED_AT = (0.8, 1.0)
"""Shares of the training after which the model is scored."""
WAYS = ("gradient", "loss")
_KEY = 17


def train(problem: Problem, arm: Arm, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train lanes of one arm.

    Returns:
      For each lane: ``start``, the weights relative to the primary loss that learning
      starts with, in units of the losses as they come; ``path``, the weights after
      each tenth of the training; ``looks``, scores; ``seconds``, its share.
    """
    task, count = problem.task, len(problem.task.auxiliary)
    lanes, numbers = len(seeds), jnp.asarray(list(seeds))
    switches = SOFTMAX.configure([config(arm, count)] * lanes)
    parts = PARTS if task.steps % PARTS == 0 else 10
    program = prepare(task, SOFTMAX, switches, lanes, task.steps // parts)
    started = time.monotonic()
    carry = program.init(numbers, switches)
    begin = ratios(task, carry, switches)
    path, looks = [], []
    for part in range(parts):
        if arm.measured and part == int(arm.measured.when == "warm-up"):
            carry, switches = replaced(task, arm.measured, carry, switches, numbers)
            begin = ratios(task, carry, switches)
        carry, _ = program.advance(carry, task.data, numbers, switches)
        if (part + 1) % (parts // 10) == 0:
            path.append(ratios(task, carry, switches))
        if (part + 1) / parts in LOOKED_AT:
            scores = problem.scores(carry.model, numbers)
            looks.append({name: np.asarray(x) for name, x in scores.items()})
    seconds = time.monotonic() - started
    return [
        {
            "start": _named(task, begin[lane]),
            "path": [_named(task, x[lane]) for x in path],
            "looks": {
                name: [rounded(look[name][lane]) for look in looks] for name in looks[0]
            },
            "seconds": rounded(seconds / lanes),
        }
        for lane in range(lanes)
    ]


def _named(task: Task, row: np.ndarray) -> dict[str, float]:
    return {name: rounded(x) for name, x in zip(task.auxiliary, row, strict=True)}


def ratios(task: Task, carry: Carry, switches: Switches) -> np.ndarray:
    """Weights [lanes, K] of the losses as they come, relative to the primary one's."""
    logits = carry.rule.mu.logits
    mu = jnp.stack([logits[name] for name in task.auxiliary], axis=1)
    return np.asarray(jnp.exp(mu) * switches.factors[:, 1:])


def replaced(
    task: Task, how: Measured, carry: Carry, switches: Switches, seeds: jax.Array
) -> tuple[Carry, Switches]:
    """Lanes whose logits, or units, are what is measured on a few batches."""
    found = measure(task, carry.model, seeds)[how.by, how.clip]
    epsilon = jnp.full_like(found, how.share) if how.units else how.share * found
    factors = jnp.where(how.units, found, 1.0)
    mu = jax.vmap(functools.partial(_logits, task))(epsilon)
    learn = jnp.full_like(switches.learn, how.learn)
    factors = jnp.concatenate([jnp.ones((len(found), 1)), factors], axis=1)
    changed = switches._replace(learn=learn, factors=factors)
    return carry._replace(rule=carry.rule._replace(mu=mu)), changed


def _logits(task: Task, epsilon: jax.Array) -> yoto.LossLogits:
    named = dict(zip(task.auxiliary, epsilon, strict=True))
    losses = dict.fromkeys(task.names, 0.0)
    return yoto.init_loss_logits(losses, task.primary, epsilon=named)


@functools.partial(jax.jit, static_argnums=0)
def measure(
    task: Task, models: PyTree, seeds: jax.Array
) -> dict[tuple[str, bool], jax.Array]:
    """Balanced weights [lanes, K] by what is compared, and whether they are clipped.

    Each lane is measured on batches of its own.
    """

    def of_one(model: PyTree, seed: jax.Array) -> dict[tuple[str, bool], jax.Array]:
        own = task.of_seed(task.data, seed)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(_KEY), seed), BATCHES)
        batches = [task.draw(own, key) for key in keys]

        def ratios(by: Any, clip: bool) -> jax.Array:
            found = yoto.balanced_epsilon(
                task.losses_of_batch, model, batches, task.primary, by=by, clip=clip
            )
            return jnp.stack([found[name] for name in task.auxiliary])

        return {(by, clip): ratios(by, clip) for by in WAYS for clip in (False, True)}

    return jax.vmap(of_one)(models, seeds)
