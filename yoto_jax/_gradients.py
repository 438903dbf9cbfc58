"""The engine: losses, their gradients as far as a weighting asks, one update."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from yoto_jax._jaxlib import check_jaxlib
from yoto_jax._losses import (
    PyTree,
    find_loss,
    listed,
    loss_names,
    path_name,
    scalar_losses,
    split,
    stack_present,
)
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._numerics import upcast
from yoto_jax._params import check_params
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    LossWeighting,
    and_present,
    mask_weights,
)

Align = Literal["train", "validation", "train-validation"]
Where = Callable[[PyTree], PyTree]
Axes = tuple[Hashable, ...]

_STEERS = "downstream is present"  # beside statistics
_FEW = 4  # losses for which inner products are taken pair by pair


class _Pass(NamedTuple):
    """One batch, forward, and what can be had from it backward."""

    losses: PyTree  # scalars, averaged over the devices
    aux: Any
    present: jax.Array | None  # bool (K,), whether a device has the loss; None: all
    returned: bool  # whether loss_fn has said so, in MaskedLosses
    statistics: Callable[[Sequence[str]], dict[str, jax.Array]]
    direction: Callable[[int], PyTree]  # gradient of one loss, where weights act
    along: Callable[[PyTree], tuple[jax.Array, jax.Array]]  # (K,) derivatives, |v|^2
    combine: Callable[[PyTree, Any, LossWeighting], tuple[PyTree, Any]]


def value_and_grad(
    loss_fn: Callable[..., Any],
    weighting: LossWeighting,
    *,
    encoder: Callable[..., PyTree] | None = None,
    has_aux: bool = False,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
    select: Where | None = None,
    heads: Where | None = None,
    weigh_heads: bool = False,
    chunk_size: int | None = None,
    keep_gradients: bool = True,
    align: Align = "train",
    lookahead: jax.typing.ArrayLike = 0.0,
    statistics: dict[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    r"""Losses, the gradient of their weighted sum, and the weighting's next state.

    .. math::
      \nabla_\theta \sum_k w_k L_k(\theta) = J^T w, \qquad
      w = \mathrm{weighting}(L, J J^T).

    The weights are cotangents. A weighting that looks at losses alone costs one forward
    and one backward pass, as ``jax.value_and_grad`` does. One that looks at gradients
    gets them from where you say:

    - of all parameters (the default): K backward passes in one ``vmap``. ``chunk_size``
      bounds how many run at a time. ``keep_gradients=False`` keeps none of the K
      gradients: the Gramian is summed up array by array, and one more backward pass
      follows.
    - of a part of them, ``select=lambda params: params["last shared layer"]``: K
      backward passes down to there, and one all the way.
    - of the representation z that all losses share, ``encoder=``: the heads are
      differentiated once, with a copy of z for each loss, and the encoder once. For a
      deep encoder this costs hardly more than a plain step, whatever the method.

    Args:
      loss_fn: ``loss_fn(params, *args) -> losses``, any tree of scalars. With
        ``encoder``, ``loss_fn(params, z, *args) -> losses``.
      weighting: Any :class:`yoto_jax.LossWeighting`.
      encoder: ``encoder(params, *args) -> z``, any tree of arrays that carry the batch
        axis (one that the encoder averages over devices itself needs the check of
        ``shard_map``). The weights act on the gradient that reaches the parameters by
        z; what ``loss_fn`` itself uses of the parameters, the heads, descends the plain
        sum of the losses.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``. To get something out of
        the encoder, such as batch statistics, pass it through z.
      axis_name: Axis, or axes, of ``pmap`` or ``shard_map`` that the batch is spread
        over. Losses and gradients are averaged over it *before* a weight is formed, and
        come out averaged. Under ``jit`` with sharded arrays nothing is needed.
      param_specs: Where ``shard_map`` spreads the parameters themselves over devices
        (``loss_fn`` then gathers them, or sums what the parts give): their
        ``PartitionSpec``, as in its ``in_specs``. Inner products and norms are then
        sums over all parts, and gradients come out in parts.
      select: Part of the parameters whose gradients the weighting gets to see.
      heads: Part of the parameters that descends the plain sum of the losses, as the
        heads do with ``encoder``. All others follow the weights, and the weighting gets
        to see the gradients of those alone.
      weigh_heads: With ``encoder``: whether the heads follow the weights too, as they
        should where losses share one. Costs a second backward pass through them. A
        downstream loss has the weight 1 there.
      chunk_size: How many per-loss gradients are computed at a time (``None``: all).
      keep_gradients: Whether per-loss gradients are kept until the weights are known.
      align: Which batch shows a weighting with a downstream loss where to go.
        ``"train"``: the training batch. ``"validation"``: the batch given as
        ``validation=``, on which the weights are formed altogether.
        ``"train-validation"``: the gradient of the downstream loss comes from there,
        the others from the training batch; their inner products are exact directional
        derivatives (``jax.jvp``).
      lookahead: Learning rate of the virtual step at whose end the downstream gradient
        is taken, for a weighting that asks for ``"alignment"``.
      statistics: Functions ``(params, *args) -> (K,) or a tree like the losses`` for
        whatever else the weighting needs, by the name it asks for.

    Returns:
      ``fn(params, state, *args, validation=None, direction=None, present=None,
      **kwargs)``, giving ``(losses, grads, state)``, with ``(losses, aux)`` in the
      first place if ``has_aux``. ``losses`` are unweighted. ``state`` comes from
      ``weighting.init(losses)``; its ``loss_weights`` are those just used. ``kwargs``
      go to ``loss_fn`` and ``encoder``. ``validation`` is a tuple of arguments that
      takes the place of ``args``; ``direction`` a tree like the parameters that takes
      the place of the downstream gradient, for example a running mean of it.
      ``present`` is a tree of booleans like the losses: those that this batch, on this
      device, has labels for. The others get no weight and no gradient, and leave no
      trace in the state; losses are averaged over the devices that have them. A
      ``loss_fn`` that returns :class:`yoto_jax.MaskedLosses` says so itself.

    Raises:
      TypeError: A loss is not a floating-point number.
      ValueError: Options that exclude each other; a loss that is not a scalar, or
        losses that do not match the state; an unknown downstream loss; a weighting that
        needs what nobody provides.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, yoto_jax as yoto
      >>> def loss_fn(w, x):
      ...     return {"fit": jnp.mean((x @ w - 1) ** 2), "size": jnp.sum(w**2)}
      >>> w, x = jnp.array([0.5, -1.0]), jnp.eye(2)
      >>> weighting = yoto.weightings.upgrad()
      >>> state = weighting.init(jax.eval_shape(loss_fn, w, x))
      >>> step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
      >>> losses, grads, state = step(w, state, x)
      >>> print(grads, state.loss_weights["size"])
      [ 0.25 -2.  ] 0.5

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, Section 3.3, for gradients of the
      representation; Karpukhin and Savchenko, `When Losses Align
      <https://arxiv.org/abs/2605.07756>`_, 2026, for downstream losses and heads.

    .. warning::
      With ``encoder``, gradients of z stand in for gradients of the parameters. That is
      exact where the Jacobian of the encoder is orthogonal, and a bound elsewhere. The
      K copies of z cost nothing under ``jit``, which computes their common forward pass
      once; outside it, the heads run K times.

      A batch on which a loss, or a statistic that the weighting looks at, is not finite
      leaves the state as it was, but for its counter ``num_skipped``; the gradient
      still carries the batch's NaN. Use ``optax.apply_if_finite`` to keep it from the
      parameters. Weights take the dtype of their loss on the way back: a loss in
      float16 has little room for them, one in bfloat16 or float32 enough.

      A downstream loss has the weight 0. Without ``encoder`` or ``heads``, nothing
      trains a head that it alone uses.
    """
    _check_options(
        weighting, encoder, select, heads, weigh_heads, chunk_size, align, statistics
    )
    axes = named_axes(axis_name)
    asked = [name for name in weighting.needs if name in GRADIENT_STATISTICS]
    aligned = "alignment" in weighting.needs
    # A step of length 0 need not be computed; a traced or scheduled one may be longer.
    looks_ahead = aligned and not (
        isinstance(lookahead, int | float) and lookahead == 0
    )
    if chunk_size is not None and not keep_gradients and "gramian" in asked:
        raise ValueError(
            "a Gramian in chunks needs keep_gradients=True: every gradient meets every "
            "other."
        )

    def run(
        params: PyTree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trains: bool = False,
        present: PyTree | None = None,
    ) -> _Pass:
        place = Placement(axes, spread_of(params, param_specs, axes))
        local = _vary(params, axes)
        if encoder is None:
            f = lambda p: _split(loss_fn(p, *args, **kwargs), has_aux, axes, present)
            return _direct(
                f, local, place, weighting, select, heads, chunk_size, keep_gradients
            )
        encode = lambda p: encoder(p, *args, **kwargs)
        decode = lambda p, z: _split(
            loss_fn(p, z, *args, **kwargs), has_aux, axes, present
        )
        # An absent loss may be a constant.
        looks = present is None and weighting.needs != ("losses",)
        return _encoded(encode, decode, local, place, weigh_heads, trains, looks)

    def fn(
        params: PyTree,
        state: Any,
        *args: Any,
        validation: tuple[Any, ...] | None = None,
        direction: PyTree | None = None,
        present: PyTree | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PyTree, Any]:
        _check_axes(axes)
        check_params(params)
        _check_validation(align, aligned, validation, direction)
        training = run(params, args, kwargs, trains=True, present=present)
        steering = training
        if align == "validation":
            steering = run(params, validation or (), kwargs)

        def look() -> dict[str, Any]:
            found: dict[str, Any] = steering.statistics(asked) if asked else {}
            for name, statistic in (statistics or {}).items():
                if any(spread_of(params, param_specs, axes)):
                    raise ValueError(
                        f"statistics={{{name!r}: ...}} cannot tell anything of "
                        "parameters that param_specs= spreads over devices."
                    )
                local = statistic(_vary(params, axes), *args, **kwargs)
                found[name] = mean_over(jax.tree.map(jnp.asarray, local), axes)
            if aligned or align == "train-validation":
                place = place_of(weighting.downstream, training.losses)
                if direction is None:
                    v, found[_STEERS] = downstream_gradient(place)
                else:
                    v, found[_STEERS] = direction, jnp.asarray(True)
                derivatives, squared = steering.along(v)
                if aligned:
                    found["alignment"] = derivatives
                else:
                    found["gramian"] = _replace_row(
                        found["gramian"], place, derivatives, squared
                    )
            return found

        def downstream_gradient(place: int) -> tuple[PyTree, jax.Array]:
            """The gradient, and whether there is one: whether the loss is present."""
            if validation is None and not looks_ahead:
                seen = training
            elif validation is None:
                seen = run(ahead(), args, kwargs, present=present)
            else:
                seen = run(ahead() if looks_ahead else params, validation, kwargs)
            there = True if seen.present is None else seen.present[place]
            return seen.direction(place), jnp.asarray(there)

        def ahead() -> PyTree:
            weights = optax.tree.get(state, "loss_weights")
            weights = mask_weights(weights, training.present)
            silent = weighting._replace(observe=None)
            descent, _ = training.combine(weights, state, silent)

            def move(p: Any, g: Any) -> Any:
                if g.dtype == jax.dtypes.float0:
                    return p
                return (p - lookahead * g).astype(p.dtype)

            return jax.tree.map(move, params, descent)

        seen = if_due(weighting, state, look)
        steers = seen.pop(_STEERS, None)
        there = steering.present
        if there is not None:
            if steers is not None:
                place = place_of(weighting.downstream, training.losses)
                due = True if weighting.due is None else weighting.due(state)
                there = there.at[place].set(jnp.where(due, steers, there[place]))
            told = split(there, jax.tree.structure(steering.losses))
            seen = and_present(weighting, seen, told)
        weights, state = weighting.update(steering.losses, state, **seen)
        if there is not None and (steers is not None or align == "validation"):
            # With what it holds for losses that the training batch alone has.
            weights = optax.tree.get(state, "loss_weights")
        weights = mask_weights(weights, training.present)
        grads, state = training.combine(weights, state, weighting)
        losses = training.losses
        if training.returned and training.present is not None:
            losses = MaskedLosses(
                losses, split(training.present, jax.tree.structure(losses))
            )
        return ((losses, training.aux) if has_aux else losses), grads, state

    return fn


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
    _check_chunk_size(chunk_size)

    def fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        _check_axes(axes)
        check_params(params)
        f = lambda p: _split(loss_fn(p, *args, **kwargs), has_aux, axes)
        spread = spread_of(params, param_specs, axes)
        losses, pullback, told = jax.vjp(f, _vary(params, axes), has_aux=True)
        rows = _rows(lambda cotangents: pullback(cotangents)[0], losses, chunk_size)
        jacobian = mean_over(rows, axes, spread)
        losses, (aux, there, _) = mean_losses(losses, axes), told
        if there is not None:
            losses = MaskedLosses(losses, split(there, jax.tree.structure(losses)))
        return ((losses, aux) if has_aux else losses), jacobian

    return fn


# Where gradients come from.


def _direct(
    f: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    place: "Placement",
    weighting: LossWeighting,
    select: Where | None,
    heads: Where | None,
    chunk_size: int | None,
    keep: bool,
) -> _Pass:
    """Gradients of the parameters."""
    axes, spread = place
    losses, pullback, (aux, present, mark) = jax.vjp(f, params, has_aux=True)
    keep = keep and select is None and weighting.due is None
    local = lambda ct: pullback(ct)[0]
    average = lambda tree: mean_over(tree, axes, spread)
    count = len(jax.tree.leaves(params))
    apart = [] if heads is None else _leaf_places(params, heads)
    if apart and len(apart) == count:
        raise ValueError("heads= names all parameters: none are left to be weighed.")
    if select is None:  # The weighting sees all that it weighs.
        seen = [place for place in range(count) if place not in apart]
        local_seen = lambda ct: _at(seen, local(ct))
    else:
        seen = _leaf_places(params, select)
        local_seen = _pull_part(f, params, seen)
    of_places = lambda places: [spread[leaf] for leaf in sorted(set(places))]
    spread_seen = of_places(seen)
    average_seen = lambda tree: mean_over(tree, axes, spread_seen)
    kept: list[PyTree] = []

    def statistics(names: Sequence[str]) -> dict[str, jax.Array]:
        if not keep and "gramian" not in names:
            check_jaxlib()

            def one(cotangents: PyTree) -> dict[str, jax.Array]:
                row = _add_axis(average_seen(local_seen(cotangents)))
                return statistics_of(row, names, spread_seen)

            several = None if chunk_size == 1 else chunk_size
            found = lax.map(one, _basis(losses), batch_size=several)
            return {name: x[:, 0] for name, x in found.items()}
        if not keep:
            rows = average_seen(_rows(local_seen, losses, chunk_size))
            return statistics_of(rows, names, spread_seen)
        kept.append(average(_rows(local, losses, chunk_size)))
        return statistics_of(_at(seen, kept[0]), names, spread_seen)

    def direction(place: int) -> PyTree:
        return average(local(_one_hot(losses, place)))

    def along(v: PyTree) -> tuple[jax.Array, jax.Array]:
        leaves, structure = jax.tree.flatten(_tangent(v, params))
        v = structure.unflatten(
            x if place in seen or x.dtype == jax.dtypes.float0 else jnp.zeros_like(x)
            for place, x in enumerate(leaves)
        )
        _, tangents = jax.jvp(lambda p: f(p)[0], (params,), (_vary(v, axes),))
        return stacked(mean_losses(tangents, axes)), _squared_norm(v, spread)

    def combine(weights: PyTree, state: Any, _: Any) -> tuple[PyTree, Any]:
        if kept:
            grads = combine_rows(kept[0], stacked(weights))
        else:
            grads = average(local(_cotangents(weights, losses)))
        if apart:
            ones = jax.tree.map(jnp.ones_like, weights)
            if kept:
                part = _at(apart, combine_rows(kept[0], stacked(ones)))
            else:
                part = _pull_part(f, params, apart)(_cotangents(ones, losses))
                part = mean_over(part, axes, of_places(apart))
            leaves, structure = jax.tree.flatten(grads)
            leaves = [part.get(place, leaf) for place, leaf in enumerate(leaves)]
            grads = structure.unflatten(leaves)
        return grads, state

    averaged = mean_losses(losses, axes)
    told = present, mark is not None
    return _Pass(averaged, aux, *told, statistics, direction, along, combine)


def _encoded(
    encode: Callable[[PyTree], PyTree],
    decode: Callable[[PyTree, PyTree], tuple[PyTree, Any]],
    params: PyTree,
    place: "Placement",
    weigh_heads: bool,
    trains: bool,
    looks: bool,
) -> _Pass:
    """Gradients of the representation: one backward pass through the encoder."""
    axes, spread = place
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
    plain = _cotangents(jax.tree.map(jnp.ones_like, losses), losses)
    # Of a batch that only steers, gradients are for the steps that look at them.
    gradients = lambda: pullback(plain)
    if trains:
        found = gradients()
        gradients = lambda: found
    # Seen from all devices, z is the devices' parts side by side, and the gradient of a
    # mean over n devices is 1/n of the local one.
    devices = _axis_size(axes)
    spread_z = [_spread_z(x, place, _checked(params, axes)) for x in jax.tree.leaves(z)]
    averaged = mean_losses(losses, axes)

    def encoder_pull(cotangent: PyTree) -> PyTree:
        return encoder_pullback(jax.tree.map(_match, cotangent, z))[0]

    def statistics(names: Sequence[str]) -> dict[str, jax.Array]:
        local = _statistics_of_list(gradients()[1], names, spread_z)
        return {
            name: x / (devices**2 if name == "gramian" else devices)
            for name, x in local.items()
        }

    def direction(place: int) -> PyTree:
        return mean_over(encoder_pull(gradients()[1][place]), axes, spread)

    def along(v: PyTree) -> tuple[jax.Array, jax.Array]:
        # As a direction of z, so that its products with the gradients of z are those
        # with one vector: cosines between them stay cosines.
        v = _vary(_tangent(v, params), axes)
        _, tangent = jax.jvp(encode, (params,), (v,))
        products = _inner(gradients()[1], tangent, spread_z)
        return products / devices, _squared_norm(tangent, spread_z)

    def combine(
        weights: PyTree, state: Any, weighting: LossWeighting
    ) -> tuple[PyTree, Any]:
        vector = stacked(weights)
        own, rows = gradients()
        cotangent = jax.tree.map(lambda *xs: _weighted_sum(vector, xs), *rows)
        through_encoder = encoder_pull(cotangent)
        if weigh_heads:
            # A loss that only steers still has a head of its own to train.
            of_heads = _replace_downstream(weights, weighting)
            own = pullback(_cotangents(of_heads, losses))[0]
        add = functools.partial(jax.tree.map, _add)
        if weighting.observe is None:
            return mean_over(add(through_encoder, own), axes, spread), state
        through_encoder = mean_over(through_encoder, axes, spread)
        own = mean_over(own, axes, spread)
        squared = _squared_norm(cotangent, spread_z) / devices**2
        state = weighting.observe(
            state,
            cotangent_norm=jnp.sqrt(squared),
            gradient_norm=jnp.sqrt(_squared_norm(through_encoder, spread)),
        )
        return add(through_encoder, own), state

    told = present, mark is not None
    return _Pass(averaged, aux, *told, statistics, direction, along, combine)


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


def _spread_z(x: jax.Array, place: "Placement", checked: bool) -> Axes:
    """The axes that one array of the representation is cut up over."""
    batch, spread = place
    if not checked:
        return batch
    varying = _varying(x)
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


# What is told of them.


def statistics_of(
    rows: PyTree, names: Sequence[str], spread: Sequence[Axes] | None = None
) -> dict[str, jax.Array]:
    """Statistics of gradients stacked on the first axis, summed up leaf by leaf.

    ``spread`` names the axes of devices that each leaf is cut up over.
    """
    parts, entries = {}, {}
    for axes, leaves in _by_axes(rows, spread).items():
        parts[axes] = _sums(leaves, names)
        entries[axes] = sum(x.size // x.shape[0] for x in leaves)
    return _statistics_from(parts, entries)


def _statistics_of_list(
    rows: Sequence[PyTree], names: Sequence[str], spread: Sequence[Axes]
) -> dict[str, jax.Array]:
    """The same of a list of gradients, which need not be copied side by side."""
    groups = [_by_axes(row, spread) for row in rows]
    rest = [name for name in names if name != "gramian"]
    parts, entries = {}, {}
    for axes, first in groups[0].items():
        of_axes = [group[axes] for group in groups]
        each = [_sums(_add_axis(leaves), rest) for leaves in of_axes]
        parts[axes] = {name: jnp.concatenate([x[name] for x in each]) for name in rest}
        if "gramian" in names:
            parts[axes]["gramian"] = _gramian_of_list(of_axes)
        entries[axes] = sum(x.size for x in first)
    return _statistics_from(parts, entries)


def _gramian_of_list(rows: Sequence[PyTree]) -> jax.Array:
    count = len(rows)
    dots = {(i, j): _dot(rows[i], rows[j]) for i in range(count) for j in range(i + 1)}
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
        found["gramian"] = _total(_products(x) for x in leaves)
    if "norms" in names:
        found["norms"] = _total(jnp.sum(jnp.square(x), axis=rest(x)) for x in leaves)
    if "max_abs" in names:
        largest = [jnp.max(jnp.abs(x), axis=rest(x), initial=0.0) for x in leaves]
        found["max_abs"] = functools.reduce(jnp.maximum, largest)
    if "mean_abs" in names:
        found["mean_abs"] = _total(jnp.sum(jnp.abs(x), axis=rest(x)) for x in leaves)
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
        total = sum(count * _axis_size(axes) for axes, count in entries.items())
        found["mean_abs"] = found["mean_abs"] / max(1, total)
    return found


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


def _products(x: jax.Array) -> jax.Array:
    """Inner products of the rows, in float32 at least, whatever the accelerator."""
    if x.shape[0] <= _FEW:
        # One loop over the entries under jit. A matrix product wants its operands in
        # another layout, and on the CPU that is one more copy of K gradients.
        x = upcast(x)
        products = x[:, None] * x[None, :]
        return jnp.sum(products, axis=tuple(range(2, products.ndim)))
    axes = tuple(range(1, x.ndim))
    sharding: Any = jax.typeof(x).sharding
    explicit = any(sharding.spec)  # The mesh is explicit, and the array spread over it.
    return lax.dot_general(
        x,
        x,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        out_sharding=sharding.update(spec=(None, None)) if explicit else None,
    )


def _add(x: Any, y: Any) -> Any:
    return x if x.dtype == jax.dtypes.float0 else x + y


def _dot(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    return _total(jnp.sum(upcast(x) * upcast(y)) for x, y in zip(a, b, strict=True))


def _inner(rows: Sequence[PyTree], v: PyTree, spread: Sequence[Axes]) -> jax.Array:
    """Inner products of some gradients with one more."""
    groups = [_by_axes(row, spread) for row in rows]
    terms = []
    for axes, leaves in _by_axes(v, spread).items():
        local = jnp.stack([_dot(group[axes], leaves) for group in groups])
        terms.append(lax.psum(local, axes) if axes else local)
    return _total(terms)


def _squared_norm(tree: PyTree, spread: Sequence[Axes]) -> jax.Array:
    return _inner([tree], tree, spread)[0]


def _total(terms: Any) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _tangent(v: PyTree, params: PyTree) -> PyTree:
    """A tangent for parameters, in their dtypes."""

    def cast(x: Any, p: Any) -> Any:
        return x if x.dtype == jax.dtypes.float0 else x.astype(p.dtype)

    return jax.tree.map(cast, v, params)


def _replace_row(
    gramian: jax.Array, place: int, row: jax.Array, corner: jax.Array
) -> jax.Array:
    gramian = gramian.at[place, :].set(row).at[:, place].set(row)
    return gramian.at[place, place].set(corner)


# Cotangents and rows.


def _cotangents(weights: PyTree, losses: PyTree) -> PyTree:
    return jax.tree.map(lambda w, x: _match(w.astype(x.dtype), x), weights, losses)


def _match(x: Any, like: Any) -> Any:
    """``x`` varying over the same axes as ``like``, as pullbacks insist."""
    return _vary(x, tuple(_varying(like)))


def _one_hot(losses: PyTree, place: int) -> PyTree:
    leaves, structure = jax.tree.flatten(losses)
    ones = [
        jnp.full((), float(k == place), leaf.dtype) for k, leaf in enumerate(leaves)
    ]
    return jax.tree.map(_match, structure.unflatten(ones), losses)


def _basis(losses: PyTree) -> PyTree:
    """All one-hot cotangents, stacked on a leading axis."""
    leaves, structure = jax.tree.flatten(losses)
    eye = np.eye(len(leaves))
    columns = [_match(jnp.asarray(eye[k], x.dtype), x) for k, x in enumerate(leaves)]
    return structure.unflatten(columns)


def _rows(
    pull: Callable[[PyTree], PyTree], losses: PyTree, chunk_size: int | None
) -> PyTree:
    check_jaxlib()
    scalar_losses(losses)
    basis = _basis(losses)
    if chunk_size is None:
        return jax.vmap(pull)(basis)
    return lax.map(pull, basis, batch_size=chunk_size)


def combine_rows(rows: PyTree, weights: jax.Array) -> PyTree:
    def combine(row: jax.Array) -> jax.Array:
        if row.dtype == jax.dtypes.float0:
            return row[0]
        return _weighted_sum(weights, [row[k] for k in range(row.shape[0])])

    return jax.tree.map(combine, rows)


def _weighted_sum(weights: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
    """Weights times gradients, added in float32 at least; a weight of 0 is none."""
    dtype = terms[0].dtype
    if dtype == jax.dtypes.float0:
        return terms[0]
    if not jnp.issubdtype(terms[0].dtype, jnp.complexfloating):
        terms = [upcast(x) for x in terms]
    total = _total(weights[k] * x for k, x in enumerate(terms))
    return total.astype(dtype)


def stacked(tree: PyTree) -> jax.Array:
    return jnp.stack([upcast(jnp.asarray(x)) for x in jax.tree.leaves(tree)])


def _add_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)


# Parts of the parameters.


def _leaf_places(params: PyTree, where: Where) -> list[int]:
    """Which leaves a function picks out of a tree."""
    structure = jax.tree.structure(params)
    marks = [_Mark(place) for place in range(structure.num_leaves)]
    try:
        found = jax.tree.leaves(where(structure.unflatten(marks)))
    except TypeError:  # such as for an index into an array
        found = []
    places = [mark.place for mark in found if isinstance(mark, _Mark)]
    if not places or len(places) != len(found):
        raise ValueError(
            "select and heads must return a part of the parameters as it is, such as "
            "lambda params: params['encoder'], with at least one array in it."
        )
    return places


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Stands for one leaf."""

    place: int


