"""Means over the labelled examples of a batch."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._jaxlib import warn_of_jaxlib
from yoto_jax._losses import Losses, Present, PyTree, check_structure, path_name
from yoto_jax._numerics import upcast
from yoto_jax._varying import check_axes, named_axes


class MaskedLosses(NamedTuple):
    """Losses, and a flag for each that its batch has labels."""

    losses: Losses  # scalars, 0 where absent
    present: Present  # bool scalars, a tree like the losses


def masked_mean(
    values: PyTree,
    masks: PyTree,
    *,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> MaskedLosses:
    r"""Averages losses over the labelled examples of a batch.

    .. math::
      L_k = \frac{\sum_b m_{k,b}\, l_{k,b}}{\sum_b m_{k,b}}, \qquad
      \text{0, with a gradient of 0, where no } m_{k,b} \text{ is set.}

    Args:
      values: Array of losses per example ``(n, ...)``, or a tree of such arrays, one
        for each loss; further axes, such as those of an image, are averaged over too.
      masks: Booleans of the same structure: of the shape of the values, or of their
        first axes, such as ``(n,)``.
      axis_name: Axis, or axes, of ``pmap`` or ``shard_map`` that the batch is spread
        over: the means are over all examples on all devices, whatever each device has,
        with one all-reduce of sums and counts.

    Returns:
      :class:`MaskedLosses`, ``(losses, present)``: float32 scalars (float64 if the
      values are), and whether any example is labelled. A ``loss_fn`` may return it to
      :func:`yoto_jax.value_and_grad` as it is; everything else takes the two parts,
      as in ``composite_loss(losses, mu, present=present)``.

    Raises:
      TypeError: A mask is not boolean, or values are not floating-point numbers.
      ValueError: The trees do not match, or a mask does not have the first axes of its
        values.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> errors = {"depth": jnp.array([1.0, 3.0]), "label": jnp.array([9.0, 9.0])}
      >>> masks = {"depth": jnp.array([True, True]), "label": jnp.array([False, False])}
      >>> losses, present = yoto.masked_mean(errors, masks)
      >>> print(losses["depth"], losses["label"], present["label"])
      2.0 0.0 False

    .. warning::
      The values of unlabelled examples do not count, but are differentiated: where they
      are NaN because the label is, so is the gradient. Fill missing labels in *before*
      the loss, with ``jnp.where(mask, label, 0)``.
    """
    warn_of_jaxlib()
    flat, structure = jax.tree.flatten_with_path(values)
    check_structure(jax.tree.structure(masks), structure, "the values", "masks")
    sums = []
    for (path, x), mask in zip(flat, jax.tree.leaves(masks), strict=True):
        sums.append(_sum_and_count(path_name(path), jnp.asarray(x), jnp.asarray(mask)))
    if axes := named_axes(axis_name):
        check_axes(axes)
        dtype = jnp.result_type(*[total for total, _ in sums])
        stacked = lax.psum(
            jnp.stack([jnp.stack(pair).astype(dtype) for pair in sums]), axes
        )
        sums = [
            (x.astype(total.dtype), count)
            for (x, count), (total, _) in zip(stacked, sums, strict=True)
        ]
    present = [count > 0 for _, count in sums]
    means = [total / jnp.maximum(count, 1).astype(total.dtype) for total, count in sums]
    return MaskedLosses(structure.unflatten(means), structure.unflatten(present))


def _sum_and_count(name: str, x: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
    what = f"the values of {name!r}" if name else "the values"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{what} must be floating-point numbers, got {x.dtype}.")
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"the mask of {what} must be boolean, got {mask.dtype}: give mask > 0."
        )
    if mask.shape != x.shape[: mask.ndim]:
        raise ValueError(
            f"the mask of {what} must have their shape {x.shape}, or that of their "
            f"first axes, got {mask.shape}."
        )
    x = upcast(x)
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    total = jnp.sum(jnp.where(mask, x, 0))
    entries = x.size // max(1, mask.size)  # of one example
    return total, jnp.sum(mask, dtype=x.dtype) * entries
