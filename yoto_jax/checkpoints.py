"""Checkpoints of training. Needs ``pip install yoto_jax[checkpoints]``.

A thin layer over Orbax, which writes the arrays and coordinates the processes. What is
added: what a tree of arrays does not say by itself, such as which losses it is for, is
stored beside it; a checkpoint is compared with the state that it is restored into, and
with digests of what was saved; and every failure is a :class:`CheckpointError` that
says what is wrong with which folder.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import operator
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

try:
    import orbax.checkpoint as ocp
    from etils import epath
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.checkpoints needs Orbax: pip install 'yoto_jax[checkpoints]'"
    ) from error

import yoto_jax
from yoto_jax._checks import check_integers
from yoto_jax._digests import digests
from yoto_jax._loss_logits import LossLogits
from yoto_jax._losses import PyTree, listed, loss_names
from yoto_jax._weighting import WeightingState

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

FORMAT = "yoto_jax checkpoint"
VERSION = 1
"""Of the record. A checkpoint of a newer version is refused."""

# Parts of a checkpoint, each a folder: the arrays, and a JSON file "metadata".
ARRAYS, RECORD = "arrays", "record"
SHOWN = 6
"""Names in a message; of further ones the number."""
LENGTH = 160
"""Characters of a foreign message from its start, and from its end."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not what it should be."""


class Restored(NamedTuple):
    """What :meth:`Checkpoints.restore` returns."""

    step: int  # that it was saved with; 0 if there was no checkpoint
    state: PyTree
    data: Any  # the JSON value saved beside the state, or None