def _at(places: Sequence[int], tree: PyTree) -> dict[int, jax.Array]:
    """The leaves at these places."""
    leaves = jax.tree.leaves(tree)
    return {place: leaves[place] for place in places}


def _pull_part(
    f: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    places: Sequence[int],
) -> Callable[[PyTree], dict[int, jax.Array]]:
    """A pullback to some leaves alone: what lies before them is never computed."""
    leaves, structure = jax.tree.flatten(params)

    def of_part(part: dict[int, jax.Array]) -> PyTree:
        merged = [part.get(place, leaf) for place, leaf in enumerate(leaves)]
        return f(structure.unflatten(merged))[0]

    _, pullback = jax.vjp(of_part, _at(places, params))
    return lambda ct: pullback(ct)[0]


# Axes of pmap and shard_map.


class Placement(NamedTuple):
    """How a step lies on the devices."""

    axes: Axes  # that the batch is spread over
    spread: Sequence[Axes]  # of each array of the parameters: what it is cut up over


def spread_of(
    params: PyTree, specs: PyTree | None, axes: Axes | None = None
) -> list[Axes]:
    """The axes that each array of the parameters is cut up over.

    ``axes`` are those of the batch: if they are known, it is checked that specs are
    given where they are needed, and can be followed.
    """
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves = jax.tree.leaves(params)
    if specs is None:
        for path, x in zip(paths, leaves, strict=True):
            if differing := [axis for axis in axes or () if axis in _varying(x)]:
                raise ValueError(
                    f"parameter {path!r} may differ between the devices of axis "
                    f"{differing[0]!r}. If each device holds a part of it, say so with "
                    "param_specs=; if all hold the same, as after pcast, with "
                    "param_specs=jax.P()."
                )
        return [()] * len(leaves)
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
    try:
        full = jax.tree.broadcast(specs, params, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            "param_specs must be a tree of PartitionSpec like the parameters, or the "
            f"upper part of one: {error}"
        ) from None
    found = []
    for spec in jax.tree.leaves(full, is_leaf=is_spec):
        if not is_spec(spec):
            raise TypeError(
                "param_specs must be a tree of jax.sharding.PartitionSpec, got a "
                f"{type(spec).__name__} in it."
            )
        parts = [part if isinstance(part, tuple) else (part,) for part in spec]
        found.append(tuple(axis for part in parts for axis in part if axis is not None))
    for path, x, own in zip(paths, leaves, found, strict=True):
        for axis in own:
            if axes is not None and axis not in (*axes, *_varying(x)):
                raise ValueError(
                    f"parameter {path!r} is spread over axis {axis!r}, which the batch "
                    "is not: that needs shard_map with check_vma=True, its default. "
                    "Without, JAX makes gradients too large by the size of the axis."
                )
    return found


