"""Train one task under many ways of weighting its losses, and lose nothing if killed.

A run is one model trained once: a rule, a configuration of it and a seed. Runs of one
rule share a compiled program and train side by side, in lanes. Every finished run is a
line in a file; ``--resume`` reads them back and continues a group of lanes that was
under way from where it was last saved. A run depends on nothing but the task, its rule,
configuration and seed: not on its lane, nor on when it was interrupted.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import yoto_jax as yoto
from benchmarks.harness import lanes as lane_devices
from benchmarks.harness.common import (
    append_line,
    console,
    read_lines,
    rounded,
    say,
    thinned_curves,
)

PyTree = Any
Losses = dict[str, jax.Array]
Measured = dict[tuple[str, str | None], np.ndarray]
"""Values [lanes] by metric and domain."""

DOWNSTREAM = "held out"
SAVE_SECONDS = 20.0
HISTORY_POINTS = 60
CHOOSING = "choosing"
"""Metric: what a rule spends on choosing weights, relative to training."""


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
      losses: ``losses(model, z, batch) -> losses`` by name.
      downstream: ``downstream(model, z, batch) -> loss`` on held-out data.
      validate: ``validate(models) -> values [lanes]``, what searches go by; more is
        better.
      test: ``test(models) -> values [lanes]`` by metric and domain.
      steps: Training steps of a run.
      learning_rate: Peak of the schedule.
      weight_decay: Of AdamW.
      lanes: How many runs train side by side.
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
    losses: Callable[[PyTree, PyTree, PyTree], Losses]
    downstream: Callable[[PyTree, PyTree, PyTree], jax.Array]
    validate: Callable[[PyTree], np.ndarray]
    test: Callable[[PyTree], Measured]
    steps: int
    learning_rate: float
    weight_decay: float
    lanes: int

    @property
    def names(self) -> tuple[str, ...]:
        """The losses, the primary one first."""
        return (self.primary, *self.auxiliary)

    def steered_losses(self, model: PyTree, batch: PyTree, held_out: bool) -> Losses:
        """The losses of a batch and the downstream one, for rules that are steered.

        In training the downstream loss has no weight: 0 stands for it.
        """
        z = self.encode(model, batch)
        losses = self.losses(model, z, batch)
        downstream = self.downstream(model, z, batch) if held_out else jnp.zeros(())
        return {**losses, DOWNSTREAM: downstream}

    def measure(self, models: PyTree) -> Measured:
        """All that is measured of trained models, by metric and domain."""
        return self.test(models) | {("validation", None): self.validate(models)}

    def schedule(self, step: Any) -> jax.Array:
        """Linear warm-up, then a cosine down to a hundredth."""
        peak = self.learning_rate
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, peak, self.steps // 20 + 1, self.steps + 1, peak / 100
        )
        return jnp.asarray(schedule(step))

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adamw(self.schedule, weight_decay=self.weight_decay)


# Rules.


class Step(NamedTuple):
    """What a rule makes of a batch."""

    losses: Losses
    weights: Losses
    grads: PyTree
    state: Any


class Rule:
    """How losses become a gradient."""

    side_by_side: bool = True
    """Whether lanes are one ``vmap``; else one after the other, so that work that is
    not due is not done."""

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


class Switches(NamedTuple):
    """Configuration of learned and of constant softmax weights, for one lane.

    The defaults are YOTO as the library has it. Scalars but for the first and the last.
    """

    ratios: Any  # [K] weights relative to the primary loss, at the start
    learn: Any = 1.0  # 0: the weights stay
    rho: Any = 10.0
    entropy: Any = 1.0  # factor on the negated entropy
    auxiliary: Any = 0.0  # 1: the entropy is over the auxiliary losses alone
    softplus: Any = 1.0  # factor on the softplus
    coupled: Any = 0.0  # 1: the decay goes through the moments, with alpha once more
    sgd: Any = 0.0  # 1: the logits step by momentum, as in Algorithm 1, not by Adam
    exponential: Any = 0.0  # 1: exp(mu) without the normalisation to sum 1
    rate: Any = 1.0  # learning rate of the logits relative to the model's
    normalize: Any = 0.0  # 1: losses are divided by their running means
    decay: Any = 0.99  # of those means; 1: divided by their first values
    factors: Any = 1.0  # [K + 1] or scalar: the losses come multiplied by these


class SoftmaxState(NamedTuple):
    mu: yoto.LossLogits
    adam: optax.OptState
    momentum: optax.OptState
    means: jax.Array  # [K + 1]


class Softmax(Rule):
    """Softmax weights, learned as in YOTO with variations, or constant.

    All of them are one program: lanes differ in numbers alone.
    """

    def configure(self, configs: Sequence[dict[str, Any]]) -> Switches:
        rows = [Switches(**config) for config in configs]
        most = max(np.size(row.factors) for row in rows)
        rows = [
            row._replace(factors=np.broadcast_to(row.factors, (most,))) for row in rows
        ]
        return jax.tree.map(
            lambda *x: jnp.asarray(np.stack([np.asarray(v, np.float32) for v in x])),
            *rows,
            is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x, Switches),
        )

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
        ) -> tuple[jax.Array, tuple[Losses, jax.Array]]:
            losses = task.losses(model, task.encode(model, batch), batch)
            vector = jnp.stack([losses[name] for name in task.names])
            vector = vector * jnp.broadcast_to(config.factors, vector.shape)
            losses = dict(zip(task.names, vector, strict=True))
            now = jax.lax.stop_gradient(vector)
            decay = jnp.where(carry.step == 0, 0.0, config.decay)
            means = decay * state.means + (1 - decay) * now
            scale = jnp.where(config.normalize > 0, means, 1.0)
            scaled = dict(zip(task.names, vector / scale, strict=True))
            normalised = yoto.composite_loss(scaled, mu)
            relative = yoto.loss_weights(mu)
            primary = relative[task.primary]
            plain = sum(relative[n] / primary * scaled[n] for n in task.names)
            total = jnp.where(config.exponential > 0, plain, normalised)
            return total, (losses, means)

        (slopes, slope), (losses, means) = jax.grad(
            composite, argnums=(0, 1), has_aux=True
        )(carry.model, state.mu)
        weights = self.weights(task, state.mu, config)
        alpha = task.schedule(carry.step)
        decay = optax.tree.scale(config.rho, self.decay(state.mu, config))
        coupled = optax.tree.scale(config.coupled * alpha, decay)
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
                    jnp.where(config.sgd > 0, t, alpha * a)
                    + jnp.where(config.coupled > 0, 0.0, alpha * d)
                )
            ),
            state.mu,
            by_adam,
            by_momentum,
            decay,
        )
        return Step(losses, weights, slopes, SoftmaxState(move, adam, momentum, means))

    @staticmethod
    def weights(task: Task, mu: yoto.LossLogits, config: Switches) -> Losses:
        weights = yoto.loss_weights(mu)
        scale = jnp.where(config.exponential > 0, weights[task.primary], 1.0)
        return {name: weights[name] / scale for name in task.names}

    @staticmethod
    def decay(mu: yoto.LossLogits, config: Switches) -> yoto.LossLogits:
        """Gradient of the regulariser, its parts switched on and off."""

        def regularizer(mu: yoto.LossLogits) -> jax.Array:
            softplus = jnp.sum(jax.nn.softplus(mu.learned))
            spanning_all = yoto.regularizer(mu, entropy="all") - softplus
            auxiliary = yoto.regularizer(mu, entropy="auxiliary") - softplus
            entropy = jnp.where(config.auxiliary > 0, auxiliary, spanning_all)
            return config.entropy * entropy + config.softplus * softplus

        return jax.grad(regularizer)(mu)


class Weighted(Rule):
    """Any weighting of the library."""

    def __init__(
        self,
        weighting: Callable[[Task], yoto.LossWeighting],
        *,
        steered: bool = False,
        side_by_side: bool = True,
    ):
        """A rule from a weighting.

        Args:
          weighting: Makes it.
          steered: Whether held-out data steer it: it then sees the gradients of all
            parameters on a held-out batch, for every loss and the downstream one.
          side_by_side: See :class:`Rule`.
        """
        self.weighting = weighting
        self.steered = steered
        self.side_by_side = side_by_side

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
            value_and_grad = yoto.value_and_grad(
                lambda model, batch: task.losses(
                    model, task.encode(model, batch), batch
                ),
                weighting,
            )
            losses, grads, state = value_and_grad(carry.model, carry.rule, batch)
        used = optax.tree.get(state, "loss_weights")
        pick = lambda tree: {name: tree[name] for name in task.names}
        return Step(pick(losses), pick(used), grads, state)


# Training.


@dataclasses.dataclass(frozen=True)
class Run:
    """One model, trained once."""

    rule: str
    seed: int
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The run as text: what its line in the file is found by."""
        entry = {"rule": self.rule, "seed": self.seed, "config": dict(self.config)}
        return json.dumps(entry, sort_keys=True)


