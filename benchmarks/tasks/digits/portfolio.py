"""The race of the library's portfolio: lanes of weightings, one program per rung."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.terminal import say
from benchmarks.harness.training import PyTree, schedule
from benchmarks.tasks.digits import task
from yoto_jax import racing

CUTS = ((0.2, 1),)


class Lane(NamedTuple):
    """What one run carries from step to step."""

    model: PyTree
    optimizer: optax.OptState
    state: Any  # of the weighting


class Race:
    """Equal weights and three shares of gradient norms, for several seeds at once."""

    def __init__(self, data: task.Data, steps: int, learning_rate: float):
        self.data = data
        self.arms = racing.portfolio(task.PRIMARY, steps)
        self.plan = racing.plan(steps, len(self.arms), CUTS)
        self._weighting = racing.one_of(self.arms)
        self._optimizer = optax.adamw(schedule(learning_rate, steps))
        self._value_and_grad = yoto.value_and_grad(task.losses, self._weighting)

    def run(self, seeds: int) -> tuple[task.Outcome, list[str]]:
        """The winner of each seed, with the history of the last rung, and its name."""
        started, seconds = time.perf_counter(), 0.0
        numbers = jnp.arange(seeds)
        judged = task.validation_domains(self.data.validation)["stylised"]
        lanes = jax.jit(jax.vmap(self._begin))(numbers)
        for rung in self.plan.rungs:
            advance = jax.jit(self._advance, static_argnums=2, donate_argnums=0)
            program = advance.lower(lanes, numbers, rung).compile()
            begun = time.perf_counter()
            lanes, history = jax.block_until_ready(program(lanes, numbers))
            scores = task.accuracy(lanes.model, {"stylised": judged})["stylised"]
            cut = lambda lanes, scores, rung=rung: racing.keep(lanes, scores, rung.keep)
            lanes = jax.vmap(cut)(lanes, jnp.asarray(scores)).lanes
            seconds += time.perf_counter() - begun
        weights, losses = jax.tree.map(lambda x: np.moveaxis(x, 0, -1), history)
        say(f"portfolio: {self.plan.runs:.1f} runs for each seed in {seconds:.1f} s")
        total = time.perf_counter() - started
        model = jax.device_get(lanes.model)
        outcome = task.Outcome(model, weights, losses, seconds, total - seconds)
        names = list(self.arms)
        return outcome, [names[arm] for arm in lanes.state.arm[:, 0]]

    def _begin(self, seed: jax.Array) -> Lane:
        """The lanes of a seed."""
        model = task.init_model(jax.random.key(seed))
        state = self._weighting.init(dict.fromkeys(task.LOSSES, 0.0))
        lane = Lane(model, self._optimizer.init(model), state)
        return racing.start(lane, self.plan.arms)

    def _advance(self, lanes: Lane, seeds: jax.Array, rung: racing.Rung) -> Any:
        """Train the lanes of all seeds for the steps of a rung."""

        def step(lanes: Lane, number: jax.Array) -> Any:
            def of_seed(lanes: Lane, seed: jax.Array) -> Any:
                key = jax.random.fold_in(jax.random.key(seed), number)
                batch = task.draw(self.data.train, key)
                return jax.vmap(self._step, in_axes=(0, None))(lanes, batch)

            return jax.vmap(of_seed)(lanes, seeds)

        return jax.lax.scan(step, lanes, jnp.arange(rung.start, rung.stop))

    def _step(self, lane: Lane, batch: tuple[jax.Array, ...]) -> Any:
        losses, grads, state = self._value_and_grad(lane.model, lane.state, *batch)
        updates, optimizer = self._optimizer.update(grads, lane.optimizer, lane.model)
        model = optax.apply_updates(lane.model, updates)
        return Lane(model, optimizer, state), (state.loss_weights, losses)
