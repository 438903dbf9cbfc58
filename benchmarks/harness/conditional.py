"""One model for every weighting, and the weighting chosen when it is trained.

The network of the task stays as it is: FiLM of all its layers, folded into parameters,
makes a model for one weighting of it, which is measured like any other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.training import DOWNSTREAM, Carry, Losses, Rule, Step, Task
from yoto_jax import conditional

PyTree = Any
Where = Callable[[Any, jax.Array], bool]
Pick = Literal["validation", "yoto", "grap", "gradient"]

HIDDEN = (32,)
NARROWED_AT = (0.4, 0.6, 0.8)  # shares of the training
FACTOR = 0.5
CANDIDATES = 25  # weightings, about, that are tried on validation data
PICK_STEPS = 100
PICK_RATE = 0.05


class Conditional(Rule):
    """Weights drawn anew in each step; a model that is told them."""

    def __init__(
        self,
        bounds: Sequence[tuple[float, float]],
        groups: int = 1,
        where: Where | None = None,
    ):
        """A rule.

        Args:
          bounds: Of the auxiliary losses' weights relative to the primary one.
          groups: How many draws a step makes, each for a part of the batch.
          where: Which parameters are modulated (default: all).
        """
        self.bounds, self.groups, self.where = tuple(bounds), groups, where

    def support(self, task: Task) -> conditional.LogUniform:
        low, high = (
            dict(zip(task.names, (1.0, *ends), strict=True))
            for ends in zip(*self.bounds, strict=True)
        )
        return conditional.LogUniform(low, high)

    def init_model(self, task: Task, key: jax.Array) -> PyTree:
        net = task.init(key)
        own = jax.random.fold_in(key, 1)
        size = conditional.encoding_size(self.support(task))
        modulation = conditional.init_modulation(
            own, size, net, hidden=HIDDEN, where=self.where
        )
        return {"net": net, "modulation": modulation}

    def init(self, task: Task, config: PyTree) -> conditional.LogUniform:
        del config
        return self.support(task)

    def model(self, task: Task, trained: PyTree, weights: PyTree) -> PyTree:
        """The plain model for one weighting."""
        encoding = conditional.encode(weights, self.support(task))
        return conditional.modulated(trained["net"], trained["modulation"], encoding)

    def step(
        self, task: Task, data: PyTree, carry: Carry, config: PyTree, key: jax.Array
    ) -> Step:
        del config
        batch = task.draw(data, key)
        own = jax.random.fold_in(key, 2)
        weights = carry.rule.sample(own, self.groups, method="sobol")

        def objective(trained: PyTree) -> tuple[jax.Array, Losses]:
            def of_group(weights: PyTree, batch: PyTree) -> Losses:
                model = self.model(task, trained, weights)
                return task.losses_of(model, batch)[0]  # 0 stands for an absent one.

            if self.groups == 1:  # Not every batch can be cut into groups.
                alone = of_group({n: w[0] for n, w in weights.items()}, batch)
                losses = {name: loss[None] for name, loss in alone.items()}
            else:
                cut = lambda x: x.reshape(self.groups, -1, *x.shape[1:])
                losses = jax.vmap(of_group)(weights, jax.tree.map(cut, batch))
            loss = conditional.conditional_loss(losses, weights, normalize="sum")
            return loss, jax.tree.map(jnp.mean, losses)

        grads, losses = jax.grad(objective, has_aux=True)(carry.model)
        drawn = jax.tree.map(jnp.mean, normalized(weights))
        return Step(losses, drawn, grads, carry.rule)


class Chosen(Rule):
    """A conditional model, and a way to choose the weights that it is used with."""

    def __init__(
        self,
        conditional: Conditional,
        pick: Pick = "validation",
        *,
        narrowing: bool = False,
    ):
        """A rule.

        Args:
          conditional: Trains the model; several ways to choose share its programs.
          pick: Who chooses the weights when the model is trained: a sweep on validation
            data; YOTO or GraP, run on the model conditioned on their own weights; or
            the gradient of the held-out objective through the conditioning.
          narrowing: Whether training narrows the range around what validates best.
        """
        self.conditional, self.pick, self.narrowing = conditional, pick, narrowing

    @property
    def training(self) -> Rule:
        return self.conditional

    def after(self, task: Task, carry: Carry, part: int, parts: int) -> Carry:
        due = [round(share * parts) for share in NARROWED_AT]
        if not self.narrowing or part not in due:
            return carry
        best = self.best(task, carry)
        support = self.conditional.support(task)
        return carry._replace(rule=_narrowed(carry.rule, best, support))

    def finish(
        self, task: Task, carry: Carry, seeds: jax.Array
    ) -> tuple[PyTree, dict[str, np.ndarray]]:
        if self.pick == "validation":
            chosen = self.best(task, carry)
        else:
            lanes = (carry.model, seeds)
            chosen = picked(self.pick, self.conditional, task, task.data, lanes)
        models = _all_models(self.conditional, task, carry.model, chosen)
        share = jax.device_get(normalized(chosen))
        return models, {name: np.asarray(share[name]) for name in task.names}

    @property
    def side(self) -> int:
        """Points of a grid along every range."""
        return max(2, round(CANDIDATES ** (1 / len(self.conditional.bounds))))

    @property
    def looks(self) -> int:
        """How many models of a lane are looked at on validation data."""
        grids = self.narrowing * len(NARROWED_AT) + (self.pick == "validation")
        return grids * self.side ** len(self.conditional.bounds)

    def best(self, task: Task, carry: Carry) -> PyTree:
        """The weights [lanes] that validate best, of a grid over the present range."""
        grid = lambda now: now.grid(self.side)
        candidates = jax.vmap(grid)(carry.rule)  # [lanes, points]
        points = len(jax.tree.leaves(candidates)[0][0])
        scores = []
        for i in range(points):
            weights = jax.tree.map(lambda x, i=i: x[:, i], candidates)
            models = _all_models(self.conditional, task, carry.model, weights)
            scores.append(task.validate(models))
        ranked = np.nan_to_num(np.stack(scores), nan=-np.inf)
        best = jnp.asarray(ranked.argmax(axis=0))
        lanes = jnp.arange(len(best))
        return jax.tree.map(lambda x: x[lanes, best], candidates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _all_models(
    rule: Conditional, task: Task, trained: PyTree, weights: PyTree
) -> PyTree:
    """The plain models [lanes] for weights [lanes]."""
    return jax.vmap(functools.partial(rule.model, task))(trained, weights)


@jax.jit
def _narrowed(
    now: conditional.LogUniform, best: PyTree, support: conditional.LogUniform
) -> conditional.LogUniform:
    """Narrower ranges [lanes] around the best weights [lanes]."""
    narrow = lambda now, best: conditional.narrow(now, best, FACTOR, support=support)
    return jax.vmap(narrow)(now, best)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def picked(
    pick: Pick, rule: Conditional, task: Task, data: PyTree, lanes: Any
) -> PyTree:
    """Weights [lanes] that somebody picks for trained models [lanes] and seeds."""
    picker = {"yoto": _yoto, "grap": _grap, "gradient": _gradient}[pick]

    def of_lane(lane: tuple[PyTree, jax.Array]) -> PyTree:
        trained, seed = lane
        return picker(rule, task, task.of_seed(data, seed), trained, seed)

    return jax.lax.map(of_lane, lanes)


def normalized(weights: PyTree) -> PyTree:
    """The same weights with sum 1."""
    total = sum(jax.tree.leaves(weights))
    return jax.tree.map(lambda w: w / total, weights)


# Who picks. Each sees the trained model of one lane and its seed, and gives weights
# relative to the primary loss.


def _relative(task: Task, weights: Losses, support: conditional.LogUniform) -> PyTree:
    """Weights relative to the primary one, inside the support."""
    tiny = jnp.finfo(jnp.float32).tiny
    primary = jnp.maximum(weights[task.primary], tiny)
    vector = support.vectors({n: weights[n] / primary for n in task.names})
    return support.tree(jnp.clip(vector, support.low, support.high))


def _yoto(
    rule: Conditional, task: Task, data: PyTree, trained: PyTree, seed: jax.Array
) -> PyTree:
    """YOTO with its defaults, each step at the model for the weights of the moment."""
    support = rule.support(task)
    zeros = dict.fromkeys(task.names, jnp.zeros(()))
    mu = yoto.init_loss_logits(zeros, task.primary)
    tx = yoto.adamw(PICK_RATE)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        mu, state = carry
        batch = task.draw(data, key)
        weights = _relative(task, yoto.loss_weights(mu), support)
        model = rule.model(task, trained, weights)
        losses, present = task.losses_of(model, batch)
        used = {name: losses[name] for name in task.names}
        composite = lambda mu: yoto.composite_loss(used, mu, present=present)
        updates, state = tx.update(jax.grad(composite)(mu), state, mu, present=present)
        return (optax.apply_updates(mu, updates), state), None

    (mu, _), _ = jax.lax.scan(step, (mu, tx.init(mu)), _keys(seed))
    return _relative(task, yoto.loss_weights(mu), support)


def held_out_grap() -> yoto.LossWeighting:
    """GraP steered by the downstream loss, with our settings."""
    return yoto.weightings.grap(
        DOWNSTREAM, gramian_decay=0.9, norm_decay=0.9, regularization=1.0
    )


def _grap(
    rule: Conditional, task: Task, data: PyTree, trained: PyTree, seed: jax.Array
) -> PyTree:
    """GraP, each step at the model for the weights of the moment."""
    support = rule.support(task)
    weighting = held_out_grap()
    steering = yoto.on_validation(all_losses=True)
    value_and_grad = yoto.value_and_grad(
        task.steered_losses, weighting, steering=steering
    )

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        batch = task.draw(data, key)
        held_out = task.draw_held_out(data, jax.random.fold_in(key, 1))
        weights = _relative(task, _weights_of(state, task), support)
        model = rule.model(task, trained, weights)
        _, _, state = value_and_grad(model, state, (held_out, True), batch, False)
        return state, None

    state = weighting.init(dict.fromkeys((*task.names, DOWNSTREAM), 0.0))
    state, _ = jax.lax.scan(step, state, _keys(seed))
    return _relative(task, _weights_of(state, task), support)


def _weights_of(state: Any, task: Task) -> Losses:
    weights = optax.tree.get(state, "loss_weights")
    return {name: weights[name] for name in task.names}


def _gradient(
    rule: Conditional, task: Task, data: PyTree, trained: PyTree, seed: jax.Array
) -> PyTree:
    """Descend the held-out objective of the model, as a function of the weights."""
    support = rule.support(task)
    tx = optax.adam(PICK_RATE)

    def weights_at(place: jax.Array) -> PyTree:
        return support.tree(support.at(jax.nn.sigmoid(place)))

    def held_out(place: jax.Array, key: jax.Array) -> jax.Array:
        batch = task.draw_held_out(data, key)
        model = rule.model(task, trained, weights_at(place))
        return task.downstream(model, task.encode(model, batch), batch)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        place, state = carry
        updates, state = tx.update(jax.grad(held_out)(place, key), state)
        return (place + updates, state), None

    place = jnp.zeros(len(task.names))  # The middle of every range.
    (place, _), _ = jax.lax.scan(step, (place, tx.init(place)), _keys(seed))
    return weights_at(place)


def _keys(seed: jax.Array) -> jax.Array:
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 3), PICK_STEPS)


def rules(
    bounds: Sequence[tuple[float, float]], groups: int = 1, where: Where | None = None
) -> dict[str, Rule]:
    """A rule for each way of choosing, by name."""
    trained = Conditional(bounds, groups, where)
    return {
        "conditional": Chosen(trained),
        "conditional-narrowed": Chosen(trained, narrowing=True),
        "conditional-yoto": Chosen(trained, "yoto"),
        "conditional-grap": Chosen(trained, "grap"),
        "conditional-gradient": Chosen(trained, "gradient"),
    }


LABELS = {
    "conditional": "conditional, best by validation",
    "conditional-narrowed": "conditional, narrowed by validation",
    "conditional-yoto": "conditional, YOTO picks",
    "conditional-grap": "conditional, GraP picks",
    "conditional-gradient": "conditional, held-out gradient picks",
}
