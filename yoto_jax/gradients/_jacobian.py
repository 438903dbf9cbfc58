"""Losses and all their gradients, stacked."""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from yoto_jax._jaxlib import warn_of_jaxlib
from yoto_jax._losses import Params, PyTree, split
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._params import check_params
from yoto_jax._varying import check_axes, named_axes, vary_over
from yoto_jax.gradients._devices import mean_losses, mean_over, spread_of
from yoto_jax.gradients._output import read_output
from yoto_jax.gradients._parameters import check_chunk_size
from yoto_jax.gradients._rows import rows_of


def value_and_jacobian(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Losses, and their gradients stacked on a leading axis, for ``aggregate``.

    Args:
      loss_fn: ``loss_fn(params, *args) -> losses``, any tree of scalars.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      axis_name: Axis, or axes, of ``pmap`` or ``shard_map`` that the batch is spread
        over: losses and gradients come out averaged over it.
      param_specs: See :func:`value_and_grad`.
      chunk_size: How many gradients are computed at a time (``None``: all).

    Returns:
      ``fn(params, *args, **kwargs) -> (losses, jacobian)``: a tree like ``params``
      whose every array has a new first axis of length K, in the order of
      ``jax.tree.leaves(losses)``. With ``has_aux``, ``((losses, aux), jacobian)``.

    Raises:
      TypeError: A loss is not a floating-point number.
      ValueError: A loss is not a scalar.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> loss_fn = lambda w: {"fit": jnp.sum((w - 1) ** 2), "size": jnp.sum(w**2)}
      >>> losses, jacobian = yoto.value_and_jacobian(loss_fn)(jnp.array([0.0, 2.0]))
      >>> print(jacobian)
      [[-2.  2.]
       [ 0.  4.]]
    """
    axes = named_axes(axis_name)
    check_chunk_size(chunk_size)

    def fn(params: Params, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        check_axes(axes)
        check_params(params)
        warn_of_jaxlib()
        f = lambda p: read_output(loss_fn(p, *args, **kwargs), has_aux, axes)
        spread = spread_of(params, param_specs, axes)
        losses, pullback, told = jax.vjp(f, vary_over(params, axes), has_aux=True)
        rows = rows_of(lambda cotangents: pullback(cotangents)[0], losses, chunk_size)
        jacobian = mean_over(rows, axes, spread)
        losses, (aux, there) = mean_losses(losses, axes), told
        if there is not None:
            losses = MaskedLosses(losses, split(there, jax.tree.structure(losses)))
        return ((losses, aux) if has_aux else losses), jacobian

    return fn
