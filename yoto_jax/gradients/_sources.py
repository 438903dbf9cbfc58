"""Where gradients come from: the parameters, or a representation."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._jaxlib import check_jaxlib
from yoto_jax._losses import PyTree, find_loss, listed, loss_names
from yoto_jax._numerics import stacked
from yoto_jax._weighting import LossWeighting
from yoto_jax.gradients._devices import (
    Axes,
    Devices,
    axis_size,
    checks_axes,
    mean_losses,
    mean_over,
    vary_over,
    varying_axes,
)
from yoto_jax.gradients._rows import (
    add_axis,
    add_leaf,
    combine_rows,
    cotangents_of,
    one_hot,
    one_hots,
    rows_of,
    tangent_of,
    varying_like,
    weighted_sum_of,
)
from yoto_jax.gradients._statistics import (
    inner_products,
    squared_norm,
    statistics_of,
    statistics_of_list,
)

Where = Callable[[PyTree], PyTree]


class Pass(NamedTuple):
    """One batch, forward, and what can be had from it backward."""

    losses: PyTree  # scalars, averaged over the devices
    aux: Any
    present: jax.Array | None  # bool (K,), whether a device has the loss; None: all
    returned: bool  # whether loss_fn has said so, in MaskedLosses
    statistics: Callable[[Sequence[str]], dict[str, jax.Array]]
    direction: Callable[[int], PyTree]  # gradient of one loss, where weights act
    along: Callable[[PyTree], tuple[jax.Array, jax.Array]]  # (K,) derivatives, |v|^2
    combine: Callable[[PyTree, Any, LossWeighting], tuple[PyTree, Any]]


def pass_of_parameters(
    f: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    devices: Devices,
    weighting: LossWeighting,
    select: Where | None,
    heads: Where | None,
    chunk_size: int | None,
    keep: bool,
) -> Pass:
    """Gradients of the parameters."""
    axes, spread = devices
    losses, pullback, (aux, present, mark) = jax.vjp(f, params, has_aux=True)
    keep = keep and select is None and weighting.due is None
    local = lambda ct: pullback(ct)[0]
    average = lambda tree: mean_over(tree, axes, spread)
    count = len(jax.tree.leaves(params))
    apart = [] if heads is None else _leaf_indices(params, heads)
    if apart and len(apart) == count:
        raise ValueError("heads= names all parameters: none are left to be weighed.")
    if select is None:  # The weighting sees all that it weighs.
        seen = [index for index in range(count) if index not in apart]
        local_seen = lambda ct: _at(seen, local(ct))
    else:
        seen = _leaf_indices(params, select)
        local_seen = _pull_part(f, params, seen)
    of_leaves = lambda indices: [spread[index] for index in sorted(set(indices))]
    spread_seen = of_leaves(seen)
    average_seen = lambda tree: mean_over(tree, axes, spread_seen)
    kept: list[PyTree] = []

    def statistics(names: Sequence[str]) -> dict[str, jax.Array]:
        if not keep and "gramian" not in names:
            check_jaxlib()

            def one(cotangents: PyTree) -> dict[str, jax.Array]:
                row = add_axis(average_seen(local_seen(cotangents)))
                return statistics_of(row, names, spread_seen)

            several = None if chunk_size == 1 else chunk_size
            found = lax.map(one, one_hots(losses), batch_size=several)
            return {name: x[:, 0] for name, x in found.items()}
        if not keep:
            rows = average_seen(rows_of(local_seen, losses, chunk_size))
            return statistics_of(rows, names, spread_seen)
        kept.append(average(rows_of(local, losses, chunk_size)))
        return statistics_of(_at(seen, kept[0]), names, spread_seen)

    def direction(position: int) -> PyTree:
        return average(local(one_hot(losses, position)))

    def along(v: PyTree) -> tuple[jax.Array, jax.Array]:
        leaves, structure = jax.tree.flatten(tangent_of(v, params))
        v = structure.unflatten(
            x if index in seen or x.dtype == jax.dtypes.float0 else jnp.zeros_like(x)
            for index, x in enumerate(leaves)
        )
        _, tangents = jax.jvp(lambda p: f(p)[0], (params,), (vary_over(v, axes),))
        return stacked(mean_losses(tangents, axes)), squared_norm(v, spread)

    def combine(weights: PyTree, state: Any, _: Any) -> tuple[PyTree, Any]:
        if kept:
            grads = combine_rows(kept[0], stacked(weights))
        else:
            grads = average(local(cotangents_of(weights, losses)))
        if apart:
            ones = jax.tree.map(jnp.ones_like, weights)
            if kept:
                part = _at(apart, combine_rows(kept[0], stacked(ones)))
            else:
                part = _pull_part(f, params, apart)(cotangents_of(ones, losses))
                part = mean_over(part, axes, of_leaves(apart))
            leaves, structure = jax.tree.flatten(grads)
            leaves = [part.get(index, leaf) for index, leaf in enumerate(leaves)]
            grads = structure.unflatten(leaves)
        return grads, state

    averaged = mean_losses(losses, axes)
    told = present, mark is not None
    return Pass(averaged, aux, *told, statistics, direction, along, combine)


def pass_of_representation(
    encode: Callable[[PyTree], PyTree],
    decode: Callable[[PyTree, PyTree], tuple[PyTree, Any]],
    params: PyTree,
    devices: Devices,
    weigh_heads: bool,
    trains: bool,
    looks: bool,
) -> Pass:
    """Gradients of the representation: one backward pass through the encoder."""
    axes, spread = devices
    z, encoder_pullback = jax.vjp(encode, params)
    structure = _losses_of(lambda z: decode(params, z)[0], z, looks)
    count = structure.num_leaves

    def each_from_its_copy(p: PyTree, copies: list[PyTree]) -> tuple[PyTree, Any]:
        # Under jit the copies are one array, and the forward passes one computation.
        outs = [decode(p, copy) for copy in copies]
        leaves = [jax.tree.leaves(losses)[k] for k, (losses, _) in enumerate(outs)]
        return structure.unflatten(leaves), outs[0][1]

    losses, pullback, (aux, present, mark) = jax.vjp(
        each_from_its_copy, params, [z] * count, has_aux=True
    )
    plain = cotangents_of(jax.tree.map(jnp.ones_like, losses), losses)
    # Of a batch that only steers, gradients are for the steps that look at them.
    gradients = lambda: pullback(plain)
    if trains:
        found = gradients()
        gradients = lambda: found
    # Seen from all devices, z is the devices' parts side by side, and the gradient of a
    # mean over n devices is 1/n of the local one.
    num_devices = axis_size(axes)
    spread_z = [
        _spread_z(x, devices, checks_axes(params, axes)) for x in jax.tree.leaves(z)
    ]
    averaged = mean_losses(losses, axes)

    def encoder_pull(cotangent: PyTree) -> PyTree:
        return encoder_pullback(jax.tree.map(varying_like, cotangent, z))[0]

    def statistics(names: Sequence[str]) -> dict[str, jax.Array]:
        local = statistics_of_list(gradients()[1], names, spread_z)
        return {
            name: x / (num_devices**2 if name == "gramian" else num_devices)
            for name, x in local.items()
        }

    def direction(position: int) -> PyTree:
        return mean_over(encoder_pull(gradients()[1][position]), axes, spread)

    def along(v: PyTree) -> tuple[jax.Array, jax.Array]:
        # As a direction of z, so that its products with the gradients of z are those
        # with one vector: cosines between them stay cosines.
        v = vary_over(tangent_of(v, params), axes)
        _, tangent = jax.jvp(encode, (params,), (v,))
        products = inner_products(gradients()[1], tangent, spread_z)
        return products / num_devices, squared_norm(tangent, spread_z)

    def combine(
        weights: PyTree, state: Any, weighting: LossWeighting
    ) -> tuple[PyTree, Any]:
        vector = stacked(weights)
        own, rows = gradients()
        cotangent = jax.tree.map(lambda *xs: weighted_sum_of(vector, xs), *rows)
        through_encoder = encoder_pull(cotangent)
        if weigh_heads:
            # A loss that only steers still has a head of its own to train.
            of_heads = replace_downstream(weights, weighting)
            own = pullback(cotangents_of(of_heads, losses))[0]
        add = functools.partial(jax.tree.map, add_leaf)
        if weighting.observe is None:
            return mean_over(add(through_encoder, own), axes, spread), state
        through_encoder = mean_over(through_encoder, axes, spread)
        own = mean_over(own, axes, spread)
        squared = squared_norm(cotangent, spread_z) / num_devices**2
        state = weighting.observe(
            state,
            cotangent_norm=jnp.sqrt(squared),
            gradient_norm=jnp.sqrt(squared_norm(through_encoder, spread)),
        )
        return add(through_encoder, own), state

    told = present, mark is not None
    return Pass(averaged, aux, *told, statistics, direction, along, combine)


def _losses_of(decode: Callable[[PyTree], PyTree], z: PyTree, looks: bool) -> Any:
    """The structure of the losses.

    Where the weighting ``looks`` at gradients, each must depend on the representation.
    """
    traced, shapes = jax.make_jaxpr(decode, return_shape=True)(z)
    reached = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        if any(x in reached for x in equation.invars if not hasattr(x, "val")):
            reached.update(equation.outvars)
    structure = jax.tree.structure(shapes)
    outputs = traced.jaxpr.outvars
    if not looks:
        return structure
    unmoved = [
        name
        for name, x in zip(loss_names(structure), outputs, strict=True)
        if hasattr(x, "val") or x not in reached
    ]
    if unmoved:
        raise ValueError(
            f"{listed(unmoved)} do not depend on z, the output of encoder=: their "
            "gradients are zero there and mean nothing to a weighting. Compute every "
            "loss from z, or leave encoder= out."
        )
    return structure


def _spread_z(x: jax.Array, devices: Devices, checked: bool) -> Axes:
    """The axes that one array of the representation is cut up over."""
    batch, spread = devices
    if not checked:
        return batch
    varying = varying_axes(x)
    # An array that the encoder has averaged over the devices is whole on each.
    own = tuple(axis for axis in batch if axis in varying)
    return (*own, *sorted(varying - set(batch), key=str)) if any(spread) else own


def if_due(
    weighting: LossWeighting, state: Any, look: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Statistics if the weighting is about to look at them, or else zeros."""
    if weighting.due is None:
        return look()
    shapes = jax.eval_shape(look)
    idle = lambda: optax.tree.zeros_like(shapes)
    return lax.cond(weighting.due(state), look, idle) if shapes else {}


