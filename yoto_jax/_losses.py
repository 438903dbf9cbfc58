"""Trees of losses: names, lookup and checks of structure."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any
"""Any nesting of containers registered with JAX."""
Losses = PyTree  # scalars, one for each loss
Weights = PyTree  # scalars, a tree like the losses
Present = PyTree  # booleans, a tree like the losses
Params = PyTree  # arrays, those that are trained
State = PyTree  # arrays, of a weighting or of an optimizer


def check_structure(
    structure: jax.tree_util.PyTreeDef,
    expected: jax.tree_util.PyTreeDef,
    owner: str,
    what: str = "losses",
) -> None:
    """Checks that ``what`` has the structure that ``owner`` was made with."""
    if structure != expected:
        difference = structure_difference(structure, expected)
        raise ValueError(f"{what} do not match those of {owner}; {difference}.")


def structure_difference(
    structure: jax.tree_util.PyTreeDef, expected: jax.tree_util.PyTreeDef
) -> str:
    """Names missing and unexpected leaves, or else the containers that differ."""
    got, wanted = set(loss_names(structure)), set(loss_names(expected))
    if got == {""}:  # A single leaf, which has no path.
        return f"expected a tree of {listed(sorted(wanted))}, got one value without it"
    difference = "; ".join(
        f"{word}: {listed(sorted(which))}"
        for word, which in (("missing", wanted - got), ("unexpected", got - wanted))
        if which
    )
    return difference or f"containers: expected {expected}, got {structure}"


def loss_names(structure: jax.tree_util.PyTreeDef) -> tuple[str, ...]:
    """Path of every leaf of a tree structure."""
    leaves = structure.unflatten(range(structure.num_leaves))
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(leaves))


def tree_of(losses: Losses | int) -> PyTree:
    """A tree of losses, or that of which only the number is known."""
    return (0.0,) * losses if isinstance(losses, int | np.integer) else losses


def path_name(path: tuple[Any, ...]) -> str:
    """Text of a path in a tree, such as ``"heads/depth"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def scalar_losses(
    losses: Losses,
) -> tuple[list[str], list[Any], jax.tree_util.PyTreeDef]:
    """Names and leaves of a tree of losses, each a floating-point scalar."""
    flat, structure = jax.tree.flatten_with_path(losses)
    for path, leaf in flat:
        name = path_name(path)
        if isinstance(leaf, str):
            raise TypeError(
                f"loss {name!r} is the string {leaf!r}, not a number; for losses that "
                "have no values yet give dict.fromkeys(names, 0.0)."
            )
        if isinstance(leaf, set | frozenset):
            raise TypeError(
                "a set of losses has no order: give dict.fromkeys(names, 0.0)."
            )
        shape, dtype = shape_and_dtype(f"loss {name!r}", leaf)
        if shape:
            raise ValueError(
                f"loss {name!r} must be a scalar, got shape {shape}; reduce it first "
                "(or use vmap, if the axis is a batch of runs, or jnp.unstack, if each "
                "entry is a loss of its own)."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"loss {name!r} must be a floating-point number, such as 0.0, got "
                f"dtype {dtype}."
                + (" Of MaskedLosses give the losses." if dtype == jnp.bool_ else "")
            )
    return [path_name(path) for path, _ in flat], [leaf for _, leaf in flat], structure


def stack_present(
    present: Present | None, structure: jax.tree_util.PyTreeDef
) -> jax.Array | None:
    """Stacks a tree of booleans like the losses to a mask (K,); None stays None."""
    if present is None:
        return None
    flat, given = jax.tree.flatten_with_path(present)
    check_structure(given, structure, "the losses", "the entries of present")
    for path, leaf in flat:
        name = path_name(path)
        shape, dtype = shape_and_dtype(f"present[{name!r}]", leaf)
        if shape or dtype != jnp.bool_:
            raise TypeError(
                f"present must hold one boolean for each loss, got shape {shape} and "
                f"dtype {dtype} for {name!r}. Of a mask over examples take jnp.any."
            )
    return jnp.stack([jnp.asarray(leaf) for _, leaf in flat])