class Checkpoints:
    """The checkpoints of one training run, in one folder.

    Use it in a ``with`` statement: leaving it waits for what is still being written.
    With several processes, all of them make the same calls, with a folder that all see.

    Args:
      folder: Where they are, one folder for each step. Made if it is not there.
      every: :meth:`save` does something at multiples of this number of steps.
      keep: How many of the latest are kept, ``None`` for all. An old one is removed
        after a new one is complete.
      asynchronous: Whether :meth:`save` returns when the state is copied to the host,
        and files are written while training goes on.

    Raises:
      TypeError: ``every`` or ``keep`` is no integer, ``asynchronous`` no bool, or
        ``folder`` no path.
      ValueError: ``every`` or ``keep`` is not positive, or ``folder`` is empty.
      CheckpointError: The folder can be neither found nor made.

    Examples:
      >>> import tempfile, jax, yoto_jax as yoto
      >>> from yoto_jax.checkpoints import Checkpoints
      >>> mu = yoto.init_loss_logits({"depth": 0.0, "camera": 0.0}, "depth")
      >>> state = {"mu": mu, "key": jax.random.key(0)}
      >>> folder = tempfile.mkdtemp()
      >>> with Checkpoints(folder, every=10) as checkpoints:
      ...     for step in range(1, 26):
      ...         saved = checkpoints.save(step, state, data={"epoch": step // 10})
      >>> checkpoints.steps()
      [10, 20]
      >>> with Checkpoints(folder) as checkpoints:
      ...     step, state, data = checkpoints.restore(jax.eval_shape(lambda: state))
      >>> print(step, state["mu"], data)
      20 LossLogits(camera=-2.303, depth=None) {'epoch': 2}

    .. note::
      Orbax makes a checkpoint visible by renaming its folder when all of it is there.
      A process that is killed leaves at most a folder ``<step>.orbax-checkpoint-tmp``,
      which is no checkpoint and is removed at the next run's first save.

    .. warning::
      One run writes to a folder at a time. Others may read from it meanwhile.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        keep: int | None = 3,
        asynchronous: bool = True,
    ):
        for name, value in (("every", every), ("keep", 1 if keep is None else keep)):
            check_integers(**{name: value})
            if operator.index(value) < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not isinstance(asynchronous, bool):
            raise TypeError(
                f"asynchronous must be True or False, got {asynchronous!r}."
            )
        place = os.fspath(folder)
        if not place:
            raise ValueError("folder must be the path of a folder, got an empty one.")
        self.folder = epath.Path(place if "://" in place else os.path.abspath(place))
        self._every, self._keep, self._asynchronous = every, keep, asynchronous
        self._manager: ocp.CheckpointManager | None = None
        self._last = -1  # the latest step in the folder when saving began, or since
        self._known: int | None = None  # the step last saved or restored here
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the folder cannot be made: {_reason(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # What went wrong first is what matters.

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints in the folder, in ascending order.

        If a run was killed while it removed an old one, what is left of that is listed
        too, until the next run's first save; :meth:`restore` refuses it.
        """
        try:
            found = ocp.path.step.standard_name_format().find_all(self.folder)
            return sorted(checkpoint.step for checkpoint in found)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the folder cannot be read: {_reason(error)}"
            ) from error

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, ``None`` if there is none."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: PyTree, data: Any = None, *, force: bool = False
    ) -> bool:
        """Save the state of training after ``step`` steps, if it is due.

        Call it after every step. It waits for the checkpoint before to be complete, and
        for a copy of ``state`` on the host: the next step may donate its buffers.

        Args:
          step: Steps taken (not negative). Larger than that of any checkpoint in the
            folder; what has just been saved or restored is not saved again.
          state: Any tree of JAX and NumPy arrays, numbers and typed random keys. An
            array is written by the processes that hold it, each part once; what is in
            every process (NumPy arrays, numbers, arrays on one device) by the first.
          data: Any JSON value, such as the position of a data iterator. With several
            processes, the same in all.
          force: Whether to save at a step that is no multiple of ``every`` too.

        Returns:
          Whether it is saved.

        Raises:
          TypeError: A leaf of ``state`` is no array, or ``data`` is no JSON value.
          ValueError: ``step`` is negative, or ``state`` holds no array.
          CheckpointError: This or an earlier checkpoint could not be written, or there
            is a later one already.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}.")
        if step % self._every and not force:
            return False
        self.wait()
        if step == self._known:
            return False
        arrays = {name: _stored(name, x) for name, x in _leaves(state).items()}
        if not _filled(arrays):
            raise ValueError("state holds no arrays: there is nothing to save.")
        record = _record(step, state, arrays, data)
        _check_processes(f"{self.folder / str(step)}", arrays, record)
        manager = self._writer()
        if step <= self._last:
            raise CheckpointError(
                f"{self.folder}: there is a checkpoint of step {self._last} already, "
                f"so step {step} cannot be saved. Restore it, remove the folders of "
                "the later steps, or choose another folder."
            )
        with self._writing(step):
            manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        ARRAYS: ocp.args.StandardSave(_filled(arrays)),
                        RECORD: ocp.args.JsonSave(record),
                    }
                ),
                force=True,
            )
        self._known = self._last = step
        return True

    def restore(
        self,
        like: PyTree,
        step: int | None = None,
        *,
        missing: Literal["raise", "ok"] = "raise",
    ) -> Restored:
        """Restore the state of training, as it was saved to the last bit.

        Args:
          like: A state as training starts with, or ``jax.eval_shape`` of it. Arrays go
            to the devices that its arrays are on, whatever they were saved from. What
            has no place of its own (no ``sharding``, or JAX may move it as it likes)
            gets none.
          step: Which checkpoint, the latest unless told.
          missing: ``"ok"`` returns ``like`` and step 0 if there is no checkpoint, so
            that starting and resuming are the same line.

        Returns:
          Step, state and data as they were saved; the tree is like ``like``.

        Raises:
          TypeError: A leaf of ``like`` is no array.
          ValueError: ``missing`` is unknown, or ``"ok"`` where ``like`` is no state to
            start with; or ``like`` holds no arrays.
          CheckpointError: There is no such checkpoint; it is damaged, of another
            program or of a newer version; or it holds other losses, another primary
            loss, or arrays of other names, shapes or dtypes than ``like``.

        Examples:
          >>> import tempfile, jax.numpy as jnp
          >>> from yoto_jax.checkpoints import Checkpoints
          >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
          ...     state = {"w": jnp.zeros(2)}
          ...     step, state, data = checkpoints.restore(state, missing="ok")
          ...     while step < 3:
          ...         state, step = {"w": state["w"] + 1}, step + 1
          ...         saved = checkpoints.save(step, state)
          >>> print(step, state["w"])
          3 [3. 3.]
        """
        if missing not in ("raise", "ok"):
            raise ValueError(f"missing must be 'raise' or 'ok', got {missing!r}.")
        wanted = _leaves(like)
        if not wanted:
            raise ValueError(
                "like holds no arrays: give a state as training starts with."
            )
        abstract = [name for name, x in wanted.items() if _is_abstract(x)]
        if missing == "ok" and abstract:
            raise ValueError(
                "missing='ok' needs a state to start with; there is only the shape of "
                f"{_some(abstract)}."
            )
        self.wait()
        chosen = _agreed(self.latest_step()) if step is None else operator.index(step)
        if chosen is None:
            if missing == "ok":
                return Restored(0, like, None)
            raise CheckpointError(f"{self.folder}: there is no checkpoint here.")
        path = self.folder / str(chosen)
        try:
            record = _read(path, chosen)
            _compare(like, wanted, record)
            leaves = _load(path, wanted, record["arrays"])
        except _Unfit as error:
            others = [str(x) for x in self.steps() if x != chosen]
            listing = f"Other steps: {', '.join(others)}." if others else "No others."
            raise CheckpointError(f"{path}: {error} {listing}") from error.__cause__
        self._known = chosen
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(chosen, state, record["data"])

    def wait(self) -> None:
        """Wait until what has been saved is complete.

        Raises:
          CheckpointError: It could not be written.
        """
        if self._manager is not None:
            with self._writing(self._known):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until what has been saved is complete, and release what it took.

        Raises:
          CheckpointError: It could not be written.
        """
        self.wait()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager, made when there is something to write and not before.

        It removes what a killed run has left: one that only reads must not do that.
        """
        if self._manager is None:
            self._last = -1 if (last := self.latest_step()) is None else last
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=self._asynchronous,
                # In the background, a folder that cannot be made is waited for.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                cleanup_tmp_directories=True,
            )
            with self._writing(None):
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        assert self._manager is not None
        return self._manager

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Turn a failure to write into a :class:`CheckpointError`."""
        try:
            yield
        except Exception as error:
            # A new manager starts afresh, and removes what this one has left.
            manager, self._manager = self._manager, None
            self._known = None
            with contextlib.suppress(Exception):
                if manager is not None:
                    manager.close()
            path = self.folder if step is None else self.folder / str(step)
            intact = ""
            with contextlib.suppress(CheckpointError):
                intact = ", ".join(map(str, self.steps()))
            raise CheckpointError(
                f"{path}: the checkpoint could not be written: {_reason(error)} "
                f"Complete: {intact or 'none'}."
            ) from error


