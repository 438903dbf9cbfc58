"""Contents of a checkpoint: arrays, and a record that describes them."""

import hashlib
import importlib.metadata
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import yoto_jax
from yoto_jax._checks import is_key
from yoto_jax._choice_logits import ChoiceLogits, HardChoice
from yoto_jax._digests import digests
from yoto_jax._loss_logits import LossLogits
from yoto_jax._losses import PyTree, State, loss_names
from yoto_jax._outliers import SkipOutliersState
from yoto_jax._weighting import WeightingState
from yoto_jax.checkpoints._errors import CheckpointError, reason_of, some_of
from yoto_jax.conditional._distributions import Distribution

FORMAT = "yoto_jax checkpoint"
VERSION = 1
"""Version of the record. Checkpoints of newer versions are refused."""

ARRAYS = "arrays"
"""Folder of a checkpoint with the arrays."""
RECORD = "record"
"""Folder of a checkpoint with the JSON file "metadata"."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves of a tree by their paths, such as ``"params/mu/learned"``."""
    flat = jax.tree.leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    names = [keystr(path, simple=True, separator="/") or "state" for path, _ in flat]
    if len(set(names)) < len(names):  # {"a/b": ..., "a": {"b": ...}}
        names = [keystr(path) for path, _ in flat]
    if len(set(names)) < len(names):
        twice = {name for name in names if names.count(name) > 1}
        raise ValueError(f"two leaves have the same path: {some_of(sorted(twice))}.")
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


class Kind(NamedTuple):
    """Shape and dtype of a leaf."""

    shape: tuple[int, ...]
    dtype: str  # "python int" and the like for Python's numbers


def is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def kind_of(name: str, x: Any, *, abstract: bool = False) -> Kind:
    if isinstance(x, bool | int | float | complex) and not isinstance(x, np.generic):
        return Kind((), f"python {type(x).__name__}")
    if is_abstract(x) and not abstract:
        raise TypeError(f"{name!r} is a shape without an array.")
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name!r} is a tracer: checkpoints are made outside of jit.")
    if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise TypeError(f"{name!r} is a {type(x).__name__}, not an array.")
    if is_key(x):
        return Kind(x.shape, str(x.dtype))
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_):
        raise TypeError(f"{name!r} is an array of {x.dtype}, not of numbers.")
    return Kind(x.shape, np.dtype(x.dtype).name)


def as_stored(name: str, x: Any) -> jax.Array | np.ndarray:
    """Converts a leaf to an array of numbers that no later write can change."""
    if kind_of(name, x).dtype.startswith("python "):
        x = np.asarray(x)
        if x.dtype == object:
            raise TypeError(f"{name!r} is an integer of more than 64 bits.")
    if is_key(x):
        x = jax.random.key_data(x)
    if not isinstance(x, jax.Array):
        return np.array(x, dtype=x.dtype.newbyteorder("="))
    if jax.process_count() > 1 and x.is_fully_addressable:
        return np.array(x)
    return x


def with_entries(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays with entries: Orbax cannot store empty ones."""
    return {name: x for name, x in arrays.items() if x.size}


def losses_of(tree: PyTree, place: str = "") -> dict[str, dict[str, Any]]:
    """What arrays without names are of, by their place in a tree.

    Loss names of loss logits, weighting states, scales and distributions, in order; of
    choices, their options; of a hardened one, the option that is left.
    """
    if isinstance(tree, LossLogits):
        primary = None if tree.primary is None else tree.names[tree.primary]
        return {place: {"names": list(tree.names), "primary": primary}}
    if isinstance(tree, ChoiceLogits):
        return {place: {"names": list(tree.options), "what": "options"}}
    if isinstance(tree, HardChoice):
        static = isinstance(tree.index, int)
        names = [tree.option] if static else list(tree.options)
        return {place: {"names": names, "what": "options"}}
    if isinstance(tree, Distribution):
        free = [name for name, x in zip(tree.names, tree.free, strict=True) if x]
        kind = type(tree).__name__
        return {place: {"names": list(tree.names), "kind": kind, "free": free}}
    if isinstance(tree, SkipOutliersState):
        inner = losses_of(tree.inner, f"{place}/inner".strip("/"))
        return {place: {"names": tree.names}, **inner} if tree.names else inner
    if isinstance(tree, WeightingState):
        names = loss_names(jax.tree.structure(tree.loss_weights))
        return {
            place: {"names": list(names)},
            **losses_of(tree.inner, f"{place}/inner".strip("/")),
        }
    found: dict[str, dict[str, Any]] = {}
    ours = lambda x: isinstance(
        x,
        LossLogits
        | WeightingState
        | SkipOutliersState
        | Distribution
        | ChoiceLogits
        | HardChoice,
    )
    for path, x in jax.tree.leaves_with_path(tree, is_leaf=ours):
        if ours(x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found |= losses_of(x, f"{place}/{name}".strip("/"))
    return found


def record_of(
    step: int, state: State, arrays: dict[str, Any], data: Any
) -> dict[str, Any]:
    """Makes the record that is stored beside the arrays."""
    found = digests(with_entries(arrays))
    entries = {}
    for name, x in named_leaves(state).items():
        entries[name] = kind_of(name, x)._asdict() | {"digest": found.get(name)}
        if is_key(x):
            entries[name]["implementation"] = str(jax.random.key_impl(x))
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "versions": {
            "yoto_jax": yoto_jax.__version__,
            "jax": jax.__version__,
            "orbax-checkpoint": importlib.metadata.version("orbax-checkpoint"),
        },
        "losses": losses_of(state),
        "arrays": entries,
        "data": as_json(data),
    }
    record = json.loads(json.dumps(record))
    return {**record, "digest": digest_of(record)}


def as_json(data: Any) -> Any:
    """Copies a JSON value, so that it cannot change while it is being written."""
    try:
        copied = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"data must be a JSON value: {reason_of(error)}") from None
    if copied != data:  # Tuples would become lists, integer keys text.
        raise TypeError(
            "data must be a JSON value, of dicts with text as keys, lists, text, "
            f"numbers, bools and None; {copied!r} would come back."
        )
    return copied


def digest_of(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_processes(path: str, arrays: dict[str, Any], record: dict[str, Any]) -> None:
    """Checks that processes agree on the values that only the first one writes."""
    if jax.process_count() == 1:
        return
    names = [name for name, x in arrays.items() if isinstance(x, np.ndarray)]
    parts = [record["arrays"][name] for name in names] + [record["data"]]
    mine = [hashlib.sha256(json.dumps(x).encode()).digest() for x in parts]
    all_of_them = multihost_utils.process_allgather(
        np.frombuffer(b"".join(mine), np.uint8).reshape(len(mine), -1)
    )
    differs = (all_of_them != all_of_them[0]).any((0, 2))
    if differs.any():
        names = [
            x for x, is_other in zip([*names, "data"], differs, strict=True) if is_other
        ]
        raise CheckpointError(
            f"{path}: not the same in all processes: {some_of(names)}. Make it a "
            "global array, or the same everywhere."
        )
