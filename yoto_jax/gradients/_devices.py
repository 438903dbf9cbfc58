"""Axes of ``pmap`` and ``shard_map``: what varies, what is cut up, means over them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._losses import Losses, Params, PyTree, path_name
from yoto_jax._numerics import stacked
from yoto_jax._varying import Axes, axis_size, check_axes, vary_over, varying_axes


class Devices(NamedTuple):
    """How a step lies on the devices."""

    axes: Axes  # that the batch is spread over
    spread: Sequence[Axes]  # of each array of the parameters: what it is cut up over


def spread_of(
    params: Params, specs: PyTree | None, axes: Axes | None = None
) -> list[Axes]:
    """The axes that each array of the parameters is cut up over.

    ``axes`` are those of the batch: if they are known, it is checked that specs are
    given where they are needed, and can be followed.
    """
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves = jax.tree.leaves(params)
    if specs is None:
        for path, x in zip(paths, leaves, strict=True):
            if differing := [axis for axis in axes or () if axis in varying_axes(x)]:
                raise ValueError(
                    f"parameter {path!r} may differ between the devices of axis "
                    f"{differing[0]!r}. If each device holds a part of it, say so with "
                    "param_specs=; if all hold the same, as after pcast, with "
                    "param_specs=jax.P()."
                )
        return [()] * len(leaves)
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
    try:
        full = jax.tree.broadcast(specs, params, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            "param_specs must be a tree of PartitionSpec like the parameters, or the "
            f"upper part of one: {error}"
        ) from None
    found = []
    for spec in jax.tree.leaves(full, is_leaf=is_spec):
        if not is_spec(spec):
            raise TypeError(
                "param_specs must be a tree of jax.sharding.PartitionSpec, got a "
                f"{type(spec).__name__} in it."
            )
        parts = [part if isinstance(part, tuple) else (part,) for part in spec]
        found.append(tuple(axis for part in parts for axis in part if axis is not None))
    for path, x, own in zip(paths, leaves, found, strict=True):
        for axis in own:
            if axes is not None and axis not in (*axes, *varying_axes(x)):
                check_axes((axis,), "param_specs")
                raise ValueError(
                    f"parameter {path!r} is spread over axis {axis!r}, which the batch "
                    "is not: that needs shard_map with check_vma=True, its default. "
                    "Without, JAX makes gradients too large by the size of the axis."
                )
    return found


def checks_axes(params: Params, axes: Axes) -> bool:
    """Whether ``shard_map`` knows what varies, told by parameters made to vary."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and bool(axes) and varying_axes(leaves[0]) >= set(axes)


def mean_over(tree: PyTree, axes: Axes, spread: Sequence[Axes] | None = None) -> PyTree:
    """The mean over the devices of what each has found on its part of the batch.

    An array that is itself cut up over an axis (``spread``) has been summed over it on
    the way back: gathering its parts has that as its transpose.
    """
    if not axes:
        return tree
    leaves, structure = jax.tree.flatten(tree)

    def mean(x: Any, own: Axes) -> Any:
        if x.dtype == jax.dtypes.float0:
            return np.zeros(x.shape, x.dtype)  # of no device's own
        if summed := tuple(axis for axis in axes if axis in own):
            x = x / axis_size(summed)
        others = tuple(axis for axis in axes if axis not in own)
        return lax.pmean(vary_over(x, others), others) if others else x

    spread = spread or [()] * len(leaves)
    return structure.unflatten(map(mean, leaves, spread))


def mean_losses(losses: Losses, axes: Axes) -> PyTree:
    """The mean of every loss over the devices: one all-reduce of K numbers."""
    if not axes or not jax.tree.leaves(losses):
        return losses
    leaves, structure = jax.tree.flatten(losses)
    means = lax.pmean(stacked([vary_over(x, axes) for x in leaves]), axes)
    return structure.unflatten(
        means[k].astype(x.dtype) for k, x in enumerate(map(jnp.asarray, leaves))
    )
