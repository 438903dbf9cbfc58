"""What a weighting promises of ``init`` and ``update`` alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yoto_jax._checks import is_key
from yoto_jax._losses import Losses, split
from yoto_jax._weighting import MATRICES, weights_of
from yoto_jax.testing._compare import (
    named_leaves,
    require,
    require_close,
    require_equal,
    require_finite,
    require_types,
)
from yoto_jax.testing._promises import check_weights, require_dtype, require_skipped
from yoto_jax.testing._trial import Batch, Trial


def check_state(trial: Trial) -> None:
    """The state says the weights and counts; its types are those of the losses."""
    abstract = trial.init()
    losses = trial.loss_fn(trial.params, trial.batches[0])
    state = trial.weighting.init(losses)
    require_types(state, abstract, "the state from losses, as that from their shapes,")
    for name, x in named_leaves(state).items():
        require(
            isinstance(x, jax.Array),
            f"the state must hold arrays alone, {name!r} is a {type(x).__name__}.",
        )
    check_weights(weights_of(state), trial, "loss_weights of the state")
    for name in ("num_updates", "num_skipped"):
        counts = [x for _, x in optax.tree.get_all_with_path(state, name)]
        require(
            bool(counts) and all(x.dtype == jnp.int32 and x == 0 for x in counts),
            f"the state must hold {name}, an int32 that starts at 0, got {counts}.",
        )


def check_bad_numbers(trial: Trial) -> None:
    """So does one loss, or one entry of a statistic, that is not finite."""
    state = trial.state_that_is_due()
    for bad in (np.nan, np.inf, -np.inf):
        batch = trial.batch(0)
        batch.losses[-1] = bad
        _, after = trial.tell(batch, state)
        require_skipped(after, state, f"a loss of {bad}")
    for name in trial.batch(0).statistics:
        batch = trial.batch(0)
        batch.statistics[name][-1] = np.nan
        _, after = trial.tell(batch, state)
        require_skipped(after, state, f"{name}= with NaN")


def check_absent_losses(trial: Trial) -> None:
    """An absent loss has no weight, and leaves no trace in weights and state."""
    state = trial.state_that_is_due()
    for absent in range(trial.size):
        if absent == trial.position or trial.size == 1:
            continue
        there = np.arange(trial.size) != absent
        weights, after = trial.tell(trial.batch(0), state, there)
        weight = float(jax.tree.leaves(weights)[absent])
        require(weight == 0, f"the weight of an absent loss must be 0, got {weight}.")
        require_finite((weights, after), "weights and state without a loss")
        for junk in (np.nan, 1e6):
            batch = _spoil(trial.batch(0), absent, junk)
            _, again = trial.tell(batch, state, there)
            require_equal(
                again, after, f"an absent loss of {junk} leaves a trace: state"
            )
        _require_row_held(after, state, absent, trial)
    weights, after = trial.tell(trial.batch(0), state, np.full(trial.size, False))
    what = "without any loss"
    zero = not any(jax.tree.leaves(weights))
    require(zero, f"the weights {what} must be 0, got {weights}.")
    require_equal(after, state, f"the state {what} must stay what it was: state")


def _spoil(batch: Batch, position: int, junk: float) -> Batch:
    batch.losses[position] = junk
    for name, x in batch.statistics.items():
        x[position] = junk
        if name in MATRICES:
            x[:, position] = junk
    return batch


def _require_row_held(after: Any, before: Any, position: int, trial: Trial) -> None:
    """In arrays (K, ...), and in trees like the losses, nothing happens to one loss."""
    alike = lambda tree: jax.tree.structure(tree) == trial.structure
    new, old = (jax.tree.leaves(x, is_leaf=alike) for x in (after, before))
    for now, then in zip(new, old, strict=True):
        if alike(now):
            now, then = (jax.tree.leaves(x)[position] for x in (now, then))
        elif jnp.shape(now)[:1] == (trial.size,) and not is_key(now):
            now, then = now[position], then[position]
        else:
            continue
        what = "the row of an absent loss in the state must be held: row"
        require_equal(now, then, what)


def check_fewer_losses(trial: Trial) -> None:
    """Without a loss, the weights are those of the method for the others alone.

    Only where the method can be made for K - 1 losses and starts from the same state.
    """
    if trial.size == 1:
        return
    absent = max(k for k in range(trial.size) if k != trial.position)
    others = [k for k in range(trial.size) if k != absent]
    some = lambda values: trial.structure.unflatten(
        [values[k] if k in others else None for k in range(trial.size)]
    )
    try:
        part = trial.weighting.init(some(np.ones(trial.size, np.float32)))
    except (ValueError, TypeError):  # It has numbers of its own for K losses.
        return
    full = trial.init()
    if not _is_part(part, full, others):
        return
    there = np.isin(np.arange(trial.size), others)
    update = jax.jit(trial.weighting.update)
    for seed in range(3):
        batch = trial.batch(seed)
        seen = _pick(batch, np.array(others)).statistics
        losses, seen = jax.tree.map(jnp.float32, (some(batch.losses), seen))
        expected, part = update(losses, part, **seen)
        weights, full = trial.tell(batch, full, there)
        got = some(jax.tree.leaves(weights))
        what = "without a loss, the weights must be those for the others alone: weights"
        require_close(got, expected, what, rtol=1e-3, atol=1e-4)


def _is_part(part: Any, full: Any, others: list[int]) -> bool:
    """Whether one state is another one without the rows of a loss, and has no key."""
    named, expected = named_leaves(part), named_leaves(full)
    for name, x in named.items():
        if name.startswith("loss_weights"):  # What came out last, in no update's way.
            continue
        if name not in expected or is_key(x):
            return False
        y = expected[name]
        for axis in range(min(x.ndim, y.ndim)):
            if x.shape[axis] != y.shape[axis]:
                y = jnp.take(y, jnp.asarray(others), axis)
        if x.shape != y.shape or not np.array_equal(x, y, equal_nan=True):
            return False
    return True


def _pick(batch: Batch, chosen: np.ndarray) -> Batch:
    """Some losses of a batch, in the order given."""
    seen = {name: x[chosen] for name, x in batch.statistics.items()}
    for name in {*MATRICES} & {*seen}:
        seen[name] = seen[name][:, chosen]
    return Batch(batch.losses[chosen], seen)


def check_order(trial: Trial) -> None:
    """Losses that trade places trade their weights."""
    fixed = trial.position
    others = [k for k in range(trial.size) if k != fixed]
    order = np.arange(trial.size)
    order[others] = np.roll(others, 1)
    plain = turned = trial.init()
    for seed in range(4):
        batch = trial.batch(seed)
        weights, plain = trial.tell(batch, plain)
        moved, turned = trial.tell(_pick(batch, order), turned)
    weights, moved = (np.stack(jax.tree.leaves(w)) for w in (weights, moved))
    what = "weights of losses that trade places (or say about=, order_matters=True)"
    require_close(moved, weights[order], what, rtol=1e-3, atol=1e-4)


def check_promotion(trial: Trial) -> None:
    """No dtype is promoted in silence, whatever the losses come in."""
    for dtype in ("float32", "bfloat16", "float64"):
        with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
            weights, first, state = jax.eval_shape(*_all_calls(trial, dtype))
        wide = "float64" if dtype == "float64" else "float32"
        require_dtype(weights, wide, f"weights of losses in {dtype}")
        dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
        require(
            dtypes(first) == dtypes(state),
            f"dtypes of the state change with losses in {dtype}: {dtypes(first)}, then "
            f"{dtypes(state)}.",
        )


def _all_calls(trial: Trial, dtype: str) -> tuple[Any, ...]:
    """A function that calls all that a weighting has, and shapes for it."""
    weighting, size = trial.weighting, trial.size
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)

    def run(losses: Losses, gramian: Any, numbers: Any, norm: Any) -> Any:
        given = {
            name: gramian if name in MATRICES else numbers
            for name in weighting.needs
            if name != "losses"
        }
        first = weighting.init(losses)
        weights, state = weighting.update(losses, first, **given)
        if weighting.due:
            weighting.due(state)
        if weighting.observe:
            norms = {"cotangent_norm": norm, "gradient_norm": norm}
            state = weighting.observe(state, **norms)
        if weighting.observe_step:
            state = weighting.observe_step(losses, state)
        return weights, first, state

    losses = trial.structure.unflatten([shape()] * size)
    return run, losses, shape(size, size), shape(size), shape()


def check_errors(trial: Trial) -> None:
    """Losses and states that do not fit are errors, which name what is wrong."""
    state, batch = trial.init(), trial.batch(0)
    seen = jax.tree.map(jnp.float32, batch.statistics)
    losses = split(jnp.float32(batch.losses), trial.structure)
    update = lambda losses, state: trial.weighting.update(losses, state, **seen)
    vector = trial.structure.unflatten([jnp.ones(2), *jax.tree.leaves(losses)[1:]])
    stranger = {"stranger": losses}
    _require_error(lambda: update(stranger, state), "stranger", "other losses")
    _require_error(lambda: update(vector, state), trial.names[0], "a loss of shape 2")
    _require_error(lambda: update(losses, ()), "", "the state ()")


def _require_error(call: Callable[[], Any], name: str, why: str) -> None:
    try:
        jax.eval_shape(call)
    except (TypeError, ValueError) as error:
        require(name in str(error), f"the error for {why} must name {name!r}: {error}")
    except Exception as error:
        message = f"{why} must be a ValueError or a TypeError, got {error!r}."
        raise AssertionError(message) from error
    else:
        raise AssertionError(f"{why} must be a ValueError or a TypeError, none was.")
