"""Advantages from several rewards: each normalised on its own, then summed."""

from collections.abc import Hashable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._checks import check_positive
from yoto_jax._losses import PyTree, check_structure, path_name
from yoto_jax._numerics import float_type
from yoto_jax._varying import Axes, check_axes, named_axes


def group_advantages(
    rewards: PyTree,
    weights: PyTree = None,
    *,
    present: PyTree = None,
    normalize: Literal["each", "sum"] = "each",
    eps: float = 1e-4,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> jax.Array:
    r"""Advantages of responses in groups, from several rewards of different scales.

    .. math::
      A_{ij} = \frac{a_{ij} - \operatorname{mean}(a)}{\operatorname{std}(a) +
      \varepsilon}, \qquad
      a_{ij} = \sum_k w_k \, \frac{r_{kij} - \operatorname{mean}_j r_{ki}}
      {\operatorname{std}_j r_{ki} + \varepsilon}

    for reward k of response j to prompt i, with mean and std of ``a`` over the whole
    batch. Each reward is normalised within its group before the weights act: a weight
    says how much a reward counts, whatever its unit, and a rare reward is not lost in
    the spread of a frequent one.

    Args:
      rewards: Tree of arrays ``(..., G)``, one for each reward, all of one shape; the
        last axis is the group of G responses to one prompt.
      weights: One number for each reward, in a tree like the rewards; 1 if none given.
      present: Booleans of the structure and shapes of the rewards where some do not
        apply: an absent reward is in no mean or std, and adds 0.
      normalize: ``"each"`` reward (GDPO), or their weighted ``"sum"`` (GRPO), which is
        not normalised over the batch again.
      eps: Added to each standard deviation; positive.
      axis_name: Axis, or axes, of ``pmap`` or ``shard_map`` that the prompts are spread
        over: the batch is then that of all devices. A group lies on one device.

    Returns:
      Advantages ``(..., G)``, float32 (float64 if a reward is), cut off from
      differentiation. A group without spread has 0; a reward that is not finite makes
      its own group NaN, and with ``"each"`` the batch, so that it is seen.

    Raises:
      ValueError: There are no rewards, their shapes differ, ``weights`` or ``present``
        do not match them, ``normalize`` is neither, or ``eps`` is not positive.
      TypeError: ``present`` is not boolean, or a reward not real.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> rewards = {"correct": jnp.array([[1.0, 0.0], [1.0, 0.0]]),
      ...            "short": jnp.array([[100.0, 0.0], [0.0, 0.0]])}
      >>> print(yoto.group_advantages(rewards).round(2))
      [[ 1.1  -1.1 ]
       [ 0.55 -0.55]]
      >>> print(yoto.group_advantages(rewards, normalize="sum").round(2))
      [[ 0.71 -0.71]
       [ 0.71 -0.71]]

    References:
      Liu et al., `GDPO <https://arxiv.org/abs/2601.05242>`_, 2026, Eqs. 4 to 6; Shao et
      al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024, for GRPO.

    .. warning::
      Standard deviations are unbiased (G - 1), as in TRL; the papers do not say.
    """
    check_positive(eps=eps)
    if normalize not in ("each", "sum"):
        raise ValueError(f"normalize must be 'each' or 'sum', got {normalize!r}.")
    axes = named_axes(axis_name)
    check_axes(axes)
    values, structure = _stacked(rewards)
    mask = _mask(present, values, structure)
    some = jnp.any(mask, axis=0)
    scale = _weights(weights, structure).astype(values.dtype)
    scale = scale.reshape((-1,) + (1,) * (values.ndim - 1))
    if normalize == "sum":
        total = jnp.sum(scale * jnp.where(mask, values, 0), axis=0)
        return lax.stop_gradient(_normalized_in_groups(total, some, eps))
    total = jnp.sum(scale * _normalized_in_groups(values, mask, eps), axis=0)
    return lax.stop_gradient(_normalized(total, some, eps, axes=axes))


def _normalized_in_groups(x: jax.Array, mask: jax.Array, eps: float) -> jax.Array:
    # From the largest one: equal numbers, however large, then have no spread at all.
    largest = jnp.max(jnp.where(mask, x, -jnp.inf), axis=-1, keepdims=True)
    return _normalized(x - largest, mask, eps, axis=-1)


def _normalized(
    x: jax.Array,
    mask: jax.Array,
    eps: float,
    axis: int | None = None,
    axes: Axes = (),
) -> jax.Array:
    """Without its mean and in units of its deviation, 0 where the mask is not set."""

    def add(y: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(mask, y, 0), axis=axis, keepdims=True)
        return lax.psum(total, axes) if axes else total

    count = add(jnp.ones_like(x))
    centred = x - add(x) / jnp.maximum(count, 1)
    # In units of the largest one, whose square may overflow.
    unit = jnp.max(jnp.where(mask, jnp.abs(centred), 0), axis=axis, keepdims=True)
    unit = lax.pmax(lax.stop_gradient(unit), axes) if axes else unit
    unit = jnp.where(unit > 0, unit, 1)
    std = unit * jnp.sqrt(add((centred / unit) ** 2) / jnp.maximum(count - 1, 1))
    return jnp.where(mask, centred / (std + eps), 0)


def _stacked(rewards: PyTree) -> tuple[jax.Array, jax.tree_util.PyTreeDef]:
    """The rewards (K, ..., G), in float32 at least."""
    flat, structure = jax.tree.flatten_with_path(rewards)
    if not flat:
        raise ValueError("rewards has no leaves: there is nothing to sum.")
    (path, x), *rest = flat
    first, shape = path_name(path), jnp.shape(x)
    if not shape:
        raise ValueError("rewards must have an axis, the group of responses.")
    for path, x in rest:
        if jnp.shape(x) != shape:
            raise ValueError(
                f"reward {path_name(path)!r} must have the shape {shape} of "
                f"{first!r}, got {jnp.shape(x)}."
            )
    for path, x in flat:
        if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise TypeError(f"reward {path_name(path)!r} must be real, got complex.")
    dtype = float_type(x for _, x in flat)
    return jnp.stack([jnp.asarray(x, dtype) for _, x in flat]), structure


def _weights(weights: PyTree, structure: jax.tree_util.PyTreeDef) -> jax.Array:
    """One weight for each reward (K,)."""
    if weights is None:
        return jnp.ones(structure.num_leaves)
    check_structure(jax.tree.structure(weights), structure, "the rewards", "weights")
    for path, weight in jax.tree.leaves_with_path(weights):
        if jnp.shape(weight) != ():
            raise ValueError(
                f"weight {path_name(path)!r} must be a scalar, got shape "
                f"{jnp.shape(weight)}."
            )
    return jnp.stack([jnp.asarray(weight) for weight in jax.tree.leaves(weights)])


def _mask(
    present: PyTree, values: jax.Array, structure: jax.tree_util.PyTreeDef
) -> jax.Array:
    """Which rewards there are, of the shape of the values."""
    if present is None:
        return jnp.ones(values.shape, jnp.bool_)
    check_structure(jax.tree.structure(present), structure, "the rewards", "present")
    for mask in map(jnp.asarray, jax.tree.leaves(present)):
        if mask.dtype != jnp.bool_:
            raise TypeError(f"present must be boolean, got {mask.dtype}.")
        if mask.shape != values.shape[1:]:
            raise ValueError(
                f"present must have the shape {values.shape[1:]} of the rewards, got "
                f"{mask.shape}."
            )
    return jnp.stack(jax.tree.leaves(present))