class _Unfit(Exception):
    """Why a checkpoint cannot be restored."""


def _reason(error: BaseException) -> str:
    """The first line of a message as a sentence, without the middle if it is long."""
    text = str(error).strip().partition("\n")[0]
    text = text.partition(" [tensorstore_spec")[0]  # Hundreds of settings.
    if len(text) > 2 * LENGTH:
        text = f"{text[:LENGTH]} ... {text[-LENGTH:]}"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    rest = len(names) - SHOWN
    return listed(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# What is stored.


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as ``"params/mu/learned"``."""
    flat = jax.tree.leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    names = [keystr(path, simple=True, separator="/") or "state" for path, _ in flat]
    if len(set(names)) < len(names):  # {"a/b": ..., "a": {"b": ...}}
        names = [keystr(path) for path, _ in flat]
    if len(set(names)) < len(names):
        twice = {name for name in names if names.count(name) > 1}
        raise ValueError(f"two leaves have the same path: {_some(sorted(twice))}.")
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


class _Kind(NamedTuple):
    """What a leaf is."""

    shape: tuple[int, ...]
    dtype: str  # "python int" and the like for Python's numbers


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _kind(name: str, x: Any, *, abstract: bool = False) -> _Kind:
    if isinstance(x, bool | int | float | complex) and not isinstance(x, np.generic):
        return _Kind((), f"python {type(x).__name__}")
    if _is_abstract(x) and not abstract:
        raise TypeError(f"{name!r} is a shape without an array.")
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name!r} is a tracer: checkpoints are made outside of jit.")
    if not isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise TypeError(f"{name!r} is a {type(x).__name__}, not an array.")
    if _is_key(x):
        return _Kind(x.shape, str(x.dtype))
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_):
        raise TypeError(f"{name!r} is an array of {x.dtype}, not of numbers.")
    return _Kind(x.shape, np.dtype(x.dtype).name)


def _stored(name: str, x: Any) -> jax.Array | np.ndarray:
    """A leaf as Orbax gets it: numbers alone, and nothing that may change later."""
    if _kind(name, x).dtype.startswith("python "):
        x = np.asarray(x)
        if x.dtype == object:
            raise TypeError(f"{name!r} is an integer of more than 64 bits.")
    if _is_key(x):
        x = jax.random.key_data(x)
    if not isinstance(x, jax.Array):
        return np.array(x, dtype=x.dtype.newbyteorder("="))
    if jax.process_count() > 1 and x.is_fully_addressable:
        return np.array(x)
    return x


def _filled(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays that have entries: Orbax cannot store others."""
    return {name: x for name, x in arrays.items() if x.size}


def _losses(tree: PyTree, place: str = "") -> dict[str, dict[str, Any]]:
    """The losses of all loss logits and weighting states in a tree, in their order."""
    if isinstance(tree, LossLogits):
        primary = None if tree.primary is None else tree.names[tree.primary]
        return {place: {"names": list(tree.names), "primary": primary}}
    if isinstance(tree, WeightingState):
        names = loss_names(jax.tree.structure(tree.loss_weights))
        return {
            place: {"names": list(names)},
            **_losses(tree.inner, f"{place}/inner".strip("/")),
        }
    found: dict[str, dict[str, Any]] = {}
    ours = lambda x: isinstance(x, LossLogits | WeightingState)
    for path, x in jax.tree.leaves_with_path(tree, is_leaf=ours):
        if ours(x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found |= _losses(x, f"{place}/{name}".strip("/"))
    return found


def _record(
    step: int, state: PyTree, arrays: dict[str, Any], data: Any
) -> dict[str, Any]:
    """What is stored beside the arrays."""
    found = digests(_filled(arrays))
    entries = {}
    for name, x in _leaves(state).items():
        entries[name] = _kind(name, x)._asdict() | {"digest": found.get(name)}
        if _is_key(x):
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
        "losses": _losses(state),
        "arrays": entries,
        "data": _json(data),
    }
    record = json.loads(json.dumps(record))
    return {**record, "digest": _digest(record)}


def _json(data: Any) -> Any:
    """A copy of a JSON value, which nobody can change while it is being written."""
    try:
        copied = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"data must be a JSON value: {_reason(error)}") from None
    if copied != data:  # Tuples would become lists, integer keys text.
        raise TypeError(
            "data must be a JSON value, of dicts with text as keys, lists, text, "
            f"numbers, bools and None; {copied!r} would come back."
        )
    return copied


