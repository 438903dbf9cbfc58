"""What a loss function returns, checked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._losses import (
    Losses,
    Params,
    PyTree,
    path_name,
    scalar_losses,
    stack_present,
)
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._varying import Axes, axis_size, vary_over, varying_axes, varying_like
from yoto_jax.gradients._devices import Devices


def read_output(
    out: Any, has_aux: bool, axes: Axes
) -> tuple[PyTree, tuple[Any, jax.Array | None]]:
    """Losses, checked and each device's own, and ``(aux, present)``.

    A loss that is the same on all devices, as after a ``pmean``, is made their own too:
    its gradient is then that of a mean of such losses.
    """
    losses, aux = split_aux(out, has_aux)
    own = None
    if isinstance(losses, MaskedLosses):
        losses, own = losses
    scalar_losses(losses)
    losses = vary_over(jax.tree.map(jnp.asarray, losses), axes)
    losses = varying_like(losses, *jax.tree.leaves(losses))  # One may be a constant.
    there = stack_present(own, jax.tree.structure(losses))
    if there is None:
        return losses, (aux, None)
    losses, there = _mask_losses(losses, there, axes)
    return losses, (aux, there)


def without_effect(
    jaxpr: Any, inputs: Iterable[int], names: Sequence[str]
) -> list[str]:
    """The losses, the first outputs of a program, that some inputs do not reach."""
    is_literal = lambda x: hasattr(x, "val")
    reached = {jaxpr.invars[index] for index in inputs}
    for equation in jaxpr.eqns:
        if any(x in reached for x in equation.invars if not is_literal(x)):
            reached.update(equation.outvars)
    outputs = jaxpr.outvars[: len(names)]
    return [
        name
        for name, x in zip(names, outputs, strict=True)
        if is_literal(x) or x not in reached
    ]


def check_losses(losses: Losses, params: Params, devices: Devices) -> None:
    """Raise if losses differ between devices that should have the same ones.

    Along other axes, over which the parameters vary too, lie other runs.
    """
    of_layers = {axis for axes in devices.spread for axis in axes}
    of_params = frozenset().union(*map(varying_axes, jax.tree.leaves(params)))
    for path, x in jax.tree.leaves_with_path(losses):
        for axis in sorted(varying_axes(x) - set(devices.axes), key=str):
            differs = f"loss {path_name(path)!r} differs between devices of {axis!r}"
            if axis in of_layers:
                raise ValueError(
                    f"{differs}, which have parts of the parameters: sum it over that "
                    "axis in loss_fn, or average it."
                )
            if axis not in of_params:
                raise ValueError(
                    f"{differs}, and the parameters do not: with axis_name={axis!r} "
                    "losses and gradients are averaged."
                )


def _mask_losses(
    losses: Losses, there: jax.Array, axes: Axes
) -> tuple[PyTree, jax.Array]:
    """Losses scaled so that means over devices are over those that have the loss."""
    share = there.astype(jnp.float32)
    if axes:
        number = lax.psum(vary_over(share, axes), axes)
        there = number > 0
        share = vary_over(share, axes) * axis_size(axes) / jnp.maximum(number, 1)
    leaves, structure = jax.tree.flatten(losses)
    leaves = [
        jnp.where(share[k] > 0, x * share[k].astype(x.dtype), 0)
        for k, x in enumerate(leaves)
    ]
    return structure.unflatten(leaves), there


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """Losses and auxiliary output of ``loss_fn``, as it was said to return them."""
    is_pair = type(out) is tuple and len(out) == 2
    if not has_aux:
        if is_pair and isinstance(out[0], Mapping | MaskedLosses):
            raise TypeError(
                "loss_fn returned a pair that begins with a dict of losses: if the "
                "rest is auxiliary, give has_aux=True; if it is losses too, put both "
                "in one dict."
            )
        return out, None
    if isinstance(out, MaskedLosses):
        raise TypeError(
            "with has_aux=True, loss_fn must return (losses, aux), got MaskedLosses "
            "alone: return (masked_losses, aux), or leave has_aux out."
        )
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            "with has_aux=True, loss_fn must return (losses, aux), got a "
            f"{type(out).__name__}."
        )
    return out
