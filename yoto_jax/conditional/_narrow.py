"""Narrowing of a distribution around chosen loss weights."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import PyTree, check_structure
from yoto_jax.conditional._distributions import Box

AnyBox = TypeVar("AnyBox", bound="Box")


def narrow(
    distribution: AnyBox,
    center: PyTree,
    factor: float | jax.Array,
    *,
    support: Box | None = None,
) -> AnyBox:
    r"""Narrows the ranges of a distribution around some loss weights.

    On the scale on which a weight is evenly distributed (that of logarithms for
    :class:`LogUniform`), its range becomes ``factor`` times as wide, centred as near to
    ``center`` as possible inside the support. Training can thus concentrate on the
    weights that validate best. It works under ``jit``: bounds are data.

    Args:
      distribution: The distribution to narrow.
      center: A tree of scalars like the losses.
      factor: Between 0 and 1.
      support: Outer bounds: usually the distribution that training began with, by
        which weights are encoded. Default: ``distribution``.

    Returns:
      A distribution of the same type. A free weight stays free, however narrow.

    Raises:
      TypeError: The distribution has no ranges (:class:`Dirichlet`), or ``support`` is
        one of another type.
      ValueError: The trees do not match, ``center`` is not made of finite scalars, or
        ``factor`` is not between 0 and 1. Under ``jit``, where values are not known, a
        ``center`` of NaN makes bounds of NaN.

    Examples:
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform({"kl": 0.01}, {"kl": 100.0})
      >>> narrower = conditional.narrow(support, {"kl": 1.0}, 0.5)
      >>> narrower
      LogUniform(kl=0.1..10)
      >>> conditional.narrow(narrower, {"kl": 100.0}, 0.5, support=support)
      LogUniform(kl=10..100)
    """
    support = distribution if support is None else support
    for given in (distribution, support):
        if not isinstance(given, Box):
            raise TypeError(
                "only LogUniform and Uniform have ranges that can be narrowed, got "
                f"{type(given).__name__}."
            )
    if type(support) is not type(distribution):
        raise TypeError(
            f"support must be a {type(distribution).__name__} as distribution is, got "
            f"a {type(support).__name__}."
        )
    if not isinstance(factor, jax.core.Tracer) and not 0 <= float(factor) <= 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor}.")
    check_structure(
        distribution.structure, support.structure, "the support", "the losses"
    )
    center = support.vectors(center)
    if center.ndim > 1:
        raise ValueError(f"center must be a tree of scalars, got {center.shape[:-1]}.")
    if not isinstance(center, jax.core.Tracer) and not np.isfinite(center).all():
        raise ValueError(f"center must be finite, got {support.tree(center)}.")
    middle = support.positions(center)
    width = support.positions(distribution.high) - support.positions(distribution.low)
    width = jnp.asarray(factor, jnp.float32) * width
    start = jnp.clip(middle - width / 2, 0, 1 - width)
    (low, high), static = jax.tree.flatten(distribution)
    free = np.array(distribution.free)  # Pinned weights stay, whatever the support.
    low = jnp.where(free, support.at(start), low)
    return static.unflatten([low, jnp.where(free, support.at(start + width), high)])
