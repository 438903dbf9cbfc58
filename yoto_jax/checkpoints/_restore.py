"""Restoring: comparison with the expected state, reading and placement."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

import yoto_jax
from yoto_jax._checks import is_key
from yoto_jax._digests import digests
from yoto_jax._losses import Losses
from yoto_jax.checkpoints._errors import SHOWN, Unfit, reason_of, some_of
from yoto_jax.checkpoints._record import (
    ARRAYS,
    FORMAT,
    RECORD,
    VERSION,
    Kind,
    digest_of,
    kind_of,
    losses_of,
)


def agreed_step(step: int | None) -> int | None:
    """Latest step as the first process sees it: file systems may lag behind."""
    if jax.process_count() == 1:
        return step
    mine = np.asarray(-1 if step is None else step)
    first = int(multihost_utils.broadcast_one_to_all(mine))
    return None if first < 0 else first


def read_record(path: epath.Path, step: int) -> dict[str, Any]:
    """Reads and verifies the record of a checkpoint."""
    file = path / RECORD / "metadata"
    try:
        if not path.exists():
            raise Unfit("there is no such checkpoint.")
        if not file.exists():
            raise Unfit(
                f"this is no checkpoint of yoto_jax: it has no {RECORD}/metadata."
            )
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise Unfit(f"it cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        damage = f"{RECORD}/metadata is damaged: {reason_of(error)}"
        raise Unfit(damage) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Unfit(f"{RECORD}/metadata is not a record of yoto_jax, or is damaged.")
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise Unfit(
            f"its format has version {version}; yoto_jax {yoto_jax.__version__} knows "
            f"versions up to {VERSION}. Upgrade yoto_jax."
        )
    if record.get("digest") != digest_of(record):
        raise Unfit(f"{RECORD}/metadata is damaged: its digest is another.")
    if record["step"] != step:
        raise Unfit(f"this is the checkpoint of step {record['step']}, renamed.")
    return record


def compare(like: Losses, wanted: dict[str, Any], record: dict[str, Any]) -> None:
    """Checks that a checkpoint fits the state that it is to be restored into."""
    here, there = losses_of(like), record["losses"]
    for place in here:
        if place in there:
            _compare_losses(place or "the state", here[place], there[place])
    kinds = {name: kind_of(name, x, abstract=True) for name, x in wanted.items()}
    saved = {
        name: Kind(tuple(x["shape"]), x["dtype"])
        for name, x in record["arrays"].items()
    }
    problems = []
    if missing := [name for name in kinds if name not in saved]:
        problems.append(f"missing: {some_of(missing)}")
    if unexpected := [name for name in saved if name not in kinds]:
        problems.append(f"unexpected: {some_of(unexpected)}")
    for name, kind in kinds.items():
        if name in saved and not _fits(saved[name], kind, wanted[name]):
            problems.append(f"{name!r} is {_shown(saved[name])}, not {_shown(kind)}")
    if problems:
        rest = len(problems) - SHOWN
        raise Unfit(
            "it holds another state; "
            + "; ".join(problems[:SHOWN])
            + (f"; and {rest} more." if rest > 0 else ".")
        )


def _compare_losses(place: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    what = here.get("what", "losses")
    missing = [name for name in here["names"] if name not in there["names"]]
    unexpected = [name for name in there["names"] if name not in here["names"]]
    if missing or unexpected:
        parts = (("missing", missing), ("unexpected", unexpected))
        difference = "; ".join(f"{word}: {some_of(x)}" for word, x in parts if x)
        raise Unfit(f"{place} is for other {what}; {difference}.")
    if here["names"] != there["names"]:
        raise Unfit(
            f"{place} has its {what} in another order: {some_of(there['names'])}, not "
            f"{some_of(here['names'])}."
        )
    if here.get("primary") != there.get("primary"):
        raise Unfit(
            f"{place} has another primary loss: {there.get('primary')!r}, not "
            f"{here.get('primary')!r}."
        )
    for key, what in (
        ("kind", "kind of distribution"),
        ("free", "set of free weights"),
    ):
        if here.get(key) != there.get(key):
            raise Unfit(
                f"{place} has another {what}: {there.get(key)!r}, not "
                f"{here.get(key)!r}."
            )


def _fits(saved: Kind, kind: Kind, like: Any) -> bool:
    if saved.shape != kind.shape or saved.dtype == kind.dtype:
        return saved == kind
    # A Python number may have become an array on the way, or be one in what is like it.
    if saved.dtype.startswith("python "):
        number = saved.dtype.removeprefix("python ")
        weak = getattr(like, "weak_type", False) or kind.dtype == "bool"
        return weak and kind.dtype.startswith(number)
    if kind.dtype.startswith("python "):
        return saved.dtype.startswith(kind.dtype.removeprefix("python "))
    return False


def _shown(kind: Kind) -> str:
    return f"{kind.dtype}{list(kind.shape)}"


def load(
    path: epath.Path, wanted: dict[str, Any], saved: dict[str, dict[str, Any]]
) -> list[Any]:
    """Reads the leaves in the order of ``wanted`` and verifies their digests."""
    targets = {name: _target(x, saved[name]) for name, x in wanted.items()}
    filled = {name: x for name, x in targets.items() if np.prod(x.shape, dtype=int)}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            read = checkpointer.restore(path / ARRAYS, filled)
    except Exception as error:
        raise Unfit(f"{ARRAYS} cannot be read: {reason_of(error)}") from error
    read = {name: read.get(name, x) for name, x in targets.items()}
    placed = {name: _placed(read[name], x, saved[name]) for name, x in wanted.items()}
    found = digests({name: placed[name] for name in filled})
    changed = [name for name in filled if found[name] != saved[name]["digest"]]
    if changed:
        raise Unfit(f"{ARRAYS} is damaged: other contents in {some_of(changed)}.")
    return [_back(placed[name], x, saved[name]) for name, x in wanted.items()]


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Target sharding of an array, ``None`` if it has none of its own."""
    sharding = getattr(like, "sharding", None)
    if isinstance(like, jax.Array) and not getattr(like, "committed", True):
        return None
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        mesh = jax.sharding.get_mesh()
        return None if mesh.empty else jax.sharding.NamedSharding(mesh, sharding.spec)
    return sharding


