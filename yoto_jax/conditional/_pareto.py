"""Pareto fronts and their hypervolume."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._losses import PyTree, loss_names, structure_difference
from yoto_jax._numerics import float_type


def pareto_front(points: PyTree) -> jax.Array:
    r"""Which points no other point dominates, all objectives being minimised.

    .. math::
      p \prec q \iff p_k \le q_k \text{ for all } k \text{ and } p \ne q, \qquad
      \mathrm{front}(S) = \{q \in S : \nexists p \in S,\ p \prec q\}.

    Equal points do not dominate each other: all of them are in, or none.

    .. warning::
      All objectives are minimised: negate an accuracy or a reward, or take it from 1.

    Args:
      points: Tree of ``(n,)`` arrays, one for each objective, such as
        :func:`yoto_jax.conditional.sweep` returns; or one array ``(n, K)``.

    Returns:
      Boolean array ``(n,)``. Under ``jit``, a point with a NaN is not on the front.

    Raises:
      ValueError: The arrays are not all of one shape ``(n,)``, or hold a NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> losses = {"kl": jnp.array([1.0, 2.0, 3.0]), "l2": jnp.array([3.0, 1.0, 2.0])}
      >>> print(conditional.pareto_front(losses))
      [ True  True False]
    """
    columns, _, names = _objectives(points)
    _refuse_nan(columns, names)
    return _undominated(columns)


@jax.jit
def _undominated(columns: list[jax.Array]) -> jax.Array:
    known = functools.reduce(jnp.logical_and, [~jnp.isnan(x) for x in columns])
    # [p, q]: p is in no objective worse than q, and in some better.
    no_worse = [x[:, None] <= x[None, :] for x in columns]
    better = [x[:, None] < x[None, :] for x in columns]
    dominates = functools.reduce(jnp.logical_and, no_worse)
    dominates &= functools.reduce(jnp.logical_or, better)
    return known & ~jnp.any(dominates, axis=0)


def hypervolume(points: PyTree, reference: PyTree) -> jax.Array:
    r"""The volume that points dominate, up to a reference point: larger is better.

    .. math::
      \mathrm{HV}(S; r) = \Lambda\Bigl(\bigcup_{p \in S,\ p < r} [p, r]\Bigr)
      \overset{K = 2}{=} \sum_k (r_1 - f_{1,k}) (f_{2,k-1} - f_{2,k}),

    where :math:`\Lambda` is the Lebesgue measure, and the sum goes over the front in
    ascending order of its first objective, with :math:`f_{2,0} = r_2`. A point that is
    not better than the reference in every objective adds nothing.

    With two objectives it can be compiled and differentiated; dominated points have the
    gradient 0. With more, `moocore <https://pypi.org/project/moocore/>`_ computes it on
    the host.

    .. warning::
      Objectives are minimised, on the scales that they have. Choose the reference
      before looking at results, worse than every point that should count, and report
      it: hypervolumes of different references do not compare.

    Args:
      points: Tree of ``(n,)`` arrays, one for each objective, such as
        :func:`yoto_jax.conditional.sweep` returns; or one array ``(n, K)``.
      reference: Tree like ``points``, of numbers; with an array ``(n, K)`` of points,
        an array ``(K,)``; or one number for all objectives.

    Returns:
      Scalar in float32, or in float64 if an objective is. NaN if there is one under
      ``jit``.

    Raises:
      ImportError: There are more than two objectives and moocore is not installed.
      TypeError: There are more than two objectives under ``jit``, ``vmap`` or ``grad``.
      ValueError: The arrays are not all of one shape ``(n,)``, the reference does not
        match, there are fewer than two objectives, a point holds a NaN or negative
        infinity, or the reference is not finite.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> points = jnp.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
      >>> print(conditional.hypervolume(points, 4.0))
      6.0
      >>> print(jax.grad(conditional.hypervolume)(points, 4.0))
      [[-1. -1.]
       [-1. -1.]
       [-1. -1.]]

    References:
      Zitzler and Thiele, `Multiobjective Evolutionary Algorithms: A Comparative Case
      Study and the Strength Pareto Approach <https://doi.org/10.1109/4235.797969>`_,
      1999.
    """
    columns, structure, names = _objectives(points)
    if len(columns) < 2:
        raise ValueError(
            f"a hypervolume needs at least two objectives, got {len(names)}."
        )
    leaves = _reference(reference, len(columns), structure)
    bounds = [jnp.asarray(leaf, columns[0].dtype) for leaf in leaves]
    _refuse_nan(columns, names)
    _refuse_infinite(columns, bounds, names)
    return _area(*columns, *bounds) if len(columns) == 2 else _volume(columns, bounds)


@jax.jit
def _area(f1: jax.Array, f2: jax.Array, r1: jax.Array, r2: jax.Array) -> jax.Array:
    """The hypervolume of two objectives, on the device."""
    known = ~jnp.any(jnp.isnan(f1) | jnp.isnan(f2))
    counts = (f1 < r1) & (f2 < r2)
    f1, f2 = jnp.where(counts, f1, r1), jnp.where(counts, f2, r2)
    order = jnp.lexsort((f2, f1))
    f1, f2 = f1[order], f2[order]
    levels = jnp.concatenate([jnp.reshape(r2, (1,)), f2])
    # The front goes down in steps. Which points are its steps is not differentiated,
    # so that ties cannot share a gradient with points that are dominated.
    steps = f2 < lax.cummin(lax.stop_gradient(levels))[:-1]
    place = jnp.where(steps, jnp.arange(1, f2.size + 1), 0)
    last = lax.cummax(jnp.concatenate([jnp.zeros((1,), place.dtype), place]))[:-1]
    area = jnp.sum(jnp.where(steps, (r1 - f1) * (levels[last] - f2), 0))
    return jnp.where(known, area, jnp.nan)


def _volume(columns: list[jax.Array], bounds: list[jax.Array]) -> jax.Array:
    """The hypervolume of more objectives, on the host."""
    if any(isinstance(x, jax.core.Tracer) for x in [*columns, *bounds]):
        raise TypeError(
            f"the hypervolume of {len(columns)} objectives is computed on the host and "
            "has no gradient: call it outside of jit, vmap and grad."
        )
    try:
        import moocore
    except ImportError:
        raise ImportError(
            "the hypervolume of more than two objectives needs moocore: "
            "pip install 'yoto_jax[pareto]'."
        ) from None
    points = np.stack([np.asarray(x, np.float64) for x in columns], axis=1)
    bound = np.array([float(x) for x in bounds])
    counts = np.all(points < bound, axis=1)
    volume = moocore.hypervolume(points[counts], ref=bound) if counts.any() else 0.0
    return jnp.asarray(volume, columns[0].dtype)


def _objectives(
    points: PyTree,
) -> tuple[list[jax.Array], jax.tree_util.PyTreeDef | None, tuple[str, ...]]:
    """The objectives (n,), the structure of their tree (None: an array), and names."""
    if not isinstance(points, jax.Array | np.ndarray):
        structure = jax.tree.structure(points)
        names = loss_names(structure)
        return arrays("points", points), structure, names
    if points.ndim != 2:
        raise ValueError(
            "points must be an array (n, K), or a tree of arrays (n,), got shape "
            f"{points.shape}."
        )
    names = tuple(map(str, range(points.shape[1])))
    columns = arrays("points", [points[:, k] for k in range(len(names))])
    return columns, None, names


def arrays(what: str, tree: PyTree) -> list[jax.Array]:
    """The leaves of a tree, after a check that they all are ``(n,)`` numbers."""
    leaves = jax.tree.leaves(tree)
    names = loss_names(jax.tree.structure(tree))
    shapes = dict(zip(names, map(np.shape, leaves), strict=True))
    if (
        any(len(shape) != 1 for shape in shapes.values())
        or len({*shapes.values()}) != 1
    ):
        raise ValueError(
            f"{what} must be a tree of arrays (n,), with one n for all, got "
            f"{_shown(shapes)}."
        )
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise TypeError(f"{what} must be real numbers, got complex ones.")
    dtype = float_type(leaves)
    return [jnp.asarray(leaf, dtype) for leaf in leaves]


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    shown = (f"{name!r}: {shape}" if name else shape for name, shape in shapes.items())
    return "shapes " + ", ".join(map(str, shown)) if shapes else "none"


def check_alike(
    what: str,
    structure: jax.tree_util.PyTreeDef,
    other: str,
    expected: jax.tree_util.PyTreeDef,
) -> None:
    """Raise unless two trees have the same structure."""
    if structure != expected:
        difference = structure_difference(structure, expected)
        raise ValueError(f"{what} must be a tree like the {other}; {difference}.")


def _reference(
    reference: PyTree, count: int, structure: jax.tree_util.PyTreeDef | None
) -> list[jax.Array]:
    """The reference of every objective, as scalars."""
    given = jax.tree.structure(reference)
    if given == jax.tree.structure(0) and np.shape(reference) == ():
        leaves = [reference] * count
    elif structure is not None:
        check_alike("reference", given, "points", structure)
        leaves = jax.tree.leaves(reference)
    elif np.shape(reference) == (count,):
        leaves = [reference[k] for k in range(count)]
    else:
        raise ValueError(
            f"the reference must be one number, or {count} for {count} objectives, "
            f"got {reference!r}."
        )
    for leaf in leaves:
        if np.shape(leaf) != () or isinstance(leaf, str):
            raise ValueError(
                f"the reference must hold one number for each objective, got {leaf!r}."
            )
    return leaves


# Checks of values: of those that are known, as they are not under jit.


def _refuse_nan(columns: list[jax.Array], names: tuple[str, ...]) -> None:
    _refuse(columns, names, np.isnan, "NaN", "leave out what diverged")


def _refuse_infinite(
    columns: list[jax.Array], bounds: list[jax.Array], names: tuple[str, ...]
) -> None:
    _refuse(columns, names, np.isneginf, "-inf", "its hypervolume is infinite")
    for name, bound in zip(names, bounds, strict=True):
        if not isinstance(bound, jax.core.Tracer) and not np.isfinite(bound):
            raise ValueError(
                f"the reference of objective {name!r} must be finite, got {bound}."
            )


def _refuse(
    columns: list[jax.Array],
    names: tuple[str, ...],
    is_bad: Callable[[np.ndarray], np.ndarray],
    what: str,
    hint: str,
) -> None:
    for name, column in zip(names, columns, strict=True):
        if isinstance(column, jax.core.Tracer):
            continue
        (found,) = np.nonzero(is_bad(np.asarray(column)))
        if found.size:
            first = ", ".join(map(str, found[:5])) + ", ..." * (found.size > 5)
            raise ValueError(
                f"objective {name!r} is {what} at {found.size} of {len(column)} points "
                f"({first}): {hint}."
            )