def settings(**config: Any) -> tuple[tuple[str, Any], ...]:
    """A configuration in a form that can be compared."""
    return tuple(sorted(config.items()))


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
    data, seeds, config = structure.unflatten(leaves)
    optimizer = task.optimizer()

    def init_one(seed: jax.Array, config: PyTree) -> Carry:
        model = rule.init_model(task, jax.random.key(seed))
        return Carry(
            jnp.zeros((), jnp.int32),
            model,
            optimizer.init(model),
            rule.init(task, config),
        )

    def advance_one(
        data: PyTree, carry: Carry, seed: jax.Array, config: PyTree
    ) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), carry.step)
        made = rule.step(task, data, carry, config, key)
        updates, state = optimizer.update(made.grads, carry.optimizer, carry.model)
        model = optax.apply_updates(carry.model, updates)
        vector = lambda tree: jnp.stack([tree[name] for name in task.names])
        seen = (vector(made.losses), vector(made.weights))
        return Carry(carry.step + 1, model, state, made.state), seen

    def advance(
        carry: Carry, data: PyTree, seeds: jax.Array, config: PyTree
    ) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        one = functools.partial(advance_one, data)
        if rule.side_by_side:
            lanes = lambda carry, _: jax.vmap(one)(carry, seeds, config)
            return jax.lax.scan(lanes, carry, length=length)

        def whole(lane: tuple[Carry, jax.Array, PyTree]) -> Any:
            carry, seed, config = lane
            step = lambda carry, _: one(carry, seed, config)
            return jax.lax.scan(step, carry, length=length)

        carry, seen = jax.lax.map(whole, (carry, seeds, config))
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)

    if mesh is not None:
        own, of_steps = lane_devices.spec(mesh), lane_devices.spec(mesh, 1)
        init = lane_devices.Spread(
            jax.vmap(init_one), mesh, (own, own), own, (seeds, config)
        )
        arguments = (init.out_info, data, seeds, config)
        specs = (own, lane_devices.ALL, own, own)
        results = (own, of_steps)
        return init, lane_devices.Spread(advance, mesh, specs, results, arguments, (0,))
    compiled = jax.jit(jax.vmap(init_one)).lower(seeds, config).compile()
    program = jax.jit(advance, donate_argnums=0)
    return compiled, program.lower(compiled.out_info, data, seeds, config).compile()