def named_axes(axis_name: Any) -> Axes:
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _vary(tree: PyTree, axes: Sequence[Hashable]) -> PyTree:
    """Parameters as each device's own, so that gradients are those of its own losses.

    Inside ``shard_map`` that checks varying axes, the gradient with respect to a value
    that is the same everywhere is summed over the devices on its own accord.
    """

    def vary(x: Any) -> Any:
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            return x
        missing = tuple(axis for axis in axes if axis not in _varying(x))
        return _to_varying(x, missing) if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def _checked(params: PyTree, axes: Axes) -> bool:
    """Whether ``shard_map`` knows what varies, told by parameters made to vary."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and bool(axes) and _varying(leaves[0]) >= set(axes)


def _varying(x: Any) -> frozenset[Hashable]:
    """The axes of ``shard_map`` along which a value may differ."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def _to_varying(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.pcast(x, axes, to="varying")


def _axis_size(axes: Axes) -> int:
    return lax.psum(1, axes) if axes else 1


def mean_over(tree: PyTree, axes: Axes, spread: Sequence[Axes] | None = None) -> PyTree:
    """The mean over the devices of what each has found on its part of the batch.

    An array that is itself cut up over an axis (``spread``) has been summed over it on
    the way back: gathering its parts has that as its transpose.
    """
    if not axes:
        return tree
    leaves, structure = jax.tree.flatten(tree)

    def mean(x: Any, own: Axes) -> Any:
        if x.dtype == jax.dtypes.float0:
            return x
        if summed := tuple(axis for axis in axes if axis in own):
            x = x / _axis_size(summed)
        others = tuple(axis for axis in axes if axis not in own)
        return lax.pmean(_vary(x, others), others) if others else x

    spread = spread or [()] * len(leaves)
    return structure.unflatten(map(mean, leaves, spread))