def _digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_processes(path: str, arrays: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise if processes disagree on what only the first one of them writes."""
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
            f"{path}: not the same in all processes: {_some(names)}. Make it a global "
            "array, or the same everywhere."
        )


# What is restored.


def _agreed(step: int | None) -> int | None:
    """The latest step as the first process sees it: file systems may lag behind."""
    if jax.process_count() == 1:
        return step
    mine = np.asarray(-1 if step is None else step)
    first = int(multihost_utils.broadcast_one_to_all(mine))
    return None if first < 0 else first


def _read(path: epath.Path, step: int) -> dict[str, Any]:
    """The record of a checkpoint."""
    file = path / RECORD / "metadata"
    try:
        if not path.exists():
            raise _Unfit("there is no such checkpoint.")
        if not file.exists():
            raise _Unfit(
                f"this is no checkpoint of yoto_jax: it has no {RECORD}/metadata."
            )
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise _Unfit(f"it cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        damage = f"{RECORD}/metadata is damaged: {_reason(error)}"
        raise _Unfit(damage) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _Unfit(f"{RECORD}/metadata is not a record of yoto_jax, or is damaged.")
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise _Unfit(
            f"its format has version {version}; yoto_jax {yoto_jax.__version__} knows "
            f"versions up to {VERSION}. Upgrade yoto_jax."
        )
    if record.get("digest") != _digest(record):
        raise _Unfit(f"{RECORD}/metadata is damaged: its digest is another.")
    if record["step"] != step:
        raise _Unfit(f"this is the checkpoint of step {record['step']}, renamed.")
    return record


def _compare(like: PyTree, wanted: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise unless a checkpoint fits the state that it is to be restored into."""
    here, there = _losses(like), record["losses"]
    for place in here:
        if place in there:
            _compare_losses(place or "the state", here[place], there[place])
    kinds = {name: _kind(name, x, abstract=True) for name, x in wanted.items()}
    saved = {
        name: _Kind(tuple(x["shape"]), x["dtype"])
        for name, x in record["arrays"].items()
    }
    problems = []
    if missing := [name for name in kinds if name not in saved]:
        problems.append(f"missing: {_some(missing)}")
    if unexpected := [name for name in saved if name not in kinds]:
        problems.append(f"unexpected: {_some(unexpected)}")
    for name, kind in kinds.items():
        if name in saved and not _fits(saved[name], kind, wanted[name]):
            problems.append(f"{name!r} is {_shown(saved[name])}, not {_shown(kind)}")
    if problems:
        rest = len(problems) - SHOWN
        raise _Unfit(
            "it holds another state; "
            + "; ".join(problems[:SHOWN])
            + (f"; and {rest} more." if rest > 0 else ".")
        )


def _compare_losses(place: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    missing = [name for name in here["names"] if name not in there["names"]]
    unexpected = [name for name in there["names"] if name not in here["names"]]
    if missing or unexpected:
        parts = (("missing", missing), ("unexpected", unexpected))
        difference = "; ".join(f"{word}: {_some(x)}" for word, x in parts if x)
        raise _Unfit(f"{place} is for other losses; {difference}.")
    if here["names"] != there["names"]:
        raise _Unfit(
            f"{place} has its losses in another order: {_some(there['names'])}, not "
            f"{_some(here['names'])}."
        )
    if here.get("primary") != there.get("primary"):
        raise _Unfit(
            f"{place} has another primary loss: {there.get('primary')!r}, not "
            f"{here.get('primary')!r}."
        )


def _fits(saved: _Kind, kind: _Kind, like: Any) -> bool:
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


def _shown(kind: _Kind) -> str:
    return f"{kind.dtype}{list(kind.shape)}"


def _load(
    path: epath.Path, wanted: dict[str, Any], saved: dict[str, dict[str, Any]]
) -> list[Any]:
    """The leaves, in the order of ``wanted``, checked against their digests."""
    targets = {name: _target(x, saved[name]) for name, x in wanted.items()}
    filled = {name: x for name, x in targets.items() if np.prod(x.shape, dtype=int)}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            read = checkpointer.restore(path / ARRAYS, filled)
    except Exception as error:
        raise _Unfit(f"{ARRAYS} cannot be read: {_reason(error)}") from error
    read = {name: read.get(name, x) for name, x in targets.items()}
    placed = {name: _placed(read[name], x, saved[name]) for name, x in wanted.items()}
    found = digests({name: placed[name] for name in filled})
    changed = [name for name in filled if found[name] != saved[name]["digest"]]
    if changed:
        raise _Unfit(f"{ARRAYS} is damaged: other contents in {_some(changed)}.")
    return [_back(placed[name], x, saved[name]) for name, x in wanted.items()]


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Where an array is to go, ``None`` if it has no place of its own."""
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
    """What to ask Orbax for: numbers as they were saved, placed where ``like`` is."""
    shape, dtype = tuple(saved["shape"]), saved["dtype"].removeprefix("python ")
    if _is_key(like):
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
    """What was read, as a JAX array if it is to be one."""
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
    """A leaf of the kind of ``like``."""
    if _is_key(like):
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
