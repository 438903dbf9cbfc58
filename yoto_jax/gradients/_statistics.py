"""Statistics of per-loss gradients: norms, means, inner products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._losses import PyTree, State
from yoto_jax._numerics import upcast
from yoto_jax._varying import Axes, axis_size
from yoto_jax._weighting import LossWeighting
from yoto_jax.gradients._rows import MANY, add_axis, add_up, dot_leaves

_FEW = 4  # losses for which inner products are taken pair by pair


def statistics_of(
    rows: PyTree, names: Sequence[str], spread: Sequence[Axes] | None = None
) -> dict[str, jax.Array]:
    """Statistics of gradients stacked on the first axis, summed up leaf by leaf.

    ``spread`` names the axes of devices that each leaf is cut up over.
    """
    groups = _by_axes(rows, spread)
    parts, entries = {}, {}
    for axes, leaves in groups.items():
        parts[axes] = _sums(leaves, names)
        entries[axes] = sum(x.size // x.shape[0] for x in leaves)
    found = _statistics_from(parts, entries)
    return found | ({"std": _deviations(groups)} if "std" in names else {})


def statistics_of_list(
    rows: Sequence[PyTree], names: Sequence[str], spread: Sequence[Axes]
) -> dict[str, jax.Array]:
    """The same of a list of gradients, which need not be copied side by side."""
    groups = [_by_axes(row, spread) for row in rows]
    rest = [name for name in names if name not in ("gramian", "std")]
    parts, entries = {}, {}
    for axes, first in groups[0].items():
        of_axes = [group[axes] for group in groups]
        each = [_sums(add_axis(leaves), rest) for leaves in of_axes]
        parts[axes] = {name: jnp.concatenate([x[name] for x in each]) for name in rest}
        if "gramian" in names:
            parts[axes]["gramian"] = _gramian_of_list(of_axes)
        entries[axes] = sum(x.size for x in first)
    found = _statistics_from(parts, entries)
    if "std" in names:
        one = lambda group: _deviations({k: add_axis(x) for k, x in group.items()})
        found["std"] = jnp.concatenate([one(group) for group in groups])
    return found


def _gramian_of_list(rows: Sequence[list[jax.Array]]) -> jax.Array:
    count = len(rows)
    if count > MANY:
        return add_up(_products(x, x) for x in map(jnp.stack, zip(*rows, strict=True)))
    dots = {
        (i, j): dot_leaves(rows[i], rows[j]) for i in range(count) for j in range(i + 1)
    }
    return jnp.stack(
        [
            jnp.stack([dots[max(i, j), min(i, j)] for j in range(count)])
            for i in range(count)
        ]
    )


def _sums(leaves: Sequence[jax.Array], names: Sequence[str]) -> dict[str, jax.Array]:
    """What statistics are made of, over some leaves [K, ...] on this device."""
    if list(names) != ["gramian"]:
        leaves = [upcast(x) for x in leaves]
    rest = lambda x: tuple(range(1, x.ndim))
    found: dict[str, jax.Array] = {}
    if "gramian" in names:
        found["gramian"] = add_up(_products(x, x) for x in leaves)
    if "norms" in names:
        found["norms"] = add_up(jnp.sum(jnp.square(x), axis=rest(x)) for x in leaves)
    if "max_abs" in names:
        largest = [jnp.max(jnp.abs(x), axis=rest(x), initial=0.0) for x in leaves]
        found["max_abs"] = functools.reduce(jnp.maximum, largest)
    if "mean_abs" in names:
        found["mean_abs"] = add_up(jnp.sum(jnp.abs(x), axis=rest(x)) for x in leaves)
    return found


def _statistics_from(
    parts: dict[Axes, dict[str, jax.Array]], entries: dict[Axes, int]
) -> dict[str, jax.Array]:
    """Statistics of everything, from the sums over leaves that are spread alike."""
    found: dict[str, jax.Array] = {}
    for axes, sums in parts.items():
        for name, x in sums.items():
            if name == "max_abs":
                x = lax.pmax(x, axes) if axes else x
                found[name] = jnp.maximum(found[name], x) if name in found else x
            else:
                x = lax.psum(x, axes) if axes else x
                found[name] = found[name] + x if name in found else x
    if "norms" in found:
        found["norms"] = jnp.sqrt(found["norms"])
    if "mean_abs" in found:
        total = sum(count * axis_size(axes) for axes, count in entries.items())
        found["mean_abs"] = found["mean_abs"] / max(1, total)
    return found


def _deviations(groups: dict[Axes, list[jax.Array]]) -> jax.Array:
    """Standard deviations (K,) of all entries, about their mean over all leaves."""
    total = sum(
        x.size // x.shape[0] * axis_size(axes)
        for axes, leaves in groups.items()
        for x in leaves
    )

    def mean(f: Callable[[jax.Array], jax.Array]) -> jax.Array:
        terms = []
        for axes, leaves in groups.items():
            parts = (f(upcast(x)) for x in leaves)
            local = add_up(jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in parts)
            terms.append(lax.psum(local, axes) if axes else local)
        return add_up(terms) / max(1, total)

    # Not a difference of two means: that of few large entries is lost to rounding.
    centre = mean(lambda x: x)
    apart = lambda x: x - centre.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sqrt(mean(lambda x: jnp.square(apart(x))))


def _by_axes(
    tree: PyTree, spread: Sequence[Axes] | None
) -> dict[Axes, list[jax.Array]]:
    """The floating-point leaves, by the axes of devices they are cut up over."""
    leaves = jax.tree.leaves(tree)
    groups: dict[Axes, list[jax.Array]] = {}
    for x, axes in zip(leaves, spread or [()] * len(leaves), strict=True):
        if x.dtype != jax.dtypes.float0:
            groups.setdefault(axes, []).append(_as_real(x))
    return groups


def _as_real(x: jax.Array) -> jax.Array:
    """Complex numbers as pairs: their inner product is the real part of the other."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x
    return jnp.stack([x.real, x.imag], axis=-1)


