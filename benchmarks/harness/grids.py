"""Runs of several seeds and configurations in step: one batch for all runs of a seed.

The programs are compiled for so many seeds and runs; the runs may be spread over
devices. Where the runs of a seed do not share their batches, see ``training``.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import lanes
from benchmarks.harness.terminal import say, track

PyTree = Any


class Grid(Protocol):
    """What is trained. It is hashable: equal ones share their compiled programs."""

    def init(self, seed: jax.Array, configuration: PyTree) -> PyTree:
        """A run at its start."""
        ...

    def draw(self, data: PyTree, key: jax.Array) -> PyTree:
        """A batch."""
        ...

    def step(
        self, run: PyTree, configuration: PyTree, batch: PyTree
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """The run after a step; the weights and losses of that step, by name."""
        ...

    def model(self, run: PyTree) -> PyTree:
        """What is kept of a trained run."""
        ...


class Carry(NamedTuple):
    """Runs under way, on leading axes [seeds, runs]."""

    step: jax.Array
    run: PyTree


class Outcome(NamedTuple):
    """Trained runs, on leading axes [seeds, runs], as NumPy arrays."""

    model: PyTree
    weights: dict[str, np.ndarray]  # [seeds, runs, steps] each
    losses: dict[str, np.ndarray]  # [seeds, runs, steps] each
    run_seconds: float  # of all runs together
    compile_seconds: float


class Program(NamedTuple):
    """Compiled: ``init(seeds, configurations)``, and ``length`` steps further."""

    init: Callable[..., Carry]
    advance: Callable[..., tuple[Carry, tuple[PyTree, PyTree]]]
    length: int

    def __call__(self, carry: Carry, *arguments: PyTree) -> Any:
        """``length`` steps: the runs, and weights and losses on a leading axis."""
        return jax.block_until_ready(self.advance(carry, *arguments))


def prepare(
    grid: Grid,
    data: PyTree,
    configurations: PyTree,
    length: int,
    devices: lanes.Devices | None = None,
) -> tuple[Program, tuple[PyTree, ...]]:
    """The program for ``length`` steps, and ``(data, seeds, configurations)`` for it.

    The runs are spread over the devices (default: ``lanes.default_devices``), over as
    many of them as can have the same number of seeds and of configurations each.
    """
    sizes = jax.tree.leaves(configurations)[0].shape[:2]
    arguments = (data, jnp.arange(sizes[0]), configurations)
    mesh = lanes.mesh(devices or lanes.default_devices(), *sizes)
    shapes = jax.eval_shape(lambda x: x, arguments)
    init, advance = _compile(grid, length, shapes, mesh)
    return Program(init, advance, length), arguments


def train(
    grid: Grid,
    data: PyTree,
    configurations: PyTree,
    steps: int,
    description: str,
    devices: lanes.Devices | None = None,
) -> Outcome:
    """Train all configurations [seeds, runs, ...] with all seeds in one program.

    A seed decides initialisation and batches, the same for every configuration. The
    first training with a program pays for its compilation.
    """
    started = time.perf_counter()
    program, arguments = prepare(grid, data, configurations, stretch(steps), devices)
    ready = time.perf_counter()
    carry = program.init(*arguments[1:])
    histories = []
    for _ in track(range(steps // program.length), description):
        carry, history = program(carry, *arguments)
        histories.append(jax.device_get(history))
    finished = time.perf_counter()
    runs = carry.step.size
    say(
        f"{description}: {runs} runs of {steps} steps in {finished - ready:.1f} s, "
        f"compiled in {ready - started:.1f} s"
    )
    weights, losses = jax.tree.map(
        lambda *parts: np.moveaxis(np.concatenate(parts), 0, -1), *histories
    )
    return Outcome(
        jax.device_get(grid.model(carry.run)),
        weights,
        losses,
        run_seconds=finished - ready,
        compile_seconds=ready - started,
    )


def stretch(steps: int) -> int:
    """Steps from one look at a training to the next."""
    return steps // next(n for n in range(25, 0, -1) if steps % n == 0)


@functools.cache
def _compile(
    grid: Grid, length: int, arguments: Any, mesh: jax.sharding.Mesh | None
) -> Any:
    start = functools.partial(_init, grid)
    further = functools.partial(_advance, grid, length)
    return lanes.programs(start, further, arguments, mesh)


def _init(grid: Grid, seeds: jax.Array, configurations: PyTree) -> Carry:
    def one_run(seed: jax.Array, configuration: PyTree) -> Carry:
        return Carry(jnp.zeros((), jnp.int32), grid.init(seed, configuration))

    one_seed = jax.vmap(one_run, in_axes=(None, 0))
    return jax.vmap(one_seed)(seeds, configurations)


def _advance(
    grid: Grid,
    length: int,
    carry: Carry,
    data: PyTree,
    seeds: jax.Array,
    configurations: PyTree,
) -> tuple[Carry, tuple[PyTree, PyTree]]:
    """Train ``length`` steps, and return the weights and losses of each."""

    def one_run(carry: Carry, configuration: PyTree, batch: PyTree) -> Any:
        run, seen = grid.step(carry.run, configuration, batch)
        return Carry(carry.step + 1, run), seen

    def one_seed(carry: Carry, seed: jax.Array, configurations: PyTree) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), carry.step[0])
        batch = grid.draw(data, key)
        return jax.vmap(one_run, in_axes=(0, 0, None))(carry, configurations, batch)

    def step(carry: Carry, _: None) -> Any:
        return jax.vmap(one_seed)(carry, seeds, configurations)

    return jax.lax.scan(step, carry, length=length)
