"""Axes of lanes: put on, cut down, spread over devices, taken off."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from yoto_jax._checks import is_key
from yoto_jax._losses import PyTree, path_name
from yoto_jax.racing._one_of import check_started, numbered
from yoto_jax.racing._plan import integer


class Kept(NamedTuple):
    """Result of :func:`keep`.

    Attributes:
      lanes: The lanes that go on, in their old order.
      indices: int32 [keep], where they were among the lanes before the cut.
      scores: float [keep], what they scored.
    """

    lanes: PyTree
    indices: jax.Array
    scores: jax.Array


def start(lane: PyTree, arms: int) -> PyTree:
    """Copies one run into several lanes, which start from the same point.

    Args:
      lane: What one run carries from step to step: parameters, states, random keys.
      arms: How many lanes. The state of a :func:`one_of` in ``lane`` gets another
        weighting in each of them, in order.

    Returns:
      The same tree, every array with a new leading axis.

    Raises:
      TypeError: ``arms`` is no integer.
      ValueError: ``arms`` is not positive, or not the number of weightings of a
        :func:`one_of`.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> print(yoto.racing.start({"w": jnp.array([1.0, 2.0])}, 3)["w"].shape)
      (3, 2)
    """
    arms = integer("arms", arms, 1)

    def widen(x: Any) -> jax.Array:
        # New arrays: lanes can be donated while the one they came from lives on.
        x = jnp.asarray(x)
        return jnp.broadcast_to(x[None], (arms, *x.shape))

    return numbered(jax.tree.map(widen, lane), arms)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of one structure into lanes, such as the loss weights of arms.

    Args:
      trees: One for each lane.

    Returns:
      A tree whose every array has a new leading axis.

    Raises:
      ValueError: There is no tree, or they differ in structure.

    Examples:
      >>> import yoto_jax as yoto
      >>> weights = [{"fit": 1.0, "size": ratio} for ratio in (0.1, 1.0, 10.0)]
      >>> print(yoto.racing.stack(weights)["size"])
      [ 0.1  1.  10. ]
    """
    if not trees:
        raise ValueError("there are no trees to stack.")
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *trees)


def keep(lanes: PyTree, scores: Any, number: int) -> Kept:
    """Keeps the lanes with the best scores.

    Args:
      lanes: What they carry; every array has the leading axis of lanes. Put in what
        else is known of each lane, such as its number.
      scores: [lanes] validation scores; more is better. A lane whose score is NaN has
        lost to all others. Of equal ones the first is taken.
      number: How many go on, at least 1; static under ``jit``.

    Returns:
      A :class:`Kept`.

    Raises:
      TypeError: ``number`` is no integer, or ``scores`` a mapping.
      ValueError: ``scores`` and ``lanes`` do not fit, ``number`` is not among 1 to the
        number of lanes, or, outside ``jit``, all scores are NaN, or lanes with a
        :func:`one_of` were not made by :func:`start`.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> lanes = {"w": jnp.arange(4.0), "number": jnp.arange(4)}
      >>> kept = yoto.racing.keep(lanes, jnp.array([0.3, jnp.nan, 0.9, 0.5]), 2)
      >>> print(kept.lanes["number"], kept.scores)
      [2 3] [0.9 0.5]
    """
    if isinstance(scores, Mapping):
        raise TypeError(
            f"scores must be an array of shape [lanes], got a {type(scores).__name__}."
        )
    scores = jnp.asarray(scores)
    if scores.ndim != 1 or jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(
            f"scores must be real numbers of shape [lanes], got {scores.dtype} of "
            f"shape {scores.shape}."
        )
    count = len(scores)
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(lanes)}
    if len(sizes) == 1 and sizes not in ({()}, {(count,)}):
        ((own,),) = sizes
        raise ValueError(f"there are {count} scores for {own} lanes.")
    _check_lanes(lanes, count)
    check_started(lanes)
    number = integer("number", number, 1)
    if number > count:
        raise ValueError(f"number must be from 1 to {count}, got {number}.")
    if not isinstance(scores, jax.core.Tracer) and bool(jnp.all(jnp.isnan(scores))):
        raise ValueError("all scores are NaN: no lane can be kept.")
    return _keep(lanes, scores, number)


