"""Training with a learning rate that is right, too small or too large: runs in lanes.

All runs of a seed see the same batches. Rates, and whether weights are learned, differ
between lanes; the optimizer, the problem and the noise between programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.training import PyTree, schedule
from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.frontier import physics, problems
from benchmarks.tasks.frontier.problem import Problem
from benchmarks.tasks.learning_rate import guards
from benchmarks.tasks.pinn import task as pinn

Transformation = optax.GradientTransformation
LOGITS_RATE = 5e-3
"""Of the loss logits, whatever that of the model: it alone is at question."""

DECAY = 1e-4
"""Of the weights."""


class Lanes(NamedTuple):
    """What differs between the runs of a program [runs]."""

    rate: jax.Array  # of the model
    scheduled: jax.Array  # 1 for a warm-up and a cosine, 0 for a constant
    learn: jax.Array  # 1 to learn the weights, 0 to keep equal ones
    guard: guards.Guard


def _rate(lane: Lanes, steps: int, peak: Any) -> optax.Schedule:
    falling = schedule(1.0, steps)
    # One step on: some optimizers divide by a rate, which must not be 0.
    share = lambda count: jnp.where(lane.scheduled > 0, falling(count + 1), 1.0)
    return lambda count: peak * share(count)


def _adamw(lane: Lanes, steps: int) -> Transformation:
    return optax.adamw(_rate(lane, steps, lane.rate), weight_decay=DECAY)


def _schedule_free(lane: Lanes, steps: int) -> Transformation:
    return optax.contrib.schedule_free_adamw(
        lane.rate, warmup_steps=steps // 20 + 1, weight_decay=DECAY
    )


def _prodigy(lane: Lanes, steps: int) -> Transformation:
    return optax.contrib.prodigy(_rate(lane, steps, 1.0), weight_decay=DECAY)


def _dadapt(lane: Lanes, steps: int) -> Transformation:
    return optax.contrib.dadapt_adamw(_rate(lane, steps, 1.0), weight_decay=DECAY)


PROGRAMS: dict[str, Callable[[Lanes, int], Transformation]] = {
    "adamw": lambda lane, steps: guards.guarded(_adamw(lane, steps), lane.guard),
    "mechanize": lambda lane, steps: optax.contrib.mechanize(_adamw(lane, steps)),
    "schedule_free": _schedule_free,
    "prodigy": _prodigy,
    "dadapt": _dadapt,
}
"""Optimizers of the model by name, each compiled once for all its lanes."""


# Problems.

USUAL = {"digits": 3e-3, "digits_full": 3e-3, "mnist1d": 5e-3, "burgers_full": 5e-3}
"""The learning rate of a problem that others are multiples of."""

STEPS = {"digits": 1000, "digits_full": 500, "mnist1d": 4000, "burgers_full": 1000}
AT_ONCE = {"mnist1d": 3}
"""Seeds that train in one program, of problems that take long; all by default."""
BATCH = 32
FULL = 128
POINTS = (16, 16)


@functools.cache
def digits_problem(preset: str, noise: bool) -> Problem:
    """The digits with small batches, or with one batch that is all there is."""
    problem = problems.make("digits", preset)
    draw = functools.partial(_draw, BATCH if noise else FULL)
    return problem._replace(task=dataclasses.replace(problem.task, draw=draw))


def _draw(n: int, data: PyTree, key: jax.Array) -> tuple[jax.Array, ...]:
    key_rows, key_view = jax.random.split(key)
    chosen = jax.random.choice(key_rows, data.rows.train, (n,))
    images = data.pool.images[chosen]
    return images, data.pool.labels[chosen], digits.stylise(key_view, images)


@functools.cache
def burgers_problem() -> Problem:
    """Burgers' equation with a small network, for points that are drawn once."""
    test, validation = (physics.Known(*points) for points in pinn.references())
    equation = physics.Equation(
        name="burgers",
        names=pinn.LOSSES,
        draw=lambda key: pinn.draw_batch(key, POINTS, 32),
        losses=pinn.losses,
        test=test,
        validation=validation,
        kernel=pinn.ntk_diagonal,
    )
    size = physics.Size(2000, 20, 3, POINTS, 32, 64, 1)
    return physics.problem(equation, size, 5e-3, ((1, 1),) * 2)


NOISY = ("digits", "mnist1d")
"""Problems whose steps have batches of their own."""


def make(name: str, preset: str) -> tuple[Problem, bool]:
    """A problem, and whether every step has a batch of its own."""
    noise = name in NOISY
    if name == "burgers_full":
        return burgers_problem(), noise
    if name == "mnist1d":
        return problems.make(name, preset), noise
    return digits_problem(preset, noise), noise


# Training.


class Outcome(NamedTuple):
    """What is known of trained runs, [seeds, runs] each."""

    scores: dict[str, np.ndarray]
    log_scale: np.ndarray  # [seeds, runs, points], over the steps; 0 if there is none
    loss: np.ndarray  # [seeds, runs, points], all losses with weight 1


class _Runs(NamedTuple):
    """Runs of one seed under way, [runs] each."""

    model: jax.Array  # all parameters in a row: few kernels, quick to compile
    mu: yoto.LossLogits
    mu_state: PyTree
    states: dict[str, PyTree]  # of the optimizers, by program


Groups = dict[str, Lanes]
"""Runs by their program. All share one gradient, each program steps on its own."""


