"""Trains lanes of a problem and looks at them on the way."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import lanes as lane_devices
from benchmarks.harness.conditional import PICK_STEPS, Chosen, picked
from benchmarks.harness.results import rounded
from benchmarks.harness.training import Carry, PyTree, Rule, Step, Task, prepare
from benchmarks.tasks.frontier.problem import VALIDATION, Problem

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
        """``rule`` is what trains, and what chooses after that, if it does."""
        self.chooses, self.rule = rule, rule.training

    def configure(self, configs: Sequence[dict[str, Any]]) -> PyTree:
        return self.chooses.configure(configs)

    def init_model(self, task: Task, key: jax.Array) -> PyTree:
        return self.rule.init_model(task, key)

    def optimizer(self, task: Task) -> optax.GradientTransformation:
        return self.rule.optimizer(task)

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

    def after(self, task: Task, carry: Carry, part: int, parts: int) -> Carry:
        own = carry._replace(rule=carry.rule.inner)
        made = self.chooses.after(task, own, part, parts)
        return made._replace(rule=carry.rule._replace(inner=made.rule))

    def finish(
        self, task: Task, carry: Carry, seeds: jax.Array
    ) -> tuple[PyTree, dict[str, np.ndarray] | None]:
        own = carry._replace(rule=carry.rule.inner)
        return self.chooses.finish(task, own, seeds)

    def average(self, carry: Carry) -> PyTree:
        return carry.rule.average


@functools.cache
def _averaged(rule: Rule) -> Averaged:
    """One for each rule: programs are compiled for rules, once."""
    return Averaged(rule)


def of_seeds(problem: Problem, seeds: jax.Array) -> Task:
    """The task of lanes with these seeds, for what looks at validation data."""
    validate = jax.jit(lambda models: problem.scores(models, seeds)[VALIDATION])
    return dataclasses.replace(
        problem.task, validate=lambda models: np.asarray(validate(models))
    )


def choosing(problem: Problem, rule: Rule) -> float:
    """Operations of choosing the weights of one conditional model; else 0."""
    if not isinstance(rule, Chosen):
        return 0.0
    task, seeds = problem.task, jnp.zeros(1, jnp.int32)
    make = functools.partial(rule.conditional.init_model, task)
    trained = jax.eval_shape(jax.vmap(make), jax.vmap(jax.random.key)(seeds))
    found = 0.0
    if rule.looks:

        def look_once(trained: PyTree) -> jax.Array:
            weights = dict.fromkeys(task.names, jnp.ones(1))
            build = functools.partial(rule.conditional.model, task)
            models = jax.vmap(build)(trained, weights)
            return problem.scores(models, seeds)[VALIDATION]

        found += rule.looks * _flops(jax.jit(look_once).lower(trained))
    if rule.pick != "validation":
        # Of a loop, the compiler counts one pass.
        lanes = (trained, seeds)
        picking = picked.lower(rule.pick, rule.conditional, task, task.data, lanes)
        found += PICK_STEPS * _flops(picking)
    return found


def _flops(lowered: jax.stages.Lowered) -> float:
    return float(lowered.compile().cost_analysis()["flops"])


def look(
    problem: Problem, models: PyTree, averaged: PyTree, seeds: jax.Array
) -> dict[str, np.ndarray]:
    """Scores [lanes] of models, and of those with averaged parameters."""
    smooth = problem.scores(averaged, seeds)
    found = problem.scores(models, seeds)
    found = found | {name + AVERAGED: x for name, x in smooth.items()}
    return {name: np.asarray(x) for name, x in found.items()}


def train(
    problem: Problem,
    rule: Rule,
    configs: Sequence[dict[str, Any]],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Train lanes and score them ten times, as they are and averaged.

    A rule that chooses weights for a trained model chooses them anew at every look.

    Returns:
      For each lane: ``looks``, each score at every look; final ``weights``;
      ``seconds``, its share of the training.
    """
    averaged = _averaged(rule)
    config = averaged.configure(list(configs))
    numbers = jnp.asarray(list(seeds))
    task = of_seeds(problem, numbers)
    program = prepare(problem.task, averaged, config, len(configs))
    assert program.chunks == LOOKS, "steps must be divisible by the number of looks"
    carry = program.init(numbers, config)
    curves: list[dict[str, np.ndarray]] = []
    seconds = 0.0
    weights = np.zeros(())
    for part in range(1, program.chunks + 1):
        started = time.monotonic()
        carry, (_, seen) = jax.block_until_ready(
            program.advance(carry, task.data, numbers, config)
        )
        seconds += time.monotonic() - started
        carry = averaged.after(task, carry, part, program.chunks)
        here = lane_devices.gathered(carry)
        models, chosen = averaged.finish(task, here, numbers)
        as_average = here._replace(model=averaged.average(here))
        smooth, _ = averaged.finish(task, as_average, numbers)
        curves.append(look(problem, models, smooth, numbers))
        weights = np.asarray(seen[-1])
        if chosen is not None:
            weights = np.stack([chosen[name] for name in task.names], axis=1)
    return [
        {
            "looks": {
                name: [rounded(found[name][lane]) for found in curves]
                for name in curves[0]
            },
            "weights": {
                name: rounded(weights[lane, k]) for k, name in enumerate(task.names)
            },
            "seconds": rounded(seconds / len(configs)),
        }
        for lane in range(len(configs))
    ]