# Parts of the parameters.


def _leaf_indices(params: PyTree, where: Where) -> list[int]:
    """Which leaves a function picks out of a tree."""
    structure = jax.tree.structure(params)
    marks = [_Mark(index) for index in range(structure.num_leaves)]
    try:
        found = jax.tree.leaves(where(structure.unflatten(marks)))
    except TypeError:  # such as for an index into an array
        found = []
    indices = [mark.index for mark in found if isinstance(mark, _Mark)]
    if not indices or len(indices) != len(found):
        raise ValueError(
            "select and heads must return a part of the parameters as it is, such as "
            "lambda params: params['encoder'], with at least one array in it."
        )
    return indices


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Stands for one leaf."""

    index: int


def _at(indices: Sequence[int], tree: PyTree) -> dict[int, jax.Array]:
    """The leaves at these indices."""
    leaves = jax.tree.leaves(tree)
    return {index: leaves[index] for index in indices}


def _pull_part(
    f: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    indices: Sequence[int],
) -> Callable[[PyTree], dict[int, jax.Array]]:
    """A pullback to some leaves alone: what lies before them is never computed."""
    leaves, structure = jax.tree.flatten(params)

    def of_part(part: dict[int, jax.Array]) -> PyTree:
        merged = [part.get(index, leaf) for index, leaf in enumerate(leaves)]
        return f(structure.unflatten(merged))[0]

    _, pullback = jax.vjp(of_part, _at(indices, params))
    return lambda ct: pullback(ct)[0]


def position_of(downstream: Any, losses: PyTree) -> int:
    structure = jax.tree.structure(losses)
    return find_loss("downstream", downstream, losses, loss_names(structure))


def replace_downstream(weights: PyTree, weighting: LossWeighting) -> PyTree:
    """The weights, with 1 for the downstream loss if there is one."""
    if weighting.downstream is None:
        return weights
    position = position_of(weighting.downstream, weights)
    leaves, structure = jax.tree.flatten(weights)
    leaves[position] = jnp.ones_like(leaves[position])
    return structure.unflatten(leaves)
