"""The engine: losses, their gradients as far as a weighting asks, one update."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._jaxlib import warn_of_jaxlib
from yoto_jax._losses import PyTree, scalar_losses, split, stack_present
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._params import check_params
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    LossWeighting,
    and_present,
    mask_weights,
)
from yoto_jax.gradients._devices import (
    Axes,
    Devices,
    axis_size,
    check_axes,
    mean_losses,
    mean_over,
    named_axes,
    spread_of,
    vary_over,
)
from yoto_jax.gradients._rows import rows_of
from yoto_jax.gradients._sources import (
    Pass,
    Where,
    if_due,
    pass_of_parameters,
    pass_of_representation,
    position_of,
)
from yoto_jax.gradients._statistics import replace_row

Align = Literal["train", "validation", "train-validation"]

_STEERS = "downstream is present"  # beside statistics


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
    ) -> Pass:
        devices = Devices(axes, spread_of(params, param_specs, axes))
        local = vary_over(params, axes)
        if encoder is None:
            f = lambda p: split_output(
                loss_fn(p, *args, **kwargs), has_aux, axes, present
            )
            return pass_of_parameters(
                f, local, devices, weighting, select, heads, chunk_size, keep_gradients
            )
        encode = lambda p: encoder(p, *args, **kwargs)
        decode = lambda p, z: split_output(
            loss_fn(p, z, *args, **kwargs), has_aux, axes, present
        )
        # An absent loss may be a constant.
        looks = present is None and weighting.needs != ("losses",)
        return pass_of_representation(
            encode, decode, local, devices, weigh_heads, trains, looks
        )

    def fn(
        params: PyTree,
        state: Any,
        *args: Any,
        validation: tuple[Any, ...] | None = None,
        direction: PyTree | None = None,
        present: PyTree | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PyTree, Any]:
        check_axes(axes)
        check_params(params)
        warn_of_jaxlib()
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
                local = statistic(vary_over(params, axes), *args, **kwargs)
                found[name] = mean_over(jax.tree.map(jnp.asarray, local), axes)
            if aligned or align == "train-validation":
                position = position_of(weighting.downstream, training.losses)
                if direction is None:
                    v, found[_STEERS] = downstream_gradient(position)
                else:
                    v, found[_STEERS] = direction, jnp.asarray(True)
                derivatives, squared = steering.along(v)
                if aligned:
                    found["alignment"] = derivatives
                else:
                    found["gramian"] = replace_row(
                        found["gramian"], position, derivatives, squared
                    )
            return found

        def downstream_gradient(position: int) -> tuple[PyTree, jax.Array]:
            """The gradient, and whether there is one: whether the loss is present."""
            if validation is None and not looks_ahead:
                seen = training
            elif validation is None:
                seen = run(ahead(), args, kwargs, present=present)
            else:
                seen = run(ahead() if looks_ahead else params, validation, kwargs)
            there = True if seen.present is None else seen.present[position]
            return seen.direction(position), jnp.asarray(there)

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
                position = position_of(weighting.downstream, training.losses)
                due = True if weighting.due is None else weighting.due(state)
                there = there.at[position].set(jnp.where(due, steers, there[position]))
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
        check_axes(axes)
        check_params(params)
        warn_of_jaxlib()
        f = lambda p: split_output(loss_fn(p, *args, **kwargs), has_aux, axes)
        spread = spread_of(params, param_specs, axes)
        losses, pullback, told = jax.vjp(f, vary_over(params, axes), has_aux=True)
        rows = rows_of(lambda cotangents: pullback(cotangents)[0], losses, chunk_size)
        jacobian = mean_over(rows, axes, spread)
        losses, (aux, there, _) = mean_losses(losses, axes), told
        if there is not None:
            losses = MaskedLosses(losses, split(there, jax.tree.structure(losses)))
        return ((losses, aux) if has_aux else losses), jacobian

    return fn


# Checks.


def split_output(
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
    losses = vary_over(jax.tree.map(jnp.asarray, losses) if axes else losses, axes)
    structure = jax.tree.structure(losses)
    given = (stack_present(x, structure) for x in (own, present))
    masks = [mask for mask in given if mask is not None]
    if not masks:
        return losses, (aux, None, None)
    there = functools.reduce(jnp.logical_and, masks)
    share = there.astype(jnp.float32)
    if axes:  # The mean over the devices that have the loss.
        number = lax.psum(vary_over(share, axes), axes)
        there = number > 0
        share = vary_over(share, axes) * axis_size(axes) / jnp.maximum(number, 1)
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
