"""Weightings that are tried here and are not in the library."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import yoto_jax as yoto
from yoto_jax._numerics import running_mean

PyTree = Any


class CappedState(NamedTuple):
    """State of :func:`capped`."""

    inner: Any  # with the capped weights in its ``loss_weights``
    uncapped: PyTree  # what the weighting inside has there


def capped(
    weighting: yoto.LossWeighting, primary: str, most: float = 1.0
) -> yoto.LossWeighting:
    """No auxiliary gradient is longer than ``most`` times the primary one.

    A guard against losses that brute force can make zero: methods that look at rates or
    norms give such a loss ever more weight.
    """

    def init(losses: PyTree) -> CappedState:
        inner = weighting.init(losses)
        return CappedState(inner, _copy(optax.tree.get(inner, "loss_weights")))

    def update(
        losses: PyTree, state: CappedState, *, present: PyTree = None, **seen: Any
    ) -> tuple[PyTree, CappedState]:
        own = {name: x for name, x in seen.items() if name in weighting.needs}
        if present is not None:
            own["present"] = present
        inner = optax.tree.set(state.inner, loss_weights=state.uncapped)
        weights, inner = weighting.update(losses, inner, **own)
        uncapped = optax.tree.get(inner, "loss_weights")
        norms = dict(zip(sorted(weights), seen["norms"], strict=True))
        length = jnp.abs(weights[primary]) * norms[primary]

        def cap(weight: jax.Array, norm: jax.Array) -> jax.Array:
            bound = most * length / jnp.where(norm > 0, norm, 1.0)
            return jnp.where(norm > 0, jnp.clip(weight, -bound, bound), weight)

        kept = {
            name: weight if name == primary else cap(weight, norms[name])
            for name, weight in weights.items()
        }
        inner = optax.tree.set(inner, loss_weights=kept)
        return kept, CappedState(inner, uncapped)

    needs = tuple(dict.fromkeys((*weighting.needs, "norms")))
    return yoto.LossWeighting(init, update, needs)


class InUnitsState(NamedTuple):
    """State of :func:`in_units`."""

    norms: jax.Array  # (K,), running means of the gradient norms
    count: jax.Array  # int32 scalar, batches they are of
    inner: Any  # with weights for the losses as they come in its ``loss_weights``
    told: PyTree  # what the weighting inside has there


def in_units(
    weighting: yoto.LossWeighting,
    primary: str,
    *,
    share: float = 1.0,
    warmup: int | None = None,
    decay: float = 0.99,
) -> yoto.LossWeighting:
    """Show a weighting losses whose gradients are as long as the primary one's.

    Each loss is multiplied by ``share * n_p / n_k`` with running means of the gradient
    norms, which stop after ``warmup`` batches if that is given.
    """

    def init(losses: PyTree) -> InUnitsState:
        inner = weighting.init(losses)
        own = optax.tree.get(inner, "loss_weights")
        count = len(jax.tree.leaves(own))
        return InUnitsState(
            jnp.zeros(count), jnp.zeros((), jnp.int32), inner, _copy(own)
        )

    def update(
        losses: PyTree, state: InUnitsState, *, present: PyTree = None, **seen: Any
    ) -> tuple[PyTree, InUnitsState]:
        names = sorted(losses)
        place = names.index(primary)
        # The plain mean until as many batches as the running mean remembers.
        memory = 1 / (1 - decay)
        norms = running_mean(state.norms, seen["norms"], state.count, memory, decay)
        if present is not None:
            there = jnp.stack([jnp.asarray(present[name]) for name in names])
            norms = jnp.where(there, norms, state.norms)
        if warmup is not None:
            norms = jnp.where(state.count < warmup, norms, state.norms)
        scale = share * norms[place] / jnp.where(norms > 0, norms, 1.0)
        scale = jnp.where(norms > 0, scale, 1.0).at[place].set(1.0)
        scales = dict(zip(names, scale, strict=True))
        shown = {name: losses[name] * scales[name] for name in names}
        own = {
            name: _scaled(name, value, scale)
            for name, value in seen.items()
            if name in weighting.needs
        }
        if present is not None:
            own["present"] = present
        inner = optax.tree.set(state.inner, loss_weights=state.told)
        _, inner = weighting.update(shown, inner, **own)
        told = optax.tree.get(inner, "loss_weights")
        weights = {name: told[name] * scales[name] for name in names}
        inner = optax.tree.set(inner, loss_weights=weights)
        return weights, InUnitsState(norms, state.count + 1, inner, told)

    needs = tuple(dict.fromkeys((*weighting.needs, "norms")))
    return yoto.LossWeighting(init, update, needs)


def _scaled(name: str, value: jax.Array, scale: jax.Array) -> jax.Array:
    if name == "gramian":
        return value * scale[:, None] * scale[None, :]
    return value * scale


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)
