"""The weightings of the library as rules."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import yoto_jax as yoto
from benchmarks.harness.training import (
    DOWNSTREAM,
    Carry,
    PyTree,
    Rule,
    Step,
    Task,
    values_and_present,
)


class Weighted(Rule):
    """Any weighting of the library."""

    def __init__(
        self,
        weighting: Callable[[Task], yoto.LossWeighting],
        *,
        steered: bool = False,
        of_features: bool = False,
    ):
        """A rule from a weighting.

        Args:
          weighting: Makes it.
          steered: Whether held-out data steer it: it then sees the gradients of all
            parameters on a held-out batch, for every loss and the downstream one.
          of_features: Whether it looks at the gradients of the features that the task
            encodes a batch to, instead of those of all parameters.
        """
        self.weighting = weighting
        self.of_features = of_features
        self.steered = steered

    def init(self, task: Task, config: PyTree) -> Any:
        del config
        names = task.names + ((DOWNSTREAM,) if self.steered else ())
        return self.weighting(task).init(dict.fromkeys(names, 0.0))

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: PyTree, key: jax.Array
    ) -> Step:
        del config
        batch = task.draw(data, key)
        weighting = self.weighting(task)
        if self.steered:
            held_out = task.draw_held_out(data, jax.random.fold_in(key, 1))
            steering = yoto.on_validation(all_losses=True)
            value_and_grad = yoto.value_and_grad(
                task.steered_losses, weighting, steering=steering
            )
            losses, grads, state = value_and_grad(
                carry.model, carry.rule, (held_out, True), batch, False
            )
        else:
            loss_fn, gradients = task.losses_of_batch, None
            if self.of_features:
                loss_fn, gradients = task.losses, yoto.of_representation(task.encode)
            value_and_grad = yoto.value_and_grad(
                loss_fn, weighting, gradients=gradients
            )
            losses, grads, state = value_and_grad(carry.model, carry.rule, batch)
        losses, _ = values_and_present(losses)
        used = optax.tree.get(state, "loss_weights")
        pick = lambda tree: {name: tree[name] for name in task.names}
        return Step(pick(losses), pick(used), grads, state)
