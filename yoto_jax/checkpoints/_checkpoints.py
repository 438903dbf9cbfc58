"""Saving and restoring of checkpoints in one folder."""

import contextlib
import operator
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from yoto_jax._checks import check_integers
from yoto_jax._losses import Losses, State
from yoto_jax.checkpoints._errors import CheckpointError, Unfit, reason_of, some_of
from yoto_jax.checkpoints._record import (
    ARRAYS,
    RECORD,
    as_stored,
    check_processes,
    is_abstract,
    named_leaves,
    record_of,
    with_entries,
)
from yoto_jax.checkpoints._restore import agreed_step, compare, load, read_record


class Restored(NamedTuple):
    """Result of :meth:`Checkpoints.restore`."""

    step: int  # that it was saved with; 0 if there was no checkpoint
    state: State
    data: Any  # the JSON value saved beside the state, or None


class Checkpoints:
    """Checkpoints of one training run, in one folder.

    Inside its ``with`` statement writes go on in the background, and leaving it waits
    for them; outside, :meth:`save` returns when the checkpoint is complete. With
    several processes, all of them make the same calls, with a folder that all see.

    Args:
      folder: Path, with one subfolder for each step. Created if missing.
      every: Steps from one checkpoint to the next: :meth:`save` skips all others.
      keep: Number of latest checkpoints to keep, ``None`` for all. An old one is
        removed after a new one is complete.

    Raises:
      TypeError: ``every`` or ``keep`` is no integer, or ``folder`` no path.
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
      A killed process leaves at most a folder ``<step>.orbax-checkpoint-tmp``, which is
      no checkpoint and is removed at the next run's first save.

    .. warning::
      One run writes to a folder at a time. Others may read from it meanwhile.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        keep: int | None = 3,
    ):
        for name, value in (("every", every), ("keep", 1 if keep is None else keep)):
            check_integers(**{name: value})
            if operator.index(value) < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        place = os.fspath(folder)
        if not place:
            raise ValueError("folder must be the path of a folder, got an empty one.")
        self.folder = epath.Path(place if "://" in place else os.path.abspath(place))
        self._every, self._keep = every, keep
        self._in_background = False  # whether somebody will wait: a with statement
        self._manager: ocp.CheckpointManager | None = None
        self._last = -1  # the latest step in the folder when saving began, or since
        self._known: int | None = None  # the step last saved or restored here
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the folder cannot be made: {reason_of(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        self._in_background = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._in_background = False
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # What went wrong first is what matters.

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in ascending order.

        If a run was killed while it removed an old one, what is left of that is listed
        too, until the next run's first save; :meth:`restore` refuses it.
        """
        try:
            found = ocp.path.step.standard_name_format().find_all(self.folder)
            return sorted(checkpoint.step for checkpoint in found)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the folder cannot be read: {reason_of(error)}"
            ) from error

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or ``None``."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: State, *, data: Any = None, force: bool = False
    ) -> bool:
        """Saves the state of training after ``step`` steps, if it is due.

        Call it after every step. It waits for the checkpoint before to be complete, and
        for a copy of ``state`` on the host: the next step may donate its buffers.

        Args:
          step: Steps taken (not negative). Larger than that of any checkpoint in the
            folder; what has just been saved or restored is not saved again.
          state: State tree of JAX and NumPy arrays, numbers and typed random keys. An
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
        arrays = {name: as_stored(name, x) for name, x in named_leaves(state).items()}
        if not with_entries(arrays):
            raise ValueError("state holds no arrays: there is nothing to save.")
        record = record_of(step, state, arrays, data)
        check_processes(f"{self.folder / str(step)}", arrays, record)
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
                        ARRAYS: ocp.args.StandardSave(with_entries(arrays)),
                        RECORD: ocp.args.JsonSave(record),
                    }
                ),
                force=True,
            )
        self._known = self._last = step
        if not self._in_background:
            self.wait()
        return True

    def restore(
        self,
        like: Losses,
        *,
        step: int | None = None,
        missing: Literal["raise", "ok"] = "raise",
    ) -> Restored:
        """Restores the state of training, bit for bit.

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
        wanted = named_leaves(like)
        if not wanted:
            raise ValueError(
                "like holds no arrays: give a state as training starts with."
            )
        abstract = [name for name, x in wanted.items() if is_abstract(x)]
        if missing == "ok" and abstract:
            raise ValueError(
                "missing='ok' needs a state to start with; there is only the shape of "
                f"{some_of(abstract)}."
            )
        self.wait()
        chosen = (
            agreed_step(self.latest_step()) if step is None else operator.index(step)
        )
        if chosen is None:
            if missing == "ok":
                return Restored(0, like, None)
            raise CheckpointError(f"{self.folder}: there is no checkpoint here.")
        path = self.folder / str(chosen)
        try:
            record = read_record(path, chosen)
            compare(like, wanted, record)
            leaves = load(path, wanted, record["arrays"])
        except Unfit as error:
            others = [str(x) for x in self.steps() if x != chosen]
            listing = f"Other steps: {', '.join(others)}." if others else "No others."
            raise CheckpointError(f"{path}: {error} {listing}") from error.__cause__
        self._known = chosen
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(chosen, state, record["data"])

    def wait(self) -> None:
        """Waits until all saved checkpoints are complete.

        Raises:
          CheckpointError: It could not be written.
        """
        if self._manager is not None:
            with self._writing(self._known):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saved checkpoints are complete, and releases resources.

        Raises:
          CheckpointError: It could not be written.
        """
        self.wait()
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager, created at the first write.

        It removes the remains of killed runs: a process that only reads must not.
        """
        if self._manager is None:
            self._last = -1 if (last := self.latest_step()) is None else last
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=True,
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
        """Turns a failure to write into a :class:`CheckpointError`."""
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
                f"{path}: the checkpoint could not be written: {reason_of(error)} "
                f"Complete: {intact or 'none'}."
            ) from error
