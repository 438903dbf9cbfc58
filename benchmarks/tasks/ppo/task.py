"""Proximal policy optimization: a policy's, a value function's and an entropy's loss.

Actor and critic share a trunk. The loss of the policy has no meaning as a number, and
any sign; the entropy's is negative; only the value's is what most weightings expect.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import yoto_jax as yoto
from benchmarks.harness.options import UsageError
from benchmarks.tasks.ppo.methods import LOSSES

PyTree = Any
DISCOUNT, TRACE = 0.99, 0.95  # gamma and lambda of the advantages
CLIP = 0.2
LARGEST_NORM = 0.5
EVEN = {"policy": 0.0, "value": 0.0, "entropy": 0.0}


class Transition(NamedTuple):
    """What an environment answers."""

    observation: jax.Array  # of the next step: that of a new episode after the last
    reward: jax.Array
    terminated: jax.Array  # the episode is over
    truncated: jax.Array  # its time is
    final: jax.Array  # observation before a new episode began


class Environment(NamedTuple):
    """``reset(key) -> (observation, state)``, ``step(key, state, action) -> ...``."""

    reset: Callable[[jax.Array], tuple[jax.Array, PyTree]]
    step: Callable[[jax.Array, PyTree, jax.Array], tuple[Transition, PyTree]]
    actions: int


class Size(NamedTuple):
    """How long it is trained, and on how much."""

    updates: int
    environments: int
    length: int  # steps of each environment between updates
    epochs: int
    parts: int  # batches of an epoch
    width: int
    learning_rate: float


def gym(name: str) -> Environment:
    """An environment of gymnax."""
    try:
        gymnax = importlib.import_module("gymnax")
    except ImportError as error:
        raise UsageError(
            f"ppo needs gymnax, and six: pip install 'yoto_jax[rl]' ({error})"
        ) from None
    made, params = gymnax.make(name)

    def step(
        key: jax.Array, state: PyTree, action: jax.Array
    ) -> tuple[Transition, PyTree]:
        seen, state, reward, terminated, truncated, info = made.step(
            key, state, action, params
        )
        final = info["final_observation"]
        return Transition(seen, reward, terminated, truncated, final), state

    return Environment(lambda key: made.reset(key, params), step, made.num_actions)


# Networks.


def init_model(key: jax.Array, inputs: int, actions: int, width: int) -> PyTree:
    """Two hidden layers that are shared, and a layer for each head."""
    layer = lambda key, n, m, scale: {
        "w": jax.nn.initializers.orthogonal(scale)(key, (n, m)),
        "b": jnp.zeros(m),
    }
    keys = jax.random.split(key, 4)
    return {
        "trunk": [
            layer(keys[0], inputs, width, 2**0.5),
            layer(keys[1], width, width, 2**0.5),
        ],
        "policy": layer(keys[2], width, actions, 0.01),
        "value": layer(keys[3], width, 1, 1.0),
    }


def predict(model: PyTree, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the actions' probabilities, and the value."""
    affine = lambda part, x: x @ part["w"] + part["b"]
    h = observation
    for part in model["trunk"]:
        h = jnp.tanh(affine(part, h))
    logits = jax.nn.log_softmax(affine(model["policy"], h))
    return logits, affine(model["value"], h)[..., 0]


class Batch(NamedTuple):
    """Steps of environments, on leading axes."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    advantage: jax.Array
    target: jax.Array


def loss_fn(model: PyTree, batch: Batch) -> dict[str, jax.Array]:
    """The three losses of PPO, as they are descended."""
    log_p, value = predict(model, batch.observation)
    chosen = jnp.take_along_axis(log_p, batch.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(chosen - batch.log_probability)
    a = batch.advantage
    a = (a - jnp.mean(a)) / (jnp.std(a) + 1e-8)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return {
        "policy": -jnp.mean(jnp.minimum(ratio * a, clipped * a)),
        "value": jnp.mean((value - batch.target) ** 2) / 2,
        "entropy": jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=1)),
    }


# Training.


class Run(NamedTuple):
    """A run under way."""

    model: PyTree
    optimizer: optax.OptState
    weights: Any
    environments: PyTree  # states
    observation: jax.Array
    score: jax.Array  # of the episodes under way, so far


class Curves(NamedTuple):
    """What is seen of an update."""

    episodes: jax.Array  # that ended
    total: jax.Array  # sum of their returns
    weights: jax.Array  # (3,), after the update


class Seen(NamedTuple):
    """One step of all environments."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    value: jax.Array
    following: jax.Array  # value of where the step led to, 0 where that is the end
    reward: jax.Array
    over: jax.Array
    score: jax.Array  # 0 but for episodes that ended