def mean_losses(losses: PyTree, axes: Axes) -> PyTree:
    """The mean of every loss over the devices: one all-reduce of K numbers."""
    if not axes or not jax.tree.leaves(losses):
        return losses
    leaves, structure = jax.tree.flatten(losses)
    means = lax.pmean(stacked([_vary(x, axes) for x in leaves]), axes)
    return structure.unflatten(
        means[k].astype(x.dtype) for k, x in enumerate(map(jnp.asarray, leaves))
    )


# Checks.


def _split(
    out: Any, has_aux: bool, axes: Axes, present: PyTree | None = None
) -> tuple[PyTree, tuple[Any, jax.Array | None, tuple[()] | None]]:
    """Losses, checked and each device's own, and what comes with them.

    A loss that is the same on all devices, as after a ``pmean``, is made their own too:
    its gradient is then that of a mean of such losses.

    Returns:
      The losses, and ``(aux, present, mark)`` with a vector of booleans, or None for
      all, and ``()`` if ``loss_fn`` returned it, else None: told apart in a trace too.
    """
    losses, aux = split_aux(out, has_aux)
    own = None
    if isinstance(losses, MaskedLosses):
        losses, own = losses
    scalar_losses(losses)
    losses = _vary(jax.tree.map(jnp.asarray, losses) if axes else losses, axes)
    structure = jax.tree.structure(losses)
    given = (stack_present(x, structure) for x in (own, present))
    masks = [mask for mask in given if mask is not None]
    if not masks:
        return losses, (aux, None, None)
    there = functools.reduce(jnp.logical_and, masks)
    share = there.astype(jnp.float32)
    if axes:  # The mean over the devices that have the loss.
        number = lax.psum(_vary(share, axes), axes)
        there = number > 0
        share = _vary(share, axes) * _axis_size(axes) / jnp.maximum(number, 1)
    leaves = [
        jnp.where(share[k] > 0, x * share[k].astype(x.dtype), 0)
        for k, x in enumerate(map(jnp.asarray, jax.tree.leaves(losses)))
    ]
    return structure.unflatten(leaves), (aux, there, None if own is None else ())


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """Losses and auxiliary output of ``loss_fn``, as it was said to return them."""
    if has_aux and isinstance(out, MaskedLosses):
        raise TypeError(
            "with has_aux=True, loss_fn must return (losses, aux), got MaskedLosses "
            "alone: return (masked_losses, aux), or leave has_aux out."
        )
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            "with has_aux=True, loss_fn must return (losses, aux), got a "
            f"{type(out).__name__}."
        )
    first = out[0] if type(out) is tuple and len(out) == 2 else None
    if not has_aux and isinstance(first, Mapping | MaskedLosses):
        raise TypeError(
            "loss_fn returned a pair that begins with a dict of losses: if the rest is "
            "auxiliary, give has_aux=True; if it is losses too, put both in one dict."
        )
    return out if has_aux else (out, None)