def train(
    name: str,
    preset: str,
    groups: Groups,
    seeds: Sequence[int],
    steps: int,
    points: int,
) -> Outcome:
    """Train runs with all seeds, and score them.

    Args:
      name: Of the problem.
      preset: Its size.
      groups: The runs.
      seeds: Each has data, initialisation and batches of its own.
      steps: Gradient evaluations.
      points: Stretches that the histories are averaged over.
    """
    problem, noise = make(name, preset)
    numbers = jnp.asarray(seeds)
    # Not as a dictionary: JAX would sort its keys, and the lanes with them.
    programs, lanes = tuple(groups), tuple(groups.values())
    models, seen = _train(problem, noise, steps, points, programs, lanes, numbers)
    runs = sum(len(lanes.rate) for lanes in groups.values())
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), models)
    scored = problem.scores(flat, jnp.repeat(numbers, runs))
    scores = {k: np.asarray(x).reshape(-1, runs) for k, x in scored.items()}
    loss, scale = (np.moveaxis(np.asarray(x), 0, -1) for x in seen)
    return Outcome(scores, scale, loss)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train(
    problem: Problem,
    noise: bool,
    steps: int,
    points: int,
    programs: tuple[str, ...],
    lanes_of: tuple[Lanes, ...],
    seeds: jax.Array,
) -> Any:
    task = problem.task
    of_logits = yoto.adamw(LOGITS_RATE)
    zeros = dict.fromkeys(task.names, 0.0)
    like = optax.tree.zeros_like(jax.eval_shape(task.init, jax.random.key(0)))
    _, as_model = jax.flatten_util.ravel_pytree(like)
    groups = dict(zip(programs, lanes_of, strict=True))
    runs = _joined(groups.values())
    ends = np.cumsum([len(lanes.rate) for lanes in groups.values()])
    own = {
        program: slice(end - len(lanes.rate), end)
        for (program, lanes), end in zip(groups.items(), ends, strict=True)
    }

    def init(seed: jax.Array) -> _Runs:
        model, _ = jax.flatten_util.ravel_pytree(task.init(jax.random.key(seed)))
        models = jnp.tile(model, (ends[-1], 1))
        epsilon = jnp.where(runs.learn > 0, 0.1, 1.0)
        mu = jax.vmap(lambda e: yoto.init_loss_logits(zeros, task.primary, epsilon=e))(
            epsilon
        )
        states = {
            program: jax.vmap(
                lambda lane, x, make=PROGRAMS[program]: make(lane, steps).init(x)
            )(lanes, models[own[program]])
            for program, lanes in groups.items()
        }
        return _Runs(models, mu, jax.vmap(of_logits.init)(mu), states)

    def objective(model: jax.Array, mu: yoto.LossLogits, batch: PyTree) -> Any:
        losses, _ = task.losses_of(as_model(model), batch)
        return yoto.composite_loss(losses, mu), sum(losses.values())

    slopes = jax.vmap(
        jax.grad(objective, argnums=(0, 1), has_aux=True), in_axes=(0, 0, None)
    )

    def step(carry: _Runs, batch: PyTree) -> tuple[_Runs, Any]:
        (of_models, of_mu), total = slopes(carry.model, carry.mu, batch)
        made, states, scales = [], {}, []
        for program, lanes in groups.items():

            def update(lane: Lanes, *at: PyTree, make: Any = PROGRAMS[program]) -> Any:
                return make(lane, steps).update(*at)

            rows = own[program]
            updates, states[program] = jax.vmap(update)(
                lanes, of_models[rows], carry.states[program], carry.model[rows]
            )
            made.append(updates)
            still = jnp.zeros(len(lanes.rate))
            scales.append(getattr(states[program], "log_scale", still))
        model = carry.model + jnp.concatenate(made)
        updates, mu_state = jax.vmap(of_logits.update)(of_mu, carry.mu_state, carry.mu)
        learned = lambda m, u: m + runs.learn[:, None] * u
        mu = jax.tree.map(learned, carry.mu, updates)
        return _Runs(model, mu, mu_state, states), (total, jnp.concatenate(scales))

    def of_seed(seed: jax.Array, carry: _Runs, number: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), number if noise else 0)
        return step(carry, task.draw(task.of_seed(task.data, seed), key))

    def all_seeds(carry: _Runs, number: jax.Array) -> Any:
        return jax.vmap(of_seed, in_axes=(0, 0, None))(seeds, carry, number)

    def stretch(carry: _Runs, numbers: jax.Array) -> Any:
        carry, seen = jax.lax.scan(all_seeds, carry, numbers)
        return carry, jax.tree.map(lambda x: x.mean(axis=0), seen)

    carry = jax.vmap(init)(seeds)
    numbers = jnp.arange(steps).reshape(points, -1)
    carry, seen = jax.lax.scan(stretch, carry, numbers)
    models = [
        jax.vmap(jax.vmap(_evaluated))(carry.states[program], carry.model[:, rows])
        for program, rows in own.items()
    ]
    models = jax.vmap(jax.vmap(as_model))(jnp.concatenate(models, axis=1))
    return models, seen


def _joined(lanes: Iterable[Lanes]) -> Lanes:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *lanes)


def _evaluated(state: PyTree, model: jax.Array) -> jax.Array:
    """The parameters that a model is used with."""
    if isinstance(state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(state, model)
    return model
