"""Comparisons of trees that raise ``AssertionError``, under ``python -O`` as well."""

from typing import Any

import jax
import numpy as np

from yoto_jax._checks import is_key
from yoto_jax._losses import PyTree


def require(holds: Any, message: str) -> None:
    """Raise unless this holds."""
    if not holds:
        raise AssertionError(message)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def numbers(x: Any) -> np.ndarray:
    """An array as NumPy has it; the data of a typed key; 16 bits as float32."""
    if is_key(x):
        return np.asarray(jax.random.key_data(x))
    x = np.asarray(x)
    return x if x.dtype.kind in "biuf" else x.astype(np.float32)


def types_of(tree: PyTree) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and weak type of every leaf."""
    return {
        name: (np.shape(x), jax.dtypes.result_type(x), getattr(x, "weak_type", None))
        for name, x in named_leaves(tree).items()
    }


def require_structure(got: PyTree, wanted: PyTree, what: str) -> None:
    """Raise unless both are trees of one structure."""
    got, wanted = jax.tree.structure(got), jax.tree.structure(wanted)
    require(got == wanted, f"{what} must be a tree like {wanted}, got {got}.")


def require_types(got: PyTree, wanted: PyTree, what: str) -> None:
    """Raise unless structure, shapes, dtypes and weak types are the same."""
    require_structure(got, wanted, what)
    before = types_of(wanted)
    for name, now in types_of(got).items():
        require(
            now == before[name],
            f"{what} must keep its types: {name!r} is {describe(now)}, and was "
            f"{describe(before[name])}.",
        )


def describe(kind: tuple[Any, ...]) -> str:
    """A type of a leaf in words."""
    shape, dtype, weak = kind
    return f"{'weakly typed ' if weak else ''}{dtype} {shape}"


def require_close(
    got: PyTree, wanted: PyTree, what: str, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Raise unless all numbers are close."""
    require_structure(got, wanted, what)
    expected = named_leaves(wanted)
    for name, x in named_leaves(got).items():
        np.testing.assert_allclose(
            numbers(x),
            numbers(expected[name]),
            rtol=rtol,
            atol=atol,
            err_msg=f"{what}, at {name!r}",
        )


def require_equal(got: PyTree, wanted: PyTree, what: str) -> None:
    """Raise unless all numbers are the same, NaN with NaN."""
    require_close(got, wanted, what, rtol=0, atol=0)


def require_finite(tree: PyTree, what: str) -> None:
    """Raise unless all numbers are finite."""
    for name, x in named_leaves(tree).items():
        require(
            np.isfinite(numbers(x)).all(), f"{what} must be finite, {name!r} is {x}."
        )