def cross_products(first: PyTree, second: PyTree, spread: Sequence[Axes]) -> jax.Array:
    """Inner products of all rows of one tree with all rows of another."""
    terms, others = [], _by_axes(second, spread)
    for axes, leaves in _by_axes(first, spread).items():
        local = add_up(map(_products, leaves, others[axes]))
        terms.append(lax.psum(local, axes) if axes else local)
    return add_up(terms)


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of rows, in float32 at least, whatever the accelerator."""
    if x.shape[0] <= _FEW:
        # One loop over the entries under jit. A matrix product wants its operands in
        # another layout, and on the CPU that is one more copy of K gradients.
        products = upcast(x)[:, None] * upcast(y)[None, :]
        return jnp.sum(products, axis=tuple(range(2, products.ndim)))
    axes = tuple(range(1, x.ndim))
    sharding: Any = jax.typeof(x).sharding
    explicit = any(sharding.spec)  # The mesh is explicit, and the array spread over it.
    return lax.dot_general(
        x,
        y,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        out_sharding=sharding.update(spec=(None, None)) if explicit else None,
    )


def inner_products(
    rows: Sequence[PyTree], v: PyTree, spread: Sequence[Axes]
) -> jax.Array:
    """Inner products of some gradients with one more."""
    groups = [_by_axes(row, spread) for row in rows]
    terms = []
    for axes, leaves in _by_axes(v, spread).items():
        local = jnp.stack([dot_leaves(group[axes], leaves) for group in groups])
        terms.append(lax.psum(local, axes) if axes else local)
    return add_up(terms)


def squared_norm(tree: PyTree, spread: Sequence[Axes]) -> jax.Array:
    return inner_products([tree], tree, spread)[0]


def replace_row(
    gramian: jax.Array, position: int, row: jax.Array, corner: jax.Array
) -> jax.Array:
    gramian = gramian.at[position, :].set(row).at[:, position].set(row)
    return gramian.at[position, position].set(corner)


def if_due(weighting: LossWeighting, state: State, look: Callable[[], Any]) -> Any:
    """What ``look`` returns if the weighting is about to look at it, or else zeros."""
    if weighting.due is None:
        return look()
    shapes = jax.eval_shape(look)
    if not jax.tree.leaves(shapes):
        return shapes
    idle = lambda: optax.tree.zeros_like(shapes)
    return lax.cond(in_any_lane(weighting.due(state)), look, idle)


@jax.custom_batching.custom_vmap
def in_any_lane(due: jax.Array) -> jax.Array:
    """A condition; under ``vmap`` one for all lanes: whether it holds in any of them.

    ``jax.lax.cond`` computes both cases at every step where each lane has its own.
    """
    return due


@in_any_lane.def_vmap
def _in_any_lane(
    axis_size: int, in_batched: list[bool], due: jax.Array
) -> tuple[jax.Array, bool]:
    (batched,) = in_batched
    return in_any_lane(jnp.any(due) if batched else due), False
