"""One task and the ways to train it: losses, rules, and programs for runs side by side.

Runs of one rule share a compiled program and train side by side, in lanes. A run
depends on nothing but the task, its rule, configuration and seed: not on its lane.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness import lanes as lane_devices

PyTree = Any
Losses = dict[str, jax.Array]
Present = dict[str, Any] | None
"""Which losses a batch has; ``None`` for all."""

Measured = dict[tuple[str, str | None], np.ndarray]
"""Values [lanes] by metric and domain."""

DOWNSTREAM = "held out"


class Size(NamedTuple):
    """How large a benchmark is."""

    steps: int
    height: int
    width: int
    train_images: int  # of procedural scenes; a folder has as many as it has
    test_images: int
    batch: int
    features: int
    blocks: int
    lanes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained.

    Attributes:
      name: Name of the benchmark.
      settings: What the results depend on: goes to the file of the runs.
      primary: The primary loss.
      auxiliary: The other losses, in the order of configurations.
      data: Arrays that a batch is drawn from.
      init: ``init(key) -> model``.
      draw: ``draw(data, key) -> batch``.
      draw_held_out: The same from held-out data, for a rule that is steered by them.
      encode: ``encode(model, batch) -> z``.
      losses: ``losses(model, z, batch) -> losses`` by name, or ``yoto.MaskedLosses`` of
        them where a batch may lack the labels of some.
      downstream: ``downstream(model, z, batch) -> loss`` on held-out data.
      validate: ``validate(models) -> values [lanes]``, what searches go by; more is
        better.
      test: ``test(models) -> values [lanes]`` by metric and domain.
      steps: Training steps of a run.
      learning_rate: Peak of the schedule.
      weight_decay: Of AdamW.
      lanes: How many runs train side by side.
      of_seed: ``of_seed(data, seed) -> data`` that ``draw`` gets: where seeds have data
        of their own, the part of one seed. By default all of it.
      statistics: What a weighting may look at besides gradients, by name: functions of
        model and batch.
    """

    name: str
    settings: dict[str, Any]
    primary: str
    auxiliary: tuple[str, ...]
    data: PyTree
    init: Callable[[jax.Array], PyTree]
    draw: Callable[[PyTree, jax.Array], PyTree]
    draw_held_out: Callable[[PyTree, jax.Array], PyTree]
    encode: Callable[[PyTree, PyTree], PyTree]
    losses: Callable[[PyTree, PyTree, PyTree], Any]
    downstream: Callable[[PyTree, PyTree, PyTree], jax.Array]
    validate: Callable[[PyTree], np.ndarray]
    test: Callable[[PyTree], Measured]
    steps: int
    learning_rate: float
    weight_decay: float
    lanes: int
    of_seed: Callable[[PyTree, jax.Array], PyTree] = lambda data, seed: data
    statistics: Mapping[str, Callable[[PyTree, PyTree], PyTree]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The losses, the primary one first."""
        return (self.primary, *self.auxiliary)

    def losses_of(self, model: PyTree, batch: PyTree) -> tuple[Losses, Present]:
        """The losses of a batch, and which of them it has."""
        return values_and_present(self.losses_of_batch(model, batch))

    def losses_of_batch(self, model: PyTree, batch: PyTree) -> Any:
        """The losses of a batch, masked where it may lack some."""
        return self.losses(model, self.encode(model, batch), batch)

    def steered_losses(self, model: PyTree, batch: PyTree, held_out: bool) -> Any:
        """The losses of a batch and the downstream one, for rules that are steered.

        In training the downstream loss has no weight: 0 stands for it.
        """
        z = self.encode(model, batch)
        losses, present = values_and_present(self.losses(model, z, batch))
        downstream = self.downstream(model, z, batch) if held_out else jnp.zeros(())
        losses = {**losses, DOWNSTREAM: downstream}
        if present is None:
            return losses
        return yoto.MaskedLosses(losses, {**present, DOWNSTREAM: True})

    def measure(self, models: PyTree) -> Measured:
        """All that is measured of trained models, by metric and domain."""
        return self.test(models) | {("validation", None): self.validate(models)}

    def schedule(self, step: Any) -> jax.Array:
        """The learning rate of a step."""
        return jnp.asarray(schedule(self.learning_rate, self.steps)(step))

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adamw(self.schedule, weight_decay=self.weight_decay)


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to a hundredth."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, steps // 20 + 1, steps + 1, peak / 100
    )


def values_and_present(losses: Any) -> tuple[Losses, Present]:
    """Losses without their flags, and the flags."""
    return losses if isinstance(losses, yoto.MaskedLosses) else (losses, None)


# Rules.


class Step(NamedTuple):
    """What a rule makes of a batch."""

    losses: Losses
    weights: Losses
    grads: PyTree
    state: Any


class Rule:
    """How losses become a gradient."""

    @property
    def training(self) -> "Rule":
        """The rule that trains, if this one differs only in what comes after."""
        return self

    def configure(self, configs: Sequence[dict[str, Any]]) -> PyTree:
        """The configurations as arrays with an axis of lanes."""
        if any(configs):
            raise ValueError("this rule has no configuration")
        return jnp.zeros(len(configs))

    def init_model(self, task: Task, key: jax.Array) -> PyTree:
        """What is trained: the model, and what the rule adds to it."""
        return task.init(key)

    def optimizer(self, task: Task) -> optax.GradientTransformation:
        """What steps on the gradient."""
        return task.optimizer()

    def init(self, task: Task, config: PyTree) -> Any:
        """The rule's own state."""
        raise NotImplementedError

    def step(
        self, task: Task, data: PyTree, carry: "Carry", config: PyTree, key: jax.Array
    ) -> Step:
        """Losses, weights, gradient and new state for one step of one lane."""
        raise NotImplementedError

    def after(self, task: Task, carry: "Carry", part: int, parts: int) -> "Carry":
        """What happens on the host after each part of the training, to all lanes."""
        del task, part, parts
        return carry

    def finish(
        self, task: Task, carry: "Carry", seeds: jax.Array
    ) -> tuple[PyTree, dict[str, np.ndarray] | None]:
        """The trained models, and the weights [lanes] that they are for, if chosen."""
        del task, seeds
        return carry.model, None


class Carry(NamedTuple):
    """A run under way."""

    step: jax.Array
    model: PyTree
    optimizer: optax.OptState
    rule: Any


class Program(NamedTuple):
    """Compiled: ``init(seeds, config)`` and ``advance(carry, data, seeds, config)``."""

    init: Any
    advance: Any
    chunks: int


def prepare(
    task: Task,
    rule: Rule,
    config: PyTree,
    lanes: int,
    length: int | None = None,
    devices: lane_devices.Devices | None = None,
) -> Program:
    """Compile a rule for so many lanes; ``length`` steps at a time.

    The lanes are spread over the devices (default: ``lanes.default_devices``), over as
    many of them as divide their number.
    """
    chunks = next(n for n in range(10, 0, -1) if task.steps % n == 0)
    length = length or task.steps // chunks
    shapes = jax.eval_shape(lambda x: x, (task.data, jnp.arange(lanes), config))
    leaves, structure = jax.tree.flatten(shapes)
    mesh = lane_devices.mesh(devices or lane_devices.default_devices(), lanes)
    made = _compile(task, rule.training, length, structure, tuple(leaves), mesh)
    return Program(*made, chunks)


@functools.cache
def _compile(
    task: Task,
    rule: Rule,
    length: int,
    structure: Any,
    leaves: tuple[Any, ...],
    mesh: jax.sharding.Mesh | None,
) -> tuple[Any, Any]:
    optimizer = rule.optimizer(task)

    def init_one(seed: jax.Array, config: PyTree) -> Carry:
        return _begin(task, rule, seed, config)

    def advance_one(
        data: PyTree, carry: Carry, seed: jax.Array, config: PyTree
    ) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), carry.step)
        own = task.of_seed(data, seed)
        made = rule.step(task, own, carry, config, key)
        updates, state = optimizer.update(made.grads, carry.optimizer, carry.model)
        model = optax.apply_updates(carry.model, updates)
        vector = lambda tree: jnp.stack([tree[name] for name in task.names])
        seen = (vector(made.losses), vector(made.weights))
        return Carry(carry.step + 1, model, state, made.state), seen

    def advance(
        carry: Carry, data: PyTree, seeds: jax.Array, config: PyTree
    ) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        one = functools.partial(advance_one, data)
        lanes = lambda carry, _: jax.vmap(one)(carry, seeds, config)
        return jax.lax.scan(lanes, carry, length=length)

    arguments = structure.unflatten(leaves)
    return lane_devices.programs(jax.vmap(init_one), advance, arguments, mesh)


def _begin(task: Task, rule: Rule, seed: jax.Array, config: PyTree) -> Carry:
    """A run at its start."""
    model = rule.init_model(task, jax.random.key(seed))
    state = rule.optimizer(task).init(model)
    return Carry(jnp.zeros((), jnp.int32), model, state, rule.init(task, config))


def operations(task: Task, rule: Rule, config: dict[str, Any]) -> float:
    """Floating-point operations of one compiled step of one lane."""
    arrays = jax.tree.map(lambda x: x[0], rule.configure([config]))
    seed = jnp.zeros((), jnp.int32)

    def take(carry: Carry, data: PyTree, key: jax.Array) -> Step:
        return rule.step(task, task.of_seed(data, seed), carry, arrays, key)

    carry = jax.eval_shape(lambda: _begin(task, rule, seed, arrays))
    step = jax.jit(take).lower(carry, task.data, jax.random.key(0)).compile()
    return float(step.cost_analysis()["flops"])
