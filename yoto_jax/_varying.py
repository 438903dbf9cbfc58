"""Axes of ``pmap`` and ``shard_map``: their names, and what varies along them."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax import lax

from yoto_jax._losses import PyTree

Axes = tuple[Hashable, ...]


def named_axes(axis_name: Any) -> Axes:
    """The axes that an argument names."""
    if axis_name is None:
        return ()
    several = isinstance(axis_name, tuple | list)
    axes = tuple(axis_name) if several else (axis_name,)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis_name must not repeat an axis, got {axis_name!r}.")
    return axes


def axis_size(axes: Axes) -> int:
    """The number of devices along some axes."""
    return lax.psum(1, axes) if axes else 1


def check_axes(axes: Axes, option: str = "axis_name") -> None:
    """Raise unless a ``pmap`` or ``shard_map`` around this has these axes."""
    for axis in axes:
        try:
            axis_size((axis,))
        except NameError:
            raise ValueError(
                f"{option}: {axis!r} is no axis of a pmap or shard_map around this "
                f"call. On one device, and under jit alone, leave {option} out."
            ) from None


def varying_axes(x: Any) -> frozenset[Hashable]:
    """The axes of ``shard_map`` along which a value may differ."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def vary_over(tree: PyTree, axes: Sequence[Hashable]) -> PyTree:
    """The same values, each device's own along these axes.

    Inside ``shard_map`` that checks varying axes, the gradient with respect to a value
    that is the same everywhere is summed over the devices on its own accord.
    """

    def vary(x: Any) -> Any:
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            return x
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def varying_like(tree: PyTree, *like: Any) -> PyTree:
    """The same values, varying over all axes over which any of ``like`` varies.

    Pullbacks insist on it, and so do loops, whose start is to vary as their result.
    """
    axes = frozenset().union(*map(varying_axes, like))
    return vary_over(tree, sorted(axes, key=str))
