"""Ranges of loss weights: checks, clipping and error messages."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import PyTree, Weights, check_structure, loss_names

LARGEST_GRID = 10**7
SLACK = 1e-4  # relative, for rounding of weights at the edge of their range
TINY = float(np.finfo(np.float32).tiny)  # smaller numbers count as 0


# Checks.


def check_grid(size: int, method: str) -> None:
    if size > LARGEST_GRID:
        raise ValueError(
            f"this grid has {size} weightings, more than {LARGEST_GRID}: use sample "
            f"instead, by method {method!r}."
        )


def check_weights(weights: Weights, structure: jax.tree_util.PyTreeDef) -> None:
    """Raise unless weights are a tree of this structure and of one shape."""
    check_structure(
        jax.tree.structure(weights), structure, "this distribution", "weights"
    )
    shapes = {jnp.shape(x) for x in jax.tree.leaves(weights)}
    if len(shapes) > 1:
        raise ValueError(f"weights must all have one shape, got {sorted(shapes)}.")


def bounds_of(
    low: PyTree, high: PyTree
) -> tuple[jax.tree_util.PyTreeDef, list[Any], list[Any]]:
    """Structure and leaves of two trees; one of them may be a single number."""
    alone = jax.tree.structure(0)
    structures = [jax.tree.structure(tree) for tree in (low, high)]
    structure = next((s for s in structures if s != alone), alone)
    lows, highs = [], []
    for bound, tree, leaves in (("low", low, lows), ("high", high, highs)):
        if jax.tree.structure(tree) == alone:
            tree = structure.unflatten([tree] * structure.num_leaves)
        check_structure(
            jax.tree.structure(tree), structure, "the low ones", f"the {bound} bounds"
        )
        leaves += jax.tree.leaves(tree)
    if not lows:
        raise ValueError("there are no losses to weigh.")
    check_scalars("bound", loss_names(structure) * 2, lows + highs)
    return structure, lows, highs


def check_scalars(what: str, names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, x in zip(names, leaves, strict=True):
        if isinstance(x, str):
            raise TypeError(f"the {what} of loss {name!r} must be a number, got {x!r}.")
        if jnp.shape(x):
            raise ValueError(
                f"the {what} of loss {name!r} must be a scalar, got shape "
                f"{jnp.shape(x)}."
            )


def say_outside(weight: float, name: str, low: float, high: float) -> str:
    return (
        f"the weight {weight:g} of loss {name!r} is outside its range, {low:g} to "
        f"{high:g}"
    )


# Small arithmetic.


def clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Clips ``x``; at a bound the gradient is 1, unlike the 1/2 of ``jnp.clip``."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def as_float32(x: Any) -> float:
    """Rounds a known number to float32; infinite if it is too large."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def say_range(low: Any, high: Any, k: int) -> str:
    try:
        a, b = float(low[k]), float(high[k])
    except Exception:  # Tracers, or whatever a transformation puts in place of arrays.
        return "?"
    return f"{a:.6g}" if a == b else f"{a:.6g}..{b:.6g}"
