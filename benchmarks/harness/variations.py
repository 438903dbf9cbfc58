"""Softmax weights, learned as in YOTO with its parts switched on and off, or constant.

All variations are one program: what differs between lanes are numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.training import (
    Carry,
    Losses,
    Present,
    PyTree,
    Rule,
    Step,
    Task,
)
from yoto_jax._loss_logits import choose_present


class Switches(NamedTuple):
    """Configuration of learned and of constant softmax weights, for one lane.

    The defaults are YOTO as the library has it. Scalars but for the first and the last.
    """

    ratios: Any  # [K] weights relative to the primary loss, at the start
    learn: Any = True  # else the weights stay
    rho: Any = 10.0
    entropy: Any = True  # the regulariser has the negated entropy
    auxiliary: Any = False  # which is over the auxiliary losses alone
    softplus: Any = True  # the regulariser has the softplus
    coupled: Any = False  # the decay goes through the moments, with alpha once more
    sgd: Any = False  # the logits step by momentum, as in Algorithm 1, not by Adam
    exponential: Any = False  # exp(mu) without the normalisation to sum 1
    rate: Any = 1.0  # learning rate of the logits relative to the model's
    normalize: Any = False  # losses are divided by their running means
    decay: Any = 0.99  # of those means; 1: divided by their first values
    factors: Any = 1.0  # [K + 1] or scalar: the losses come multiplied by these


def _row(config: dict[str, Any]) -> Switches:
    """One lane's arrays: what is on or off by default is nothing else."""
    for name, default in Switches._field_defaults.items():
        value = config.get(name, default)
        if isinstance(value, bool) != isinstance(default, bool):
            raise TypeError(f"{name} cannot be {value!r}")
    return Switches(
        *(
            np.asarray(value, bool if isinstance(value, bool) else np.float32)
            for value in Switches(**config)
        )
    )


class SoftmaxState(NamedTuple):
    mu: yoto.LossLogits
    adam: optax.OptState
    momentum: optax.OptState
    means: jax.Array  # [K + 1]


class Softmax(Rule):
    """Softmax weights, learned as in YOTO with variations, or constant.

    All of them are one program: lanes differ in numbers alone. Of losses that a batch
    lacks, learned weights go to the others, and logits and moments stand still; a
    constant weight stays what it is.
    """

    def configure(self, configs: Sequence[dict[str, Any]]) -> Switches:
        rows = [_row(config) for config in configs]
        most = max(row.factors.size for row in rows)
        rows = [
            row._replace(factors=np.broadcast_to(row.factors, (most,))) for row in rows
        ]
        return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows)

    def init(self, task: Task, config: Switches) -> SoftmaxState:
        mu = yoto.init_loss_logits(
            dict.fromkeys(task.names, 0.0),
            task.primary,
            epsilon=dict(zip(task.auxiliary, config.ratios, strict=True)),
        )
        return SoftmaxState(
            mu,
            optax.scale_by_adam().init(mu),
            optax.trace(0.9).init(mu),
            jnp.zeros(len(task.names)),
        )

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: Switches, key: jax.Array
    ) -> Step:
        batch = task.draw(data, key)
        state: SoftmaxState = carry.rule

        def composite(
            model: PyTree, mu: yoto.LossLogits
        ) -> tuple[jax.Array, tuple[Losses, jax.Array, Present]]:
            losses, present = task.losses_of(model, batch)
            vector = jnp.stack([losses[name] for name in task.names])
            vector = vector * jnp.broadcast_to(config.factors, vector.shape)
            losses = dict(zip(task.names, vector, strict=True))
            now = jax.lax.stop_gradient(vector)
            first = carry.step == 0 if present is None else state.means == 0
            decay = jnp.where(first, 0.0, config.decay)
            means = decay * state.means + (1 - decay) * now
            scale = jnp.where(config.normalize, means, 1.0)
            if present is not None:
                there = jnp.stack([present[name] for name in task.names])
                means = jnp.where(there, means, state.means)
                scale = jnp.where(there, scale, 1.0)
            scaled = dict(zip(task.names, vector / scale, strict=True))
            normalised = yoto.composite_loss(scaled, mu)
            if present is not None:
                shared = yoto.composite_loss(scaled, mu, present=present)
                normalised = jnp.where(config.learn, shared, normalised)
            relative = yoto.loss_weights(mu)
            primary = relative[task.primary]
            plain = sum(relative[n] / primary * scaled[n] for n in task.names)
            total = jnp.where(config.exponential, plain, normalised)
            return total, (losses, means, present)

        (slopes, slope), (losses, means, present) = jax.grad(
            composite, argnums=(0, 1), has_aux=True
        )(carry.model, state.mu)
        weights = self.weights(task, state.mu, config)
        alpha = task.schedule(carry.step)
        decay = optax.tree.scale(config.rho, self.decay(state.mu, config, present))
        coupled = optax.tree.scale(jnp.where(config.coupled, alpha, 0.0), decay)
        slope = jax.tree.map(jnp.add, slope, coupled)
        by_adam, adam = optax.scale_by_adam().update(slope, state.adam)
        scaled_slope = optax.tree.scale(alpha, slope)
        by_momentum, momentum = optax.trace(0.9).update(scaled_slope, state.momentum)
        move = jax.tree.map(
            lambda m, a, t, d: (
                m
                - config.learn
                * config.rate
                * (
                    jnp.where(config.sgd, t, alpha * a)
                    + jnp.where(config.coupled, 0.0, alpha * d)
                )
            ),
            state.mu,
            by_adam,
            by_momentum,
            decay,
        )
        moved = SoftmaxState(move, adam, momentum, means)
        if present is not None:
            moved = choose_present(present, moved, state)
        return Step(losses, weights, slopes, moved)

    @staticmethod
    def weights(task: Task, mu: yoto.LossLogits, config: Switches) -> Losses:
        weights = yoto.loss_weights(mu)
        scale = jnp.where(config.exponential, weights[task.primary], 1.0)
        return {name: weights[name] / scale for name in task.names}

    @staticmethod
    def decay(
        mu: yoto.LossLogits, config: Switches, present: Present
    ) -> yoto.LossLogits:
        """Gradient of the regulariser, its parts switched on and off."""

        def regularizer(mu: yoto.LossLogits) -> jax.Array:
            softplus = jnp.sum(jax.nn.softplus(mu.learned))
            of = lambda entropy: yoto.regularizer(mu, entropy=entropy, present=present)
            spanning_all = of("all") - softplus
            auxiliary = of("auxiliary") - softplus
            of_entropy = jnp.where(config.auxiliary, auxiliary, spanning_all)
            entropy = jnp.where(config.entropy, of_entropy, 0.0)
            return entropy + jnp.where(config.softplus, softplus, 0.0)

        return jax.grad(regularizer)(mu)