def train(task: Task, rule: Rule, run: Run) -> PyTree:
    """The model of one run."""
    # As many lanes as everywhere, so that the program is there already.
    config = rule.configure([dict(run.config)] * task.lanes)
    seeds = jnp.full(task.lanes, run.seed)
    program = prepare(task, rule, config, task.lanes)
    carry = program.init(seeds, config)
    for part in range(program.chunks):
        carry, _ = program.advance(carry, task.data, seeds, config)
        carry = rule.after(task, carry, part + 1, program.chunks)
    models, _ = rule.finish(task, lane_devices.gathered(carry), seeds)
    return jax.tree.map(lambda x: x[0], models)


class Finished(NamedTuple):
    """What is kept of a run."""

    values: dict[tuple[str, str | None], float]
    history: dict[str, Any]  # "step", and of each loss its "losses" and "weights"
    seconds: float

    @property
    def cost(self) -> float:
        """Training and choosing weights, relative to training alone."""
        return 1 + self.values.get((CHOOSING, None), 0.0)


class Runs:
    """Runs of one task: those in the file, and those that are missing."""

    def __init__(
        self,
        task: Task,
        rules: dict[str, Rule],
        folder: Path,
        *,
        resume: bool,
        planned: int,
        devices: lane_devices.Devices | None = None,
    ):
        """Read what there is, or start.

        Args:
          task: What is trained.
          rules: By the names that runs have for them.
          folder: For the files.
          resume: Whether to go on with what is there.
          planned: How many runs there will be, for the progress bar.
          devices: That lanes are spread over, as in :func:`prepare`. What was done on
            some can be gone on with on others; numbers then differ by rounding.
        """
        self.task, self.rules, self.devices = task, rules, devices
        self.path = folder / f"{task.name}.runs.jsonl"
        self.partial = folder / f"{task.name}.partial.npz"
        self.finished: dict[str, Finished] = {}
        self.planned, self._trained = planned, 0
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.header = json.dumps({"task": task.name, **task.settings}, sort_keys=True)
        # A file without a line was left by a start that got no further.
        if resume and self.path.is_file() and b"\n" in self.path.read_bytes():
            self._read()
        else:
            self.partial.unlink(missing_ok=True)
            self.path.write_text(self.header + "\n")
        self.resumed = len(self.finished)
        self._bar = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._row = self._bar.add_task(task.name, total=planned, completed=self.resumed)

    def _read(self) -> None:
        for line in read_lines(self.path, self.header):
            entry = json.loads(line)
            self.finished[entry["run"]] = Finished(
                {(m, d): float(v) for m, d, v in entry["values"]},
                entry["history"],
                entry["seconds"],
            )

    def finish(self, runs: Sequence[Run], description: str) -> list[Finished]:
        """These runs, trained unless they are in the file, in this order."""
        missing = [run for run in runs if run.key not in self.finished]
        lanes = self.task.lanes
        with self._bar if missing else contextlib.nullcontext():
            for rule in dict.fromkeys(run.rule for run in missing):
                group = [run for run in missing if run.rule == rule]
                for first in range(0, len(group), lanes):
                    self._train(group[first : first + lanes], description)
        return [self.finished[run.key] for run in runs]

    def _train(self, runs: list[Run], description: str) -> None:
        task = self.task
        rule = self.rules[runs[0].rule]
        # Lanes left over repeat the last run: one program serves every group.
        filled = runs + [runs[-1]] * (task.lanes - len(runs))
        config = rule.configure([dict(run.config) for run in filled])
        seeds = jnp.array([run.seed for run in filled])
        program = prepare(task, rule, config, task.lanes, None, self.devices)
        carry = program.init(seeds, config)
        group = json.dumps([run.key for run in filled])
        carry, parts, (seconds, choosing) = self._saved(group, carry)
        saved = time.monotonic()
        for _ in range(len(parts), program.chunks):
            started = time.monotonic()
            carry, seen = jax.block_until_ready(
                program.advance(carry, task.data, seeds, config)
            )
            parts.append(jax.device_get(seen))
            seconds += time.monotonic() - started
            started = time.monotonic()
            carry = rule.after(task, carry, len(parts), program.chunks)
            choosing += time.monotonic() - started
            share = len(runs) * len(parts) / program.chunks
            self._bar.update(
                self._row,
                completed=self.resumed + self._trained + share,
                description=description,
            )
            if time.monotonic() - saved > SAVE_SECONDS and len(parts) < program.chunks:
                self._save(group, carry, parts, (seconds, choosing))
                saved = time.monotonic()
        losses, weights = (np.concatenate(x) for x in zip(*parts, strict=True))
        carry = lane_devices.gathered(carry)
        models, chosen = rule.finish(task, carry, seeds)
        if chosen is not None:  # Once more, without the compilation, for the time.
            started = time.monotonic()
            rule.finish(task, carry, seeds)
            choosing += time.monotonic() - started
        measured = {k: np.asarray(v) for k, v in task.measure(models).items()}
        last = max(1, len(losses) // 20)
        for i, name in enumerate(task.names):
            measured[f"loss:{name}", None] = losses[-last:, :, i].mean(0)
            final = weights[-1, :, i] if chosen is None else chosen[name]
            measured[f"weight:{name}", None] = final
        if chosen is not None:
            share = np.full(task.lanes, choosing / seconds)
            measured[CHOOSING, None] = share
        done = {
            run: Finished(
                {k: rounded(v[lane]) for k, v in measured.items()},
                thinned(task.names, losses[:, lane], weights[:, lane]),
                rounded(seconds / len(runs)),
            )
            for lane, run in enumerate(runs)
        }
        append_line(self.path, "\n".join(itertools.starmap(_line, done.items())))
        self.finished |= {run.key: finished for run, finished in done.items()}
        self.partial.unlink(missing_ok=True)
        self._trained += len(runs)
        self._bar.update(self._row, completed=self.resumed + self._trained)
        if not console.is_terminal:
            self._report(description, seconds)

    def _report(self, description: str, seconds: float) -> None:
        done = self.resumed + self._trained
        each = (time.monotonic() - self._started) / self._trained
        left = max(self.planned - done, 0) * each
        say(
            f"{self.task.name}: {done} of {self.planned} runs, about "
            f"{left / 60:.0f} min left ({description}: {seconds:.1f} s)"
        )

    def _save(
        self, group: str, carry: Carry, parts: list[Any], seconds: tuple[float, float]
    ) -> None:
        leaves = [np.asarray(_bare(leaf)) for leaf in jax.tree.leaves(carry)]
        arrays = {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
        for i, (losses, weights) in enumerate(parts):
            arrays |= {f"losses {i}": losses, f"weights {i}": weights}
        temporary = self.partial.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(
                file,
                header=self.header,
                group=group,
                parts=len(parts),
                seconds=seconds,
                **arrays,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.partial)

    def _saved(
        self, group: str, fresh: Carry
    ) -> tuple[Carry, list[Any], tuple[float, float]]:
        """What was saved of this group of runs, or a fresh start."""
        if not self.partial.is_file():
            return fresh, [], (0.0, 0.0)
        leaves, structure = jax.tree.flatten(fresh)
        try:
            with self.partial.open("rb") as stream, np.load(stream) as file:
                saved = {name: file[name] for name in file.files}
            if (str(saved["header"]), str(saved["group"])) != (self.header, group):
                return fresh, [], (0.0, 0.0)
            stored = [saved[f"leaf {i}"] for i in range(len(leaves))]
            parts = [
                (saved[f"losses {i}"], saved[f"weights {i}"])
                for i in range(int(saved["parts"]))
            ]
            training, choosing = map(float, saved["seconds"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            say(f"{self.partial} cannot be used: {error}. Its runs start again.")
            return fresh, [], (0.0, 0.0)
        kinds = [(x.shape, x.dtype) for x in map(_bare, leaves)]
        if [(x.shape, x.dtype) for x in stored] != kinds:
            say(f"{self.partial} is of another version. Its runs start again.")
            return fresh, [], (0.0, 0.0)
        stored = [_like(x, leaf) for x, leaf in zip(stored, leaves, strict=True)]
        return structure.unflatten(stored), parts, (training, choosing)


def _bare(leaf: jax.Array) -> jax.Array:
    """A random key as the numbers it is made of; any other array as it is."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _like(stored: np.ndarray, leaf: jax.Array) -> jax.Array:
    """The inverse of :func:`_bare`."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(stored))
    return jnp.asarray(stored)


def _line(run: Run, done: Finished) -> str:
    values = [[metric, domain, v] for (metric, domain), v in done.values.items()]
    entry = {
        "run": run.key,
        "values": values,
        "history": done.history,
        "seconds": done.seconds,
    }
    return json.dumps(entry, separators=(",", ":"))


def thinned(
    names: Sequence[str], losses: np.ndarray, weights: np.ndarray
) -> dict[str, Any]:
    """Losses and weights [steps, K + 1] over time, averaged over stretches of steps."""
    by_name = lambda curves: dict(zip(names, curves.T, strict=True))
    curves = {"losses": by_name(losses), "weights": by_name(weights)}
    return thinned_curves(curves, HISTORY_POINTS)


# Cost.


def step_ratios(
    task: Task,
    rules: dict[str, tuple[Rule, dict[str, Any]]],
    baseline: str,
    rounds: int,
) -> dict[str, np.ndarray]:
    """Time of a step of each rule over that of the baseline, in turns, one lane each.

    Returns:
      The ratio in each round.
    """
    lanes = {name: (rule, [config]) for name, (rule, config) in rules.items()}
    seconds = _seconds(task, lanes, rounds)
    return {name: taken / seconds[baseline] for name, taken in seconds.items()}


def sweep_speed(
    task: Task, rule: Rule, config: dict[str, Any], lanes: int, rounds: int
) -> np.ndarray:
    """How many times faster so many runs are in one program than one by one.

    Returns:
      The ratio in each round. Compilation, once instead of for each run, is apart.
    """
    groups = {"one": (rule, [config]), "all": (rule, [config] * lanes)}
    seconds = _seconds(task, groups, rounds)
    return lanes * seconds["one"] / seconds["all"]


def _seconds(
    task: Task, groups: dict[str, tuple[Rule, list[dict[str, Any]]]], rounds: int
) -> dict[str, np.ndarray]:
    """Time of some steps of each group of lanes, in turns; [rounds] each."""
    length = min(20, task.steps)
    programs, carries = {}, {}
    for name, (rule, configs) in groups.items():
        config, seeds = rule.configure(configs), jnp.arange(len(configs))
        one = jax.local_devices()[:1]
        program = prepare(task, rule, config, len(configs), length, one)
        carries[name] = program.init(seeds, config)
        programs[name] = (program.advance, (task.data, seeds, config))
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(rounds + 1):
        for name, (advance, arguments) in programs.items():
            started = time.perf_counter()
            carries[name], _ = jax.block_until_ready(advance(carries[name], *arguments))
            seconds[name].append(time.perf_counter() - started)
    # The first round warms up.
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}