def place_of(downstream: Any, losses: PyTree) -> int:
    structure = jax.tree.structure(losses)
    return find_loss("downstream", downstream, losses, loss_names(structure))


def _replace_downstream(weights: PyTree, weighting: LossWeighting) -> PyTree:
    """The weights, with 1 for the downstream loss if there is one."""
    if weighting.downstream is None:
        return weights
    place = place_of(weighting.downstream, weights)
    leaves, structure = jax.tree.flatten(weights)
    leaves[place] = jnp.ones_like(leaves[place])
    return structure.unflatten(leaves)


def _check_options(
    weighting: LossWeighting,
    encoder: Any,
    select: Any,
    heads: Any,
    weigh_heads: bool,
    chunk_size: int | None,
    align: str,
    statistics: dict[str, Any] | None,
) -> None:
    if not isinstance(weighting, LossWeighting):
        raise TypeError(
            "weighting must be a LossWeighting, such as yoto.weightings.equal(), got "
            f"{type(weighting).__name__}."
        )
    if encoder is not None and (select is not None or heads is not None):
        raise ValueError(
            "encoder= says where gradients are taken and which parameters are heads: "
            "give neither select= nor heads= with it."
        )
    if encoder is not None and chunk_size is not None:
        raise ValueError("chunk_size= is for gradients of parameters, not of encoder=.")
    _check_chunk_size(chunk_size)
    if weigh_heads and encoder is None:
        raise ValueError("weigh_heads= is about the heads of encoder=: give both.")
    if align not in ("train", "validation", "train-validation"):
        raise ValueError(
            f"align must be 'train', 'validation' or 'train-validation', got {align!r}."
        )
    if align != "train" and weighting.downstream is None:
        raise ValueError(
            f"align={align!r} is for weightings that follow a downstream loss."
        )
    known = (*GRADIENT_STATISTICS, "losses", "alignment", *(statistics or {}))
    for name in weighting.needs:
        if name not in known:
            raise ValueError(
                f"this weighting needs {name!r}, which losses and gradients do not "
                f"tell: give statistics={{{name!r}: function}}."
            )


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(
            f"chunk_size must be a positive integer or None, got {chunk_size!r}."
        )


def _check_axes(axes: Axes) -> None:
    """Raise unless a ``pmap`` or ``shard_map`` around this has these axes."""
    for axis in axes:
        try:
            _axis_size((axis,))
        except NameError:
            raise ValueError(
                f"axis_name={axis!r} is no axis of a pmap or shard_map around this "
                "call. On one device, and under jit alone, leave axis_name out."
            ) from None


def _check_validation(
    align: str, aligned: bool, validation: Any, direction: Any
) -> None:
    if validation is not None and not isinstance(validation, tuple):
        raise TypeError(
            "validation must be a tuple of arguments in place of args, such as "
            f"(batch,), got {type(validation).__name__}."
        )
    wants = align != "train"
    if wants and validation is None and direction is None:
        raise ValueError(f"align={align!r} needs validation=(...) in every call.")
    if not wants and not aligned and (validation is not None or direction is not None):
        raise ValueError(
            "validation= and direction= are for align='validation' or "
            "'train-validation'."
        )
