"""Wrappers: a weighting made of another one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._checks import check_counts, check_decay, check_fraction
from yoto_jax._losses import (
    Losses,
    Present,
    PyTree,
    State,
    Weights,
    check_structure,
    find_loss,
    scalar_losses,
    split,
    stack_present,
)
from yoto_jax._numerics import all_finite, select
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    MATRICES,
    LossWeighting,
    and_present,
    check_state,
    check_weighting,
    mask_weights,
    of_inner,
    skip_one,
    skipped_between,
    weights_of,
)


@serializable_state
class EveryState(NamedTuple):
    """State of :func:`yoto_jax.weightings.every`."""

    step: jax.Array  # int32 scalar, calls of update that were not skipped
    inner: Any

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def every(weighting: LossWeighting, steps: jax.typing.ArrayLike) -> LossWeighting:
    """Updates the weights every few steps, and holds them in between.

    In between, :func:`yoto_jax.value_and_grad` computes none of the statistics that the
    weighting needs: a step then costs what it costs with fixed weights.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      steps: Steps from one update to the next (a positive integer). The first step
        updates.

    Returns:
      A :class:`yoto_jax.LossWeighting`.

    Raises:
      TypeError: ``steps`` is no integer.
      ValueError: It is not positive.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.every(yoto.weightings.scale_invariant(), 2)
      >>> state = weighting.init(losses)
      >>> for scale in (1.0, 2.0, 4.0):
      ...     losses = {"depth": 0.5 * scale, "camera": 4.0 * scale}
      ...     weights, state = weighting.update(losses, state)
      ...     print(weights["depth"])
      2.0
      2.0
      0.5

    .. note::
      A batch that is skipped because it is not finite does not count: the next one is
      looked at instead. The weight of a loss that is absent from the batch looked at is
      held until the next one with it. Under ``vmap`` statistics are computed at the
      steps at which any lane looks at them.
    """
    check_weighting(weighting)
    check_counts(steps=steps)
    return _at_times(weighting, EveryState, lambda step: step % steps == 0)


@serializable_state
class HoldState(NamedTuple):
    """State of :func:`yoto_jax.weightings.hold`."""

    step: jax.Array  # int32 scalar, calls of update that were not skipped
    inner: Any

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def hold(weighting: LossWeighting, after: jax.typing.ArrayLike) -> LossWeighting:
    """Updates the weights in the first steps, and holds them from then on.

    After these steps :func:`yoto_jax.value_and_grad` computes none of the statistics
    that the weighting needs: a step then costs what it costs with fixed weights.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      after: How many steps update the weights (a positive integer), such as two per
        cent of all.

    Returns:
      A :class:`yoto_jax.LossWeighting`.

    Raises:
      TypeError: ``after`` is no integer.
      ValueError: It is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> balance = yoto.weightings.grad_norm_balance("energy", share=0.1, decay=0.5)
      >>> weighting = yoto.weightings.hold(balance, after=20)
      >>> losses, norms = {"energy": 3.0, "stress": 0.2}, jnp.array([2.0, 500.0])
      >>> state = weighting.init(losses)
      >>> for _ in range(20):
      ...     weights, state = weighting.update(losses, state, norms=norms)
      >>> print(f"{weights['stress']:.4f}")  # 0.1 * 2 / 500
      0.0004
      >>> weights, state = weighting.update(losses, state, norms=norms[::-1])
      >>> print(f"{weights['stress']:.4f}")
      0.0004

    .. note::
      Batches that are skipped because they are not finite do not count. A loss that
      is absent from the first steps keeps its weight of the start. Under ``vmap``
      statistics are computed while any lane looks at them.
    """
    check_weighting(weighting)
    check_counts(after=after)
    # A counter that has run over is negative.
    return _at_times(weighting, HoldState, lambda step: (step >= 0) & (step < after))


def _at_times(
    weighting: LossWeighting, kind: Any, now: Callable[[jax.Array], jax.Array]
) -> LossWeighting:
    """Updates at the steps that ``now`` names, and holds the weights at others.

    Args:
      weighting: What is updated.
      kind: Of the state, with the fields ``step`` and ``inner``.
      now: ``now(step) -> bool``.
    """

    def due(state: Any) -> jax.Array:
        check_state(state, kind)
        here = now(state.step)
        return here if weighting.due is None else here & weighting.due(state.inner)

    def init(losses: Losses) -> Any:
        return kind(jnp.zeros((), jnp.int32), weighting.init(losses))

    def update_fn(
        losses: Losses,
        state: Any,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, Any]:
        check_state(state, kind)
        mask = _mask(present, state.inner)
        update = lambda: weighting.update(
            losses, state.inner, **and_present(weighting, statistics, present)
        )
        # Steps that look at nothing else know of losses that are not finite.
        ok = all_finite(losses if mask is None else mask_weights(losses, mask))
        held = lambda: (
            mask_weights(weights_of(state.inner), mask),
            select(ok, state.inner, skip_one(state.inner)),
        )
        here = now(state.step)
        if isinstance(here, jax.core.Tracer):
            weights, inner = lax.cond(here, update, held)
        else:  # Not in a branch, in which nothing can be raised.
            weights, inner = update() if here else held()
        counts = 1 - skipped_between(state.inner, inner)
        if mask is not None:  # A batch without any loss is no step.
            counts *= jnp.any(mask).astype(jnp.int32)
        return weights, kind(state.step + counts, inner)

    return observing_inner(weighting)._replace(init=init, update=update_fn, due=due)


@serializable_state
class SmoothState(NamedTuple):
    """State of :func:`smooth`."""

    inner: Any  # with the average in its ``loss_weights``
    unsmoothed: PyTree  # what the weighting inside has there
    started: PyTree  # bool scalars, a tree like the losses

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def smooth(
    weighting: LossWeighting, *, decay: jax.typing.ArrayLike = 0.9
) -> LossWeighting:
    r"""Exponential moving average of the weights.

    .. math::
      \bar w_t = \beta \bar w_{t-1} + (1 - \beta) w_t, \qquad \bar w_1 = w_1.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      decay: :math:`\beta`, in [0, 1).

    Returns:
      A :class:`yoto_jax.LossWeighting`. Its ``loss_weights`` are the averages.

    Raises:
      ValueError: ``decay`` is not in [0, 1).

    Examples:
      >>> import yoto_jax as yoto
      >>> scale_free = yoto.weightings.scale_invariant()
      >>> weighting = yoto.weightings.smooth(scale_free, decay=0.75)
      >>> state = weighting.init({"depth": 1.0})
      >>> for loss in (1.0, 0.5, 0.5):
      ...     weights, state = weighting.update({"depth": loss}, state)
      ...     print(weights["depth"])
      1.0
      1.25
      1.4375

    .. note::
      The average moves at the steps at which the weighting inside updates: put it
      inside :func:`every` and :func:`hold`, not around them.
    """
    check_weighting(weighting)
    check_decay(decay=decay)

    def init(losses: Losses) -> SmoothState:
        inner = weighting.init(losses)
        own = jax.tree.map(jnp.copy, weights_of(inner))
        started = jax.tree.map(lambda x: jnp.zeros((), jnp.bool_), own)
        return SmoothState(inner, own, started)

    def update(
        losses: Losses,
        state: SmoothState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, SmoothState]:
        check_state(state, SmoothState)
        before = weights_of(state.inner)
        mask = _mask(present, state.inner)
        inner = _with_weights(state.inner, state.unsmoothed)
        new, after = weighting.update(
            losses, inner, **and_present(weighting, statistics, present)
        )
        taken = _taken(inner, after)
        takes = jax.tree.map(
            lambda there: taken & there, _present_or_all(present, before)
        )

        def average(
            old: jax.Array, new: jax.Array, started: jax.Array, takes: jax.Array
        ) -> jax.Array:
            mixed = decay * old + (1 - decay) * new
            chosen = jnp.where(started, mixed, new)
            return jnp.where(takes, chosen, old).astype(old.dtype)

        weights = jax.tree.map(average, before, new, state.started, takes)
        return mask_weights(weights, mask), SmoothState(
            _with_weights(after, weights),
            weights_of(after),
            jax.tree.map(jnp.logical_or, state.started, takes),
        )

    return observing_inner(weighting)._replace(init=init, update=update)


@serializable_state
class NormalizeState(NamedTuple):
    """State of :func:`normalize`."""

    loss_scales: PyTree  # scalars, a tree like the losses, 0 if not known yet
    inner: Any  # with weights for the losses as they come in its ``loss_weights``
    normalized: PyTree  # what the weighting inside has there

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def normalize(
    weighting: LossWeighting, *, decay: jax.typing.ArrayLike = 0.99
) -> LossWeighting:
    r"""Divides each loss by its running mean before the weighting sees it.

    .. math::
      s_{k,t} = \beta s_{k,t-1} + (1 - \beta) |L_{k,t}|, \quad s_{k,1} = |L_{k,1}|,
      \qquad w_k = \frac{1}{s_k}\,\mathrm{weighting}(L / s)_k.

    Gradients and Gramians are scaled likewise, so that the weights do not depend on the
    unit of any loss. ``decay=1`` keeps the scale of the first batch.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      decay: :math:`\beta`, in [0, 1].

    Returns:
      A :class:`yoto_jax.LossWeighting`. Its ``loss_weights`` apply to the losses as
      they come.

    Raises:
      ValueError: ``decay`` is not in [0, 1], or the weighting needs a statistic whose
        unit is not known.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.normalize(yoto.weightings.equal(reduction="sum"))
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.25, 'depth': 2.0}

    .. note::
      A loss of exactly 0 tells nothing of its scale and leaves it as it was, at 1 if no
      other has come yet.
    """
    check_weighting(weighting)
    check_fraction(decay=decay)
    known = {*GRADIENT_STATISTICS, "losses", "alignment", "ntk_diagonal"}
    if strange := sorted({*weighting.needs} - known):
        raise ValueError(f"normalize cannot tell the unit of {', '.join(strange)}.")

    def init(losses: Losses) -> NormalizeState:
        inner = weighting.init(losses)
        own = jax.tree.map(jnp.copy, weights_of(inner))
        return NormalizeState(optax.tree.zeros_like(own), inner, own)

    def update(
        losses: Losses,
        state: NormalizeState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, NormalizeState]:
        check_state(state, NormalizeState)
        before = weights_of(state.inner)
        mask = _mask(present, state.inner)
        structure = jax.tree.structure(before)
        _, leaves, given = scalar_losses(losses)
        check_structure(given, structure, "the loss weights")
        old = jnp.stack(jax.tree.leaves(state.loss_scales))
        values = jnp.stack([jnp.asarray(x, old.dtype) for x in leaves])
        values = lax.stop_gradient(values)
        if mask is not None:
            values = jnp.where(mask, values, 0)
        size = jnp.abs(values)
        running = jnp.where(old > 0, decay * old + (1 - decay) * size, size)
        running = jnp.where(size == 0, old, running).astype(old.dtype)
        scales = jnp.where(running > 0, running, 1)

        weights, inner, own, taken = update_rescaled(
            weighting,
            state.inner,
            state.normalized,
            values / scales,
            scales,
            {name: x for name, x in statistics.items() if name in known},
            present,
        )
        scales = jnp.where(taken, running, old)
        return mask_weights(weights, mask), NormalizeState(
            split(scales, structure), inner, own
        )

    def observe_step(
        losses: Losses, state: NormalizeState, **kwargs: Any
    ) -> NormalizeState:
        assert weighting.observe_step is not None
        scaled = jax.tree.map(
            lambda x, scale: lax.stop_gradient(x) / jnp.where(scale > 0, scale, 1),
            losses,
            state.loss_scales,
        )
        return state._replace(
            inner=weighting.observe_step(scaled, state.inner, **kwargs)
        )

    return observing_inner(weighting)._replace(
        init=init,
        update=update,
        needs=tuple(dict.fromkeys(("losses", *weighting.needs))),
        observe_step=weighting.observe_step and observe_step,
    )


def update_rescaled(
    weighting: LossWeighting,
    inner: State,
    own: Weights,
    shown: jax.Array,
    scales: jax.Array,
    statistics: dict[str, Any],
    present: Present | None,
) -> tuple[Weights, Any, Weights, jax.Array]:
    """An update of a weighting that is shown losses whose gradients are others.

    Args:
      weighting: What is updated.
      inner: Its state, with weights for the losses as they come in ``loss_weights``.
      own: What it has there itself.
      shown: (K,) losses that it sees.
      scales: (K,) what the gradients of the losses are divided by to be those of these.
      statistics: Of the gradients of the losses as they come.
      present: Which losses there are.

    Returns:
      Weights for the losses as they come, the state with them, what the weighting has
      there, and whether it took the batch. Weights that are not finite are not taken.
    """
    before = weights_of(inner)
    structure = jax.tree.structure(before)
    place = None
    if weighting.downstream is not None:
        place = find_loss("downstream", weighting.downstream, before)
    seen = {
        name: _unscaled(name, value, scales, place)
        for name, value in statistics.items()
    }
    start = _with_weights(inner, own)
    new, after = weighting.update(
        split(shown, structure), start, **and_present(weighting, seen, present)
    )
    # What is held is for the losses as they come already.
    taken = _taken(start, after)
    weights = jax.tree.map(
        lambda w, scale, held, there: jnp.where(
            taken & there, (w / scale).astype(held.dtype), held
        ),
        new,
        split(scales, structure),
        before,
        _present_or_all(present, before),
    )
    ok = all_finite(weights)
    accepted = weights, _with_weights(after, weights), weights_of(after)
    return *select(ok, accepted, (before, skip_one(inner), own)), taken & ok


def _unscaled(name: str, value: Any, scales: jax.Array, downstream: int | None) -> Any:
    """A statistic of the gradients of losses divided by their scales."""
    if jax.tree.structure(value) != jax.tree.structure(0):
        value = jnp.stack([jnp.asarray(x) for x in jax.tree.leaves(value)])
    value = jnp.asarray(value, scales.dtype)
    if name in MATRICES:  # One at a time: the product of two scales may underflow.
        return value / scales[:, None] / scales[None, :]
    value = value / scales
    if name == "alignment":
        assert downstream is not None
        return value / scales[downstream]
    # The kernel belongs to a residual (the square root of a loss): one scale suffices.
    return value


def _mask(present: Present | None, state: State) -> jax.Array | None:
    """``present`` as a vector, checked against the losses of the state."""
    return stack_present(present, jax.tree.structure(weights_of(state)))


def _present_or_all(present: Present | None, weights: Weights) -> PyTree:
    return jax.tree.map(lambda _: True, weights) if present is None else present


def _with_weights(state: State, weights: Weights) -> Any:
    return optax.tree.set(state, loss_weights=weights)


def _taken(before: Any, after: Any) -> jax.Array:
    """Whether an update has changed the weights, as far as the state tells."""
    count = optax.tree.get(after, "num_updates")
    if count is None:
        return jnp.asarray(True)
    return count > optax.tree.get(before, "num_updates")


def observing_inner(weighting: LossWeighting) -> LossWeighting:
    """Forwards ``due``, ``observe`` and ``observe_step`` to the wrapped state."""
    observe, observe_step = weighting.observe, weighting.observe_step
    due = weighting.due

    def observe_inner(state: State, **seen: Any) -> Any:
        assert observe is not None
        return state._replace(inner=observe(state.inner, **seen))

    def observe_step_inner(losses: Losses, state: State, **kwargs: Any) -> Any:
        assert observe_step is not None
        return state._replace(inner=observe_step(losses, state.inner, **kwargs))

    return weighting._replace(
        due=None if due is None else lambda state: due(state.inner),
        observe=observe and observe_inner,
        observe_step=observe_step and observe_step_inner,
    )
