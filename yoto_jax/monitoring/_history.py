"""Histories of loss weights, fetched to the host."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from yoto_jax._losses import State, listed
from yoto_jax._outliers import SkipOutliersState
from yoto_jax.monitoring._record import (
    Columns,
    Downstream,
    HistoryState,
    Primary,
    Weighed,
    nodes,
)
from yoto_jax.weightings._log import LogState
from yoto_jax.weightings._wrappers import (
    EveryState,
    HoldState,
    NormalizeState,
    SmoothState,
)


class History(NamedTuple):
    """Recorded rows as NumPy arrays, in the order of time.

    Attributes:
      steps: (n,) number of the step of each row; the first step is 0.
      loss_weights: (n,) weights by name of the loss; NaN where the batch lacks it.
      losses: (n,) losses by name, unweighted; NaN where the batch lacks them, empty if
        they were never given.
      data_gradient: (n,) norm of the gradient of the logits, or None if there are none.
      prior_gradient: (n,) norm of rho times the gradient of the regulariser, or None.
      prior_weights: For each ``LossLogits``, the weights by name that the regulariser
        alone would choose. Empty if that is not known.
      downstream: The loss that steers the weights without one of its own, or None.
      num_skipped: (n,) batches that changed nothing, up to and with that of the row, or
        None if the weighting does not count them.
      present: (n,) whether the batch had the loss, by name; None if all had all.
      given: (n,) whether losses were given, which are NaN if not; None if always.
    """

    steps: np.ndarray
    loss_weights: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    data_gradient: np.ndarray | None = None
    prior_gradient: np.ndarray | None = None
    prior_weights: tuple[dict[str, float], ...] = ()
    downstream: str | None = None
    num_skipped: np.ndarray | None = None
    present: dict[str, np.ndarray] | None = None
    given: np.ndarray | None = None


def history(state: State, *, index: int | tuple[int, ...] | None = None) -> History:
    """Fetches the rows of :func:`record` or :func:`recorded` in one transfer.

    It waits for the step that made ``state``. Each of several processes reads its own
    copy, without communication.

    Args:
      state: State tree with one recorded history in it: the state of a chain or of a
        weighting, a ``TrainState``, an ``nnx.Optimizer``.
      index: For a state with leading axes: which replica of ``pmap`` (they are all
        alike: 0), which run of ``vmap``. Where a ``pmap`` spans processes, the index
        counts the replicas of this one.

    Returns:
      A :class:`History`. Its arrays are copies and have as many rows as were recorded.

    Raises:
      TypeError: The state is being traced.
      ValueError: No history in the state, or several; one that saw no loss logits, or
        is spread over processes; or leading axes and ``index`` do not go together.

    Warns:
      UserWarning: :func:`recorded` was put inside another wrapper.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> weighting = monitoring.recorded(yoto.weightings.equal(), length=2)
      >>> state = weighting.init({"a": 0.0, "b": 0.0})
      >>> for loss in (1.0, 2.0, 3.0):
      ...     _, state = weighting.update({"a": loss, "b": 1.0}, state)
      >>> seen = monitoring.history(state)
      >>> print(seen.steps, seen.losses["a"])
      [1 2] [2. 3.]
    """
    found = _find(state)
    return _as_history(*fetch_rows(found, index), found.columns)


def fetch_rows(
    ring: Any, index: int | tuple[int, ...] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and rows in the order of time, in one transfer."""
    steps, rows = jax.device_get([_local(ring.row_steps), _local(ring.rows)])
    axes = steps.shape[:-1]
    index = () if index is None else index if isinstance(index, tuple) else (index,)
    if len(index) != len(axes):
        hint = f"give index= with {len(axes)} of them, such as 0 for the first replica "
        hint = f"{hint}of pmap or run of vmap." if axes else "leave out index=."
        raise ValueError(f"this history has the leading axes {axes}: {hint}")
    steps, rows = steps[index][:-1], rows[index][:-1]  # The last one is spare.
    order = np.argsort(steps, kind="stable")
    order = order[steps[order] >= 0]
    return steps[order], rows[order]


_WRAPPERS = (
    EveryState,
    HoldState,
    LogState,
    NormalizeState,
    SkipOutliersState,
    SmoothState,
)