def _target(like: Any, saved: dict[str, Any]) -> Any:
    """Request to Orbax: the saved shape and dtype, on the devices of ``like``."""
    shape, dtype = tuple(saved["shape"]), saved["dtype"].removeprefix("python ")
    if is_key(like):
        data = jax.eval_shape(jax.random.key_data, like)
        shape, dtype = data.shape, data.dtype
    sharding = _sharding(like)
    own = sharding is not None and sharding.is_fully_addressable
    if (
        sharding is None
        or saved["dtype"].startswith("python ")
        or (own and jax.process_count() > 1)
    ):  # A view of one number: what stands in for an array takes no memory.
        return np.broadcast_to(np.zeros((), np.dtype(dtype)), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(read: Any, like: Any, saved: dict[str, Any]) -> Any:
    """Converts what was read to a JAX array where ``like`` is one."""
    if isinstance(read, jax.Array):
        return read
    if isinstance(read, jax.ShapeDtypeStruct):  # No entries: nothing was stored.
        return jnp.zeros(read.shape, read.dtype, device=read.sharding)
    numbers = not isinstance(like, jax.Array | jax.ShapeDtypeStruct)
    if numbers or saved["dtype"].startswith("python "):
        return np.array(read)
    sharding = _sharding(like)
    return jnp.array(read) if sharding is None else jax.device_put(read, sharding)


def _back(placed: Any, like: Any, saved: dict[str, Any]) -> Any:
    """Converts a leaf to the type of ``like``."""
    if is_key(like):
        return jax.random.wrap_key_data(placed, impl=saved["implementation"])
    if isinstance(like, np.generic):
        return placed[()]
    if isinstance(like, np.ndarray):
        return placed
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return type(like)(np.asarray(placed).item())
    sharding = _sharding(like)
    if isinstance(placed, np.ndarray):  # Saved as a number of Python's.
        number = jnp.asarray(placed.item())
        return number if sharding is None else jax.device_put(number, sharding)
    if like.weak_type and placed.is_fully_addressable:
        # Else a step would compile once more, and might promote to another dtype.
        zeros = jnp.full(like.shape, np.zeros((), like.dtype).item())
        if zeros.weak_type and zeros.dtype == like.dtype:
            weak = zeros.at[...].set(np.asarray(placed))
            return weak if sharding is None else jax.device_put(weak, sharding)
    return placed