def present_of_each(
    present: Any, structures: Sequence[jax.tree_util.PyTreeDef]
) -> list[Any]:
    """The tree of booleans for each of several trees of losses.

    One is for all of them. A sequence has one for each, in their order (which moments
    repeat), or of a part of them the one whose losses are the same.
    """
    structures = list(structures)
    own = jax.tree.structure(present)
    if not isinstance(present, list | tuple) or own in structures:
        return [present] * len(structures)
    kinds = [jax.tree.structure(x) for x in present]
    rounds, rest = divmod(len(structures), max(len(kinds), 1))
    if not rest and kinds * rounds == structures:
        return [*present] * rounds
    return [_fitting(present, structure) for structure in structures]


def _fitting(present: Any, structure: jax.tree_util.PyTreeDef) -> Any:
    """The tree among several that is for these losses."""
    found = [x for x in present if jax.tree.structure(x) == structure]
    leaves = [jax.tree.leaves(x) for x in found]
    if any(x is not y for own in leaves for x, y in zip(own, leaves[0], strict=True)):
        raise ValueError(
            f"present has {len(found)} trees for the losses "
            f"{listed(loss_names(structure))}, and nothing tells which is meant: give "
            "one for each LossLogits, in their order."
        )
    return found[0] if found else present


def split(vector: jax.Array, structure: jax.tree_util.PyTreeDef) -> PyTree:
    """Splits vectors (..., K) into a tree like the losses."""
    return structure.unflatten([vector[..., k] for k in range(structure.num_leaves)])


def shape_and_dtype(what: str, value: Any) -> tuple[tuple[int, ...], Any]:
    try:
        dtype = jax.dtypes.result_type(value)
    except TypeError:
        raise TypeError(f"{what} is a {type(value).__name__}, not a number.") from None
    return getattr(value, "shape", ()), dtype


def loss_vector(
    losses: Losses, structure: jax.tree_util.PyTreeDef, dtype: Any
) -> jax.Array:
    """The losses as one vector, checked against those of ``init``; a constant."""
    _, leaves, given = scalar_losses(losses)
    check_structure(given, structure, "the loss weights")
    return lax.stop_gradient(jnp.stack([jnp.asarray(x, dtype) for x in leaves]))


def find_loss(role: str, chosen: Any, losses: Losses) -> int:
    """Position of the loss that ``chosen`` names; ``role`` is for messages."""
    names = loss_names(jax.tree.structure(losses))
    if hasattr(chosen, "__index__") and not isinstance(chosen, bool):
        chosen = operator.index(chosen)
    elif not isinstance(chosen, str):
        alternative = ", or be None" if role == "primary" else ""
        raise TypeError(
            f"{role} must name exactly one loss, by its path or its index"
            f"{alternative}; got {chosen!r}. The losses are: {listed(names)}."
        )
    wanted = str(chosen)
    if isinstance(chosen, int) and isinstance(losses, list | tuple):
        if not -len(losses) <= chosen < len(losses):
            raise ValueError(
                f"{role} {chosen} is out of range for {len(losses)} losses."
            )
        before = jax.tree.structure(losses[: chosen % len(losses)]).num_leaves
        within = jax.tree.structure(losses[chosen]).num_leaves
        found = list(range(before, before + within))
    else:
        found = [index for index, name in enumerate(names) if name == wanted]
        found = found or [
            index for index, name in enumerate(names) if name.endswith("/" + wanted)
        ]
        found = found or [
            index for index, name in enumerate(names) if name.startswith(wanted + "/")
        ]
    if not found:
        raise ValueError(
            f"{role} {chosen!r} is unknown; the losses are: {listed(names)}."
        )
    if len(found) > 1:
        matches = listed(names[index] for index in found)
        raise ValueError(
            f"{role} {chosen!r} is ambiguous; name one loss among {matches}."
        )
    return found[0]


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
