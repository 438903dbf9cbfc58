"""Wrappers: a weighting made of another one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._loss_logits import PyTree, check_structure, scalar_losses
from yoto_jax.weightings._protocol import GRADIENT_STATISTICS, LossWeighting


class EveryState(NamedTuple):
    """State of :func:`every`."""

    step: jax.Array  # int32 scalar, calls of update
    inner: Any


def every(weighting: LossWeighting, steps: jax.typing.ArrayLike) -> LossWeighting:
    """Update the weights every so many steps, and hold them in between.

    In between, :func:`yoto_jax.value_and_grad` computes none of the statistics that the
    weighting needs: a step then costs what it costs with fixed weights.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      steps: Steps from one update to the next (a positive integer). The first step
        updates.

    Returns:
      A :class:`yoto_jax.LossWeighting`.

    Raises:
      ValueError: ``steps`` is not positive.

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
      Under ``vmap`` both cases are computed at every step, as ``jax.lax.cond`` has it.
    """
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps must be positive, got {steps}.")

    def due(state: EveryState) -> jax.Array:
        now = state.step % steps == 0
        return now if weighting.due is None else now & weighting.due(state.inner)

    def init(losses: PyTree) -> EveryState:
        return EveryState(jnp.zeros((), jnp.int32), weighting.init(losses))

    def update_fn(
        losses: PyTree, state: EveryState, **statistics: Any
    ) -> tuple[PyTree, EveryState]:
        def hold() -> tuple[PyTree, Any]:
            return optax.tree.get(state.inner, "loss_weights"), state.inner

        weights, inner = lax.cond(
            due(state),
            lambda: weighting.update(losses, state.inner, **statistics),
            hold,
        )
        return weights, EveryState(state.step + 1, inner)

    return _observing_inner(weighting)._replace(init=init, update=update_fn, due=due)


def smooth(
    weighting: LossWeighting, decay: jax.typing.ArrayLike = 0.9
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
      >>> weighting = yoto.weightings.smooth(yoto.weightings.scale_invariant(), 0.75)
      >>> state = weighting.init({"depth": 1.0})
      >>> for loss in (1.0, 0.5, 0.5):
      ...     weights, state = weighting.update({"depth": loss}, state)
      ...     print(weights["depth"])
      1.0
      1.25
      1.4375
    """
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")

    def update(losses: PyTree, state: Any, **statistics: Any) -> tuple[PyTree, Any]:
        before = optax.tree.get(state, "loss_weights")
        updates = optax.tree.get(state, "num_updates")
        new, state = weighting.update(losses, state, **statistics)
        taken = optax.tree.get(state, "num_updates") > updates

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            mixed = decay * old + (1 - decay) * new
            chosen = jnp.where(updates == 0, new, mixed)
            return jnp.where(taken, chosen, old).astype(old.dtype)

        weights = jax.tree.map(average, before, new)
        return weights, optax.tree.set(state, loss_weights=weights)

    return weighting._replace(update=update)


class NormalizeState(NamedTuple):
    """State of :func:`normalize`."""

    loss_scales: PyTree  # scalars, a tree like the losses
    inner: Any


def normalize(
    weighting: LossWeighting, decay: jax.typing.ArrayLike = 0.99
) -> LossWeighting:
    r"""Show a weighting losses of a common scale: each over its own running mean.

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
      ValueError: ``decay`` is not in [0, 1].

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> weighting = yoto.weightings.normalize(yoto.weightings.equal("sum"))
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.25, 'depth': 2.0}

    .. note::
      A loss of exactly 0 has no scale; while its running mean is 0 it is taken as 1.
    """
    if isinstance(decay, int | float) and not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}.")

    def init(losses: PyTree) -> NormalizeState:
        inner = weighting.init(losses)
        scales = optax.tree.ones_like(optax.tree.get(inner, "loss_weights"))
        return NormalizeState(scales, inner)

    def update(
        losses: PyTree, state: NormalizeState, **statistics: Any
    ) -> tuple[PyTree, NormalizeState]:
        before = optax.tree.get(state.inner, "loss_weights")
        updates = optax.tree.get(state.inner, "num_updates")
        _, leaves, structure = scalar_losses(losses)
        check_structure(structure, jax.tree.structure(before), "the loss weights")
        old = jnp.stack(jax.tree.leaves(state.loss_scales))
        size = jnp.abs(jnp.stack([jnp.asarray(x, old.dtype) for x in leaves]))
        running = jnp.where(updates == 0, size, decay * old + (1 - decay) * size)
        scales = jnp.where(running > 0, running, 1.0)
        scaled = structure.unflatten(
            [jnp.asarray(x, old.dtype) / scales[k] for k, x in enumerate(leaves)]
        )
        seen = {
            name: _unscaled(name, value, scales) for name, value in statistics.items()
        }
        new, inner = weighting.update(scaled, state.inner, **seen)
        # What is held is for the losses as they come already.
        taken = optax.tree.get(inner, "num_updates") > updates
        weights = structure.unflatten(
            [
                jnp.where(taken, jnp.asarray(w, old.dtype) / scales[k], held)
                for k, (w, held) in enumerate(
                    zip(jax.tree.leaves(new), jax.tree.leaves(before), strict=True)
                )
            ]
        )
        kept = jnp.where(taken, scales, old)
        return weights, NormalizeState(
            structure.unflatten([kept[k] for k in range(len(leaves))]),
            optax.tree.set(inner, loss_weights=weights),
        )

    due, observe_step = weighting.due, weighting.observe_step

    def observe_scaled(losses: PyTree, state: NormalizeState) -> NormalizeState:
        assert observe_step is not None
        scaled = jax.tree.map(jnp.divide, losses, state.loss_scales)
        return state._replace(inner=observe_step(scaled, state.inner))

    return _observing_inner(weighting)._replace(
        init=init,
        update=update,
        due=None if due is None else lambda state: due(state.inner),
        observe_step=observe_step and observe_scaled,
    )


def _unscaled(name: str, value: Any, scales: jax.Array) -> Any:
    """A statistic of the gradients of losses divided by their scales."""
    if name == "gramian":
        return value / (scales[:, None] * scales[None, :])
    if name in (*GRADIENT_STATISTICS, "alignment"):
        return value / scales
    return value


def _observing_inner(weighting: LossWeighting) -> LossWeighting:
    """Observers that reach through a state with a field ``inner``."""
    observe, observe_step = weighting.observe, weighting.observe_step

    def observe_inner(state: Any, **seen: Any) -> Any:
        assert observe is not None
        return state._replace(inner=observe(state.inner, **seen))

    def observe_step_inner(losses: PyTree, state: Any) -> Any:
        assert observe_step is not None
        return state._replace(inner=observe_step(losses, state.inner))

    return weighting._replace(
        observe=observe and observe_inner,
        observe_step=observe_step and observe_step_inner,
    )
