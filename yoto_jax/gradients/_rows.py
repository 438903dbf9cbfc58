"""Arithmetic on the gradients of all losses, and the cotangents that they come from."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._jaxlib import check_jaxlib
from yoto_jax._losses import (
    Losses,
    Params,
    PyTree,
    Weights,
    listed,
    scalar_losses,
)
from yoto_jax._numerics import upcast, where_rows
from yoto_jax._varying import varying_like

MANY = 16
"""Gradients from which on sums over them are products of arrays, not written out.

Written out, a few fuse into one loop; of hundreds, compilation would take minutes.
"""


def add_leaf(x: Any, y: Any) -> Any:
    return x if x.dtype == jax.dtypes.float0 else x + y


def dot_leaves(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    return add_up(jnp.sum(upcast(x) * upcast(y)) for x, y in zip(a, b, strict=True))


def add_up(terms: Any) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def tangent_of(v: PyTree, params: Params) -> PyTree:
    """A tangent for parameters, in their dtypes."""

    def cast(x: Any, p: Any) -> Any:
        return x if x.dtype == jax.dtypes.float0 else x.astype(jnp.result_type(p))

    return jax.tree.map(cast, v, params)


# Cotangents and rows.


def cotangents_of(weights: Weights, losses: Losses) -> PyTree:
    return jax.tree.map(
        lambda w, x: varying_like(w.astype(x.dtype), x), weights, losses
    )


def one_hot(losses: Losses, position: int) -> PyTree:
    leaves, structure = jax.tree.flatten(losses)
    ones = [
        jnp.full((), float(k == position), leaf.dtype) for k, leaf in enumerate(leaves)
    ]
    return jax.tree.map(varying_like, structure.unflatten(ones), losses)


def one_hots(losses: Losses) -> PyTree:
    """All one-hot cotangents, stacked on a leading axis."""
    leaves, structure = jax.tree.flatten(losses)
    eye = np.eye(len(leaves))
    columns = [
        varying_like(jnp.asarray(eye[k], x.dtype), x) for k, x in enumerate(leaves)
    ]
    return structure.unflatten(columns)


def rows_of(
    pull: Callable[[PyTree], PyTree], losses: Losses, chunk_size: int | None
) -> PyTree:
    check_jaxlib()
    scalar_losses(losses)
    basis = one_hots(losses)
    if chunk_size is None:
        return jax.vmap(pull)(basis)
    return lax.map(pull, basis, batch_size=chunk_size)


def check_rows(
    rows: PyTree, names: Sequence[str], params: Params | None = None
) -> None:
    """Raise unless every array has one row for each loss, of a parameter's shape."""
    leaves = jax.tree.leaves_with_path(rows)
    if not leaves:
        raise ValueError(
            "the updates hold no arrays: there are no gradients of losses."
        )
    for path, leaf in leaves:
        if leaf.shape[:1] != (len(names),):
            raise ValueError(
                f"update{jax.tree_util.keystr(path)} must have a leading axis of "
                f"length {len(names)}, one entry for each of the losses "
                f"{listed(names)}, got shape {leaf.shape}."
            )
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if len(shapes) != len(leaves):
        return
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        if leaf.shape[1:] != shape:
            raise ValueError(
                f"update{jax.tree_util.keystr(path)} must stack the gradients of the "
                f"losses {listed(names)}, as value_and_jacobian returns them: shape "
                f"{(len(names), *shape)}, got {leaf.shape}."
            )


def present_rows(rows: PyTree, present: jax.Array | None) -> PyTree:
    """The rows, 0 for absent losses, whatever stands there."""
    if present is None:
        return rows
    kept = lambda x: x if x.dtype == jax.dtypes.float0 else where_rows(present, x, 0)
    return jax.tree.map(kept, rows)


def combine_rows(rows: PyTree, weights: jax.Array) -> PyTree:
    def combine(row: jax.Array) -> jax.Array:
        if row.dtype == jax.dtypes.float0:
            return row[0]
        if row.shape[0] > MANY:
            return _contract(weights, row)
        return weighted_sum_of(weights, [row[k] for k in range(row.shape[0])])

    return jax.tree.map(combine, rows)


def weighted_sum_of(weights: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
    """Weights times gradients, added in float32 at least."""
    dtype = terms[0].dtype
    if dtype == jax.dtypes.float0:
        return terms[0]
    if len(terms) > MANY:
        return _contract(weights, jnp.stack(terms))
    if not jnp.issubdtype(terms[0].dtype, jnp.complexfloating):
        terms = [upcast(x) for x in terms]
    with jax.numpy_dtype_promotion("standard"):  # Weights may be the wider ones.
        total = add_up(weights[k] * x for k, x in enumerate(terms))
    return total.astype(dtype)


def _contract(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """The weighted sum of rows [K, ...] in float32 at least, in their dtype."""
    is_complex = jnp.issubdtype(rows.dtype, jnp.complexfloating)
    wide = rows if is_complex else upcast(rows)
    with jax.numpy_dtype_promotion("standard"):
        total = jnp.tensordot(weights, wide, axes=1, precision=lax.Precision.HIGHEST)
    return total.astype(rows.dtype)


def add_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)
