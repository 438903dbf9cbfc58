"""Runs side by side on several devices, none of which has to know of another.

Each device runs the program of one device on its own lanes (``shard_map``), so there is
nothing to be exchanged between devices: lanes in loops of their own length do not wait
for each other either, as they would if XLA partitioned one program for all.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
Devices = Sequence[jax.Device]
ALL = PartitionSpec()
"""Every device has all of it."""


def default_devices() -> tuple[jax.Device, ...]:
    """All accelerators of this process.

    Of virtual devices of a CPU, which have to be asked for, one: they share its cores,
    and one program uses all of those already.
    """
    devices = jax.local_devices()
    return tuple(devices[:1] if devices[0].platform == "cpu" else devices)


def mesh(devices: Devices, *lanes: int) -> Mesh | None:
    """As many of the devices as can have equal shares of the lanes.

    Args:
      devices: Those there are.
      *lanes: How many, for each of their axes.

    Returns:
      A mesh with an axis for each of those of the lanes, or None if one device is all.
    """
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in lanes]
    possible = (g for g in itertools.product(*divisors) if math.prod(g) <= len(devices))
    shape = max(possible, key=math.prod)
    if math.prod(shape) == 1:
        return None
    used = np.array(devices[: math.prod(shape)], dtype=object).reshape(shape)
    return Mesh(used, tuple(f"lanes {axis}" for axis in range(len(shape))))


def spec(mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """Of arrays whose axes of lanes begin at ``axis``."""
    return PartitionSpec(*[None] * axis, *mesh.axis_names)


class Spread:
    """A compiled program of one device that several run, each on its own lanes."""

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        specs: tuple[PartitionSpec, ...],
        out_specs: Any,
        shapes: tuple[PyTree, ...],
        donate_argnums: tuple[int, ...] = (),
    ):
        """Compile.

        Args:
          function: What a device does with its lanes.
          mesh: The devices.
          specs: How each argument is spread.
          out_specs: How the results are.
          shapes: The arguments, of all lanes.
          donate_argnums: As for ``jax.jit``.
        """
        self._shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        placed = tuple(
            jax.tree.map(
                lambda x, own=sharding: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=own
                ),
                argument,
            )
            for argument, sharding in zip(shapes, self._shardings, strict=True)
        )
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        jitted = jax.jit(spread, donate_argnums=donate_argnums)
        self.compiled = jitted.lower(*placed).compile()

    @property
    def out_info(self) -> Any:
        return self.compiled.out_info

    def __call__(self, *arguments: PyTree) -> Any:
        """Run it on arrays that may be anywhere."""
        return self.compiled(
            *(
                jax.device_put(argument, sharding)
                for argument, sharding in zip(arguments, self._shardings, strict=True)
            )
        )


def programs(
    start: Callable[..., PyTree],
    further: Callable[..., Any],
    arguments: tuple[PyTree, PyTree, PyTree],
    mesh: Mesh | None,
) -> tuple[Any, Any]:
    """Compile what starts runs, and what trains them further, whose runs are donated.

    Args:
      start: ``start(seeds, configurations) -> runs``.
      further: ``further(runs, data, seeds, configurations) -> (runs, seen)`` with the
        steps on the first axis of what is seen.
      arguments: Data, seeds and configurations, or their shapes.
      mesh: The devices, if they are several; seeds lie on the first axis.

    Returns:
      Both, compiled.
    """
    _, *runs = arguments
    if mesh is not None:
        own, of_steps = spec(mesh), spec(mesh, 1)
        of_seeds = PartitionSpec(mesh.axis_names[0])
        init = Spread(start, mesh, (of_seeds, own), own, tuple(runs))
        specs = (own, ALL, of_seeds, own)
        every = (init.out_info, *arguments)
        return init, Spread(further, mesh, specs, (own, of_steps), every, (0,))
    init = jax.jit(start).lower(*runs).compile()
    advance = jax.jit(further, donate_argnums=0)
    return init, advance.lower(init.out_info, *arguments).compile()


def gathered(lanes: PyTree) -> PyTree:
    """The same arrays, on one device if they are on several."""

    def gather(x: jax.Array) -> jax.Array:
        alone = len(x.sharding.device_set) == 1
        return x if alone else jax.device_put(x, jax.local_devices()[0])

    return jax.tree.map(gather, lanes)
