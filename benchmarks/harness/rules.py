"""The weightings of the library as rules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
            statistics = {
                name: function
                for name, function in task.statistics.items()
                if name in weighting.needs
            }
            value_and_grad = yoto.value_and_grad(
                loss_fn, weighting, gradients=gradients, statistics=statistics
            )
            losses, grads, state = value_and_grad(carry.model, carry.rule, batch)
        losses, _ = values_and_present(losses)
        used = optax.tree.get(state, "loss_weights")
        pick = lambda tree: {name: tree[name] for name in task.names}
        return Step(pick(losses), pick(used), grads, state)


def without_scaling(task: Task) -> optax.GradientTransformation:
    """AdamW without Adam's scaling, for rules that scale gradients of their own."""
    return optax.chain(
        optax.add_decayed_weights(task.weight_decay),
        optax.scale_by_learning_rate(task.schedule),
    )


def state_of(link: optax.GradientTransformation, task: Task) -> Any:
    """The state that a link starts with, for parameters of the model's shape."""
    model = jax.eval_shape(task.init, jax.random.key(0))
    return link.init(optax.tree.zeros_like(model))


class Combined(Rule):
    """The gradients of all losses, combined by a link of an Optax chain."""

    def __init__(
        self,
        link: Callable[[PyTree], optax.GradientTransformationExtraArgs],
        *,
        scales: bool = False,
        two_batches: bool = False,
    ):
        """A rule from a link.

        Args:
          link: Makes it, from a tree of losses.
          scales: Whether the link scales gradients as Adam does.
          two_batches: Whether a step takes two batches: the link gets the mean of
            their gradients, and their cross-Gramian. A loss counts as absent if one
            of the batches lacks it.
        """
        self.link, self.scales, self.two_batches = link, scales, two_batches

    def _link(self, task: Task) -> optax.GradientTransformationExtraArgs:
        return self.link(dict.fromkeys(task.names, 0.0))

    def init(self, task: Task, config: PyTree) -> Any:
        del config
        return state_of(self._link(task), task)

    def optimizer(self, task: Task) -> optax.GradientTransformation:
        return without_scaling(task) if self.scales else task.optimizer()

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: PyTree, key: jax.Array
    ) -> Step:
        del config
        jacobian_of = yoto.value_and_jacobian(task.losses_of_batch)
        found, rows = jacobian_of(carry.model, task.draw(data, key))
        losses, present = values_and_present(found)
        extra: dict[str, Any] = {}
        if self.two_batches:
            other = task.draw(data, jax.random.fold_in(key, 2))
            found, second = jacobian_of(carry.model, other)
            extra["cross_gramian"] = yoto.cross_gramian(rows, second)
            rows = jax.tree.map(lambda a, b: (a + b) / 2, rows, second)
            _, there = values_and_present(found)
            if present is not None:
                present = jax.tree.map(jnp.logical_and, present, there)
        grads, state = self._link(task).update(
            rows, carry.rule, carry.model, losses=losses, present=present, **extra
        )
        used = optax.tree.get(state, "loss_weights", dict.fromkeys(task.names, 1.0))
        return Step(losses, used, grads, state)


class Momenta(Rule):
    """Running means of all gradients combined, with the gradient of one loss a step."""

    def __init__(self, weighting: Callable[[], yoto.LossWeighting]):
        """A rule from a weighting that looks at gradients."""
        self.weighting = weighting

    def _momenta(self, task: Task) -> optax.GradientTransformationExtraArgs:
        return yoto.aggregate_momenta(self.weighting(), dict.fromkeys(task.names, 0.0))

    def init(self, task: Task, config: PyTree) -> Any:
        del config
        return state_of(self._momenta(task), task)

    def optimizer(self, task: Task) -> optax.GradientTransformation:
        return without_scaling(task)

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: PyTree, key: jax.Array
    ) -> Step:
        del config
        batch = task.draw(data, key)
        names = sorted(task.names)  # as in a dictionary that JAX has flattened
        turn = carry.step % len(names)

        def of_one(model: PyTree) -> tuple[jax.Array, Any]:
            losses, _ = task.losses_of(model, batch)
            return jnp.stack([losses[name] for name in names])[turn], losses

        slope, losses = jax.grad(of_one, has_aux=True)(carry.model)
        grads, state = self._momenta(task).update(
            slope, carry.rule, carry.model, loss=turn
        )
        return Step(losses, optax.tree.get(state, "loss_weights"), grads, state)
