"""Trains lanes of a problem and looks at them on the way."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import lanes as lane_devices
from benchmarks.harness.results import rounded
from benchmarks.harness.training import Carry, PyTree, Rule, Step, Task, prepare
from benchmarks.tasks.frontier.problem import Problem

LOOKS = 10
AVERAGED = " averaged"
HORIZON = 0.02  # of the training that the average of parameters looks back


class AveragedState(NamedTuple):
    """A rule's own state, and the average of the parameters."""

    inner: Any
    average: PyTree


class Averaged(Rule):
    """A rule that also averages the parameters; training is not touched."""

    def __init__(self, rule: Rule):
        """``rule`` is what trains."""
        self.rule = rule

    def configure(self, configs: Sequence[dict[str, Any]]) -> PyTree:
        return self.rule.configure(configs)

    def init_model(self, task: Task, key: jax.Array) -> PyTree:
        return self.rule.init_model(task, key)

    def init(self, task: Task, config: PyTree) -> AveragedState:
        shapes = jax.eval_shape(
            lambda key: self.rule.init_model(task, key), jax.random.key(0)
        )
        return AveragedState(
            self.rule.init(task, config), optax.tree.zeros_like(shapes)
        )

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: PyTree, key: jax.Array
    ) -> Step:
        own: AveragedState = carry.rule
        made = self.rule.step(task, data, carry._replace(rule=own.inner), config, key)
        # A plain mean first, then one that forgets: no start from zero to correct.
        share = jnp.maximum(1.0 / (carry.step + 1.0), 1.0 / (HORIZON * task.steps))
        share = jnp.minimum(share, 1.0)
        average = jax.tree.map(
            lambda a, p: a + share * (p - a), own.average, carry.model
        )
        return made._replace(state=AveragedState(made.state, average))

    def average(self, carry: Carry) -> PyTree:
        return carry.rule.average


def train(
    problem: Problem,
    rule: Rule,
    configs: Sequence[dict[str, Any]],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Train lanes and score them ten times, as they are and averaged.

    Returns:
      For each lane: ``looks``, each score at every look; final ``weights``;
      ``seconds``, its share of the training.
    """
    task = problem.task
    averaged = Averaged(rule)
    config = averaged.configure(list(configs))
    numbers = jnp.asarray(list(seeds))
    program = prepare(task, averaged, config, len(configs))
    assert program.chunks == LOOKS, "steps must be divisible by the number of looks"
    carry = program.init(numbers, config)
    curves: list[dict[str, np.ndarray]] = []
    seconds = 0.0
    weights = np.zeros(())
    for _ in range(program.chunks):
        started = time.monotonic()
        carry, (_, seen) = jax.block_until_ready(
            program.advance(carry, task.data, numbers, config)
        )
        seconds += time.monotonic() - started
        weights = np.asarray(seen[-1])
        here = lane_devices.gathered(carry)
        raw = problem.scores(here.model, numbers)
        smooth = problem.scores(averaged.average(here), numbers)
        curves.append(raw | {name + AVERAGED: x for name, x in smooth.items()})
    return [
        {
            "looks": {
                name: [rounded(look[name][lane]) for look in curves]
                for name in curves[0]
            },
            "weights": {
                name: rounded(weights[lane, k]) for k, name in enumerate(task.names)
            },
            "seconds": rounded(seconds / len(configs)),
        }
        for lane in range(len(configs))
    ]
