"""Promises that several checks are about."""

from typing import Any

import jax.numpy as jnp
import optax

from yoto_jax._losses import PyTree, Weights
from yoto_jax.testing._compare import (
    named_leaves,
    require,
    require_equal,
    require_structure,
)
from yoto_jax.testing._trial import Trial


def check_weights(weights: Weights, trial: Trial, what: str) -> None:
    """Raise unless these are scalars in a tree like the losses."""
    require(weights is not None, f"{what} are missing.")
    require_structure(weights, trial.structure.unflatten([0.0] * trial.size), what)
    for name, x in named_leaves(weights).items():
        require(jnp.ndim(x) == 0, f"{what} must be scalars, {name!r} is {x}.")


def require_skipped(after: Any, before: Any, why: str) -> None:
    """Raise unless nothing has happened between two states but a count."""
    counts = optax.tree.get_all_with_path(before, "num_skipped")
    require(bool(counts), "the state must hold num_skipped, an int32.")
    # A wrapper that skips a batch shows it to nobody inside.
    path, counted = min(counts, key=lambda entry: len(entry[0]))
    is_outermost = lambda at, _: at == path
    expected = optax.tree.set(before, is_outermost, num_skipped=counted + 1)
    if optax.tree.get(before, "accepted") is not None:  # what became of the last batch
        expected = optax.tree.set(expected, accepted=jnp.asarray(False))
    what = f"{why} must leave the state as it was but for num_skipped + 1: the state"
    require_equal(after, expected, what)


def require_dtype(tree: PyTree, dtype: Any, what: str) -> None:
    """Raise unless all arrays have this dtype."""
    for name, x in named_leaves(tree).items():
        require(x.dtype == dtype, f"{what} must be {dtype}, {name!r} is {x.dtype}.")