def train(
    environment: Environment, size: Size, weighting: yoto.LossWeighting, seed: jax.Array
) -> tuple[Run, Curves]:
    """A whole run; curves [updates, ...]."""
    key = jax.random.key(seed)
    keys = jax.random.split(jax.random.fold_in(key, 1), size.environments)
    observation, states = jax.vmap(environment.reset)(keys)
    model = init_model(key, observation.shape[-1], environment.actions, size.width)
    tx = optimizer(size)
    score = jnp.zeros(size.environments)
    run = Run(model, tx.init(model), weighting.init(EVEN), states, observation, score)
    update = _update(environment, size, weighting, tx)
    steps = jax.random.split(jax.random.fold_in(key, 2), size.updates)
    return jax.lax.scan(update, run, steps)


def optimizer(size: Size) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero, of gradients that are cut."""
    steps = size.updates * size.epochs * size.parts
    rate = optax.linear_schedule(size.learning_rate, 0.0, steps)
    return optax.chain(
        optax.clip_by_global_norm(LARGEST_NORM), optax.adam(rate, eps=1e-5)
    )


def _update(
    environment: Environment,
    size: Size,
    weighting: yoto.LossWeighting,
    tx: optax.GradientTransformation,
) -> Callable[[Run, jax.Array], tuple[Run, Curves]]:
    value_and_grad = yoto.value_and_grad(loss_fn, weighting)

    def learn(run: Run, batch: Batch) -> tuple[Run, None]:
        _, grads, weights = value_and_grad(run.model, run.weights, batch)
        updates, state = tx.update(grads, run.optimizer, run.model)
        model = optax.apply_updates(run.model, updates)
        return run._replace(model=model, optimizer=state, weights=weights), None

    def epoch(run: Run, key: jax.Array, batch: Batch) -> tuple[Run, None]:
        order = jax.random.permutation(key, len(batch.action))
        parts = jax.tree.map(
            lambda x: x[order].reshape(size.parts, -1, *x.shape[1:]), batch
        )
        return jax.lax.scan(learn, run, parts)

    def update(run: Run, key: jax.Array) -> tuple[Run, Curves]:
        act, mix = jax.random.split(key)
        run, seen = jax.lax.scan(
            lambda run, key: step(environment, run, key),
            run,
            jax.random.split(act, size.length),
        )
        batch = batch_of(seen)
        orders = jax.random.split(mix, size.epochs)
        run, _ = jax.lax.scan(lambda run, key: epoch(run, key, batch), run, orders)
        used = optax.tree.get(run.weights, "loss_weights")
        return run, Curves(
            jnp.sum(seen.over),
            jnp.sum(seen.score),
            jnp.stack([used[name] for name in LOSSES]),
        )

    return update


def step(environment: Environment, run: Run, key: jax.Array) -> tuple[Run, Seen]:
    """One step of every environment."""
    log_p, value = predict(run.model, run.observation)
    choose, go = jax.random.split(key)
    action = jax.random.categorical(choose, log_p)
    keys = jax.random.split(go, len(action))
    answer, states = jax.vmap(environment.step)(keys, run.environments, action)
    over = answer.terminated | answer.truncated
    _, following = predict(run.model, answer.final)
    score = run.score + answer.reward
    seen = Seen(
        run.observation,
        action,
        jnp.take_along_axis(log_p, action[:, None], axis=1)[:, 0],
        value,
        jnp.where(answer.terminated, 0.0, following),
        answer.reward,
        over,
        jnp.where(over, score, 0.0),
    )
    return run._replace(
        environments=states,
        observation=answer.observation,
        score=jnp.where(over, 0.0, score),
    ), seen


def batch_of(seen: Seen) -> Batch:
    """The steps of all environments in a row, with generalised advantages."""

    def back(later: jax.Array, now: Seen) -> tuple[jax.Array, jax.Array]:
        surprise = now.reward + DISCOUNT * now.following - now.value
        advantage = surprise + DISCOUNT * TRACE * jnp.where(now.over, 0.0, later)
        return advantage, advantage

    none = jnp.zeros_like(seen.value[0])
    _, advantage = jax.lax.scan(back, none, seen, reverse=True)
    batch = Batch(
        seen.observation,
        seen.action,
        seen.log_probability,
        advantage,
        advantage + seen.value,
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