def find_one(
    state: State, kind: Any, what: tuple[str, str], remedy: str, maker: str
) -> Any:
    """The one node of this kind in a state.

    Args:
      state: Where it is.
      kind: Its type.
      what: What to call one of it, and several.
      remedy: What to do if there is none.
      maker: The wrapper of a weighting that makes it, to be outside of all others.
    """
    found = nodes(state, kind)
    if not found:
        raise ValueError(f"no {what[0]} in this state: {remedy}")
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} {what[1]} in this state, at "
            f"{listed(path for path, _ in found)}: give the part of it with the one to "
            "read."
        )
    for path, wrapper in nodes(state, _WRAPPERS):
        if nodes(wrapper, kind):
            name = type(wrapper).__name__.removesuffix("State")
            warnings.warn(
                f"this {what[0]} was {maker} inside another wrapper ({name}, at "
                f"{path!r}): its steps, losses and weights are those that the wrapper "
                f"lets through, not those of the run. Put monitoring.{maker} around "
                "all other wrappers.",
                stacklevel=4,
            )
    return found[0][1]


def _find(state: State) -> HistoryState:
    only = find_one(
        state,
        HistoryState,
        ("history", "histories"),
        "put monitoring.record(...) first in the chain of the optimizer, or "
        "monitoring.recorded(...) around the weighting, and give its state.",
        "recorded",
    )
    if not isinstance(only.columns, tuple):
        raise ValueError("this history is empty: record has seen no LossLogits.")
    return only


def _local(x: Any) -> Any:
    """The part of an array that this process holds."""
    if hasattr(x, "get_raw_value"):  # Flax NNX puts the leaves of a state into these.
        x = x.get_raw_value()
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            "history fetches arrays from the device: call it outside jit, on the state "
            "that comes out."
        )
    if getattr(x, "is_fully_addressable", True):
        return x
    if not x.is_fully_replicated:
        raise ValueError(
            "this history is spread over several processes: gather it first "
            "(jax.experimental.multihost_utils.process_allgather)."
        )
    return x.addressable_data(0)


def names_of(columns: tuple[Columns, ...]) -> list[str]:
    """Names of the losses."""
    return [name for group in columns for pair in group for name in pair]


def downstream_of(columns: tuple[Columns, ...]) -> str | None:
    """Name of the loss that steers, or None."""
    named = [item for group in columns for pair in group for item in pair.items()]
    return next((name for name, role in named if isinstance(role, Downstream)), None)


def _as_history(
    steps: np.ndarray, rows: np.ndarray, columns: tuple[Columns, ...]
) -> History:
    names = names_of(columns)
    by_name = lambda values: dict(zip(names, values, strict=True))
    each, count = rows.T.copy(), len(names)
    weights, losses, there = each[: 3 * count].reshape(3, count, -1)
    weights, losses = np.where(there > 0, [weights, losses], np.nan)
    present = None if there.all() else by_name(there > 0)
    rest = each[3 * count :]
    if len(rest) < 2:  # Of a weighting.
        counted = len(rest) and (rest[0] >= 0).all()
        return History(
            steps,
            by_name(weights),
            by_name(losses),
            downstream=downstream_of(columns),
            num_skipped=rest[0].astype(int) if counted else None,
            present=present,
        )
    given, data, *prior = rest
    return History(
        steps,
        by_name(weights),
        by_name(np.where(given > 0, losses, np.nan)) if given.any() else {},
        data,
        prior[0] if prior else None,
        tuple(filter(None, map(_prior_weights, columns))),
        present=present,
        given=None if given.all() else given > 0,
    )


def _prior_weights(group: Columns) -> dict[str, float]:
    """Weights at the minimum of the regulariser, empty where it has none."""
    named = [item for pair in group for item in pair.items()]
    if any(isinstance(role, Weighed) for _, role in named):
        return {}
    primary = {name for name, role in named if isinstance(role, Primary)}
    share = math.exp(_best_logit(len(named) - len(primary)))
    sizes = {name: 1.0 if name in primary else share for name, _ in named}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def _best_logit(auxiliary: int) -> float:
    """Root of Eq. 8 with one logit for all auxiliary losses, by bisection."""

    def slope(m: float) -> float:
        p = math.exp(m) / (1 + auxiliary * math.exp(m))
        return p * m * (1 - auxiliary * p) + 1 / (1 + math.exp(-m))

    low, high = -30.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


def check_history(history: Any) -> None:
    """Checks that this is a :class:`History`."""
    if not isinstance(history, History):
        raise TypeError(
            "history must be a History, what monitoring.history(state) returns, got "
            f"{type(history).__name__}."
        )


def weighed(seen: History) -> list[str]:
    """Names of the losses with a weight: all but a downstream loss."""
    return [name for name in seen.loss_weights if name != seen.downstream]
