"""Optimizers inside weightings, with counters of their own for each loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_transformation
from yoto_jax._loss_logits import is_loss_logits
from yoto_jax._losses import State
from yoto_jax._numerics import where_rows


def chosen(
    optimizer: optax.GradientTransformation | None,
    default: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The optimizer that was given, checked, or the default."""
    if optimizer is None:
        return default
    check_transformation(optimizer=optimizer)
    return optimizer


def init_each(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state of an optimizer of a vector, with counters of its own for each entry.

    Each entry belongs to one loss. Its moments, and its counters, stand still while the
    loss is absent. What the state has once for all entries, it has here for each.
    """
    size = jax.tree.leaves(params)[0].shape
    spread = lambda x: x if x.shape == size else jnp.broadcast_to(x, size + x.shape)
    return jax.tree.map(lambda x: jnp.copy(spread(jnp.asarray(x))), tx.init(params))


def descend(
    tx: optax.GradientTransformation,
    gradient: Any,
    state: State,
    params: Any,
    moves: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """One step of the optimizer of :func:`init_each`, of the entries in ``moves``.

    Of loss logits, ``moves`` names all losses, with the primary one among them.
    """
    tx = optax.with_extra_args_support(tx)
    if moves is not None and is_loss_logits(params) and params.primary is not None:
        moves = jnp.delete(moves, params.primary, assume_unique_indices=True)
    size = jax.tree.leaves(params)[0].shape
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params))]
    once = [shape == size for shape in shapes]
    leaves, structure = jax.tree.flatten(state)
    leaves = [  # What has been set for all entries, such as an injected learning rate.
        x if x.shape != shape or whole else jnp.broadcast_to(x, size + shape)
        for x, shape, whole in zip(leaves, shapes, once, strict=True)
    ]
    shown = params
    if moves is not None:  # Absent losses have no part in norms and decays.
        none = functools.partial(where_rows, moves, y=0)
        gradient, shown = jax.tree.map(none, (gradient, params))

    def one(leaves: list[Any]) -> tuple[Any, list[Any]]:
        """The step with the counters of one entry."""
        old = structure.unflatten(leaves)
        # Optax's Adam mixes integers and floats, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = tx.update(gradient, old, shown, **extra_args)
        return optax.apply_updates(params, updates), jax.tree.leaves(new)

    axes = [None if whole else 0 for whole in once]
    moved, new = jax.vmap(one, in_axes=(axes,), axis_size=size[0])(leaves)
    moved = jax.tree.map(jnp.diagonal, moved)
    new = [jnp.diagonal(x) if whole else x for x, whole in zip(new, once, strict=True)]
    after = structure.unflatten(new)
    if moves is None:
        return moved, after
    return jax.tree.map(
        functools.partial(where_rows, moves), (moved, after), (params, state)
    )