@functools.partial(jax.jit, static_argnames="number")
def _keep(lanes: PyTree, scores: jax.Array, number: int) -> Kept:
    """One program for all arrays."""
    real = jnp.issubdtype(scores.dtype, jnp.floating)
    # Of integers -1 - x, which cannot overflow; of floats -x, which keeps NaN.
    falling = -scores if real else jnp.invert(scores)
    best = jnp.lexsort((falling, jnp.isnan(scores)))[:number]
    indices = jnp.sort(best).astype(jnp.int32)
    take = lambda x: jnp.asarray(x)[indices]
    return Kept(jax.tree.map(take, lanes), indices, scores[indices])


def lane(lanes: PyTree, index: int) -> PyTree:
    """Takes out one lane, without the leading axis.

    Args:
      lanes: What all of them carry.
      index: Which one.

    Returns:
      The same tree, every array without its leading axis.

    Raises:
      IndexError: There is no such lane.
      ValueError: Arrays differ in their number of lanes.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> print(yoto.racing.lane({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 1)["w"])
      [3. 4.]
    """
    count = _count(lanes)
    if not isinstance(index, jax.core.Tracer) and not -count <= index < count:
        raise IndexError(f"there are {count} lanes, got index {index}.")
    return _take(lanes, index)


@jax.jit
def _take(lanes: PyTree, index: jax.Array) -> PyTree:
    """One program for all arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x)[index], lanes)


def spread(lanes: PyTree, devices: Sequence[jax.Device] | None = None) -> PyTree:
    """Distributes lanes evenly over devices, as far as their number divides.

    With more devices than lanes, or numbers that do not divide, some devices do the
    same work: the axis is cut into the greatest common divisor of both numbers. Call it
    at the start and after every cut; a step under ``jit(vmap(...))`` needs no change.

    Args:
      lanes: What they carry, every array with the leading axis of lanes.
      devices: Of all processes (default: ``jax.devices()``).

    Returns:
      The same arrays, sharded on their leading axis; those that are in place already
      are not copied.

    Raises:
      ValueError: There are no arrays, no devices, or no common number of lanes.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> lanes = yoto.racing.spread({"w": jnp.zeros((4, 3))}, jax.devices()[:1])
      >>> print(lanes["w"].sharding.num_devices)
      1
    """
    count = _count(lanes)
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must hold at least one.")
    parts = math.gcd(count, len(devices))
    mesh = Mesh(np.array(devices).reshape(parts, -1), ("lanes", "copies"))
    sharding = NamedSharding(mesh, PartitionSpec("lanes"))
    # Typed keys cannot be put on devices of other processes, but their data can.
    data = lambda x: jax.random.key_data(x) if is_key(x) else x
    placed = jax.device_put(jax.tree.map(data, lanes), sharding)
    return jax.tree.map(_as_before, lanes, placed)


def _as_before(x: Any, placed: jax.Array) -> jax.Array:
    """The array, or the typed keys whose data it is."""
    if not is_key(x):
        return placed
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(x))


def _count(lanes: PyTree) -> int:
    """The number of lanes, the same of every array."""
    leaves = jax.tree.leaves(lanes)
    if not leaves:
        raise ValueError("lanes has no arrays.")
    count = jnp.shape(leaves[0])[0] if jnp.ndim(leaves[0]) else 0
    _check_lanes(lanes, count)
    return count


def _check_lanes(lanes: PyTree, count: int) -> None:
    for path, x in jax.tree.leaves_with_path(lanes):
        if jnp.ndim(x) == 0 or jnp.shape(x)[0] != count:
            raise ValueError(
                f"every array must have a leading axis of {count} lanes, "
                f"{path_name(path)!r} has shape {jnp.shape(x)}."
            )
