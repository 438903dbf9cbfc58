"""An optimizer that takes no step on batches with absurd losses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yoto_jax._checks import check_transformation
from yoto_jax._loss_logits import LossLogits, is_loss_logits
from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    check_structure,
    listed,
    loss_names,
    loss_vector,
    scalar_losses,
    stack_present,
)
from yoto_jax._numerics import all_finite, select, upcast
from yoto_jax._outliers import (
    OutlierRule,
    SkipOutliersState,
    as_rule,
)
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits


def skip_outliers(
    inner: optax.GradientTransformation,
    rule: OutlierRule | None = None,
    *,
    losses: Losses | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the step on batches that are not finite or have an outlying loss.

    A batch is bad if the rule says so of its losses, or if an update is not finite (or
    its square). Then the updates are zero, the state of ``inner`` stays what it was,
    and ``num_skipped`` goes up by 1: parameters, loss logits, moments and schedules are
    those of a run in which the batch never came.

    Args:
      inner: Any transformation. Wrap the whole chain, and ``optax.MultiSteps`` too.
      rule: Which losses are outliers; ``yoto_jax.OutlierRule()`` if none is given.
      losses: A tree of the losses, or of anything with their shape; or just their
        number. May be left out if the parameters hold :class:`yoto_jax.LossLogits`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs the losses of
      the batch, averaged over devices, as keyword ``losses=`` and hands them on to
      ``inner``. On batches that are all good it does what ``inner`` does.

    Raises:
      TypeError: ``rule`` is something else, such as a bare limit.
      ValueError: A number of losses not positive. In ``init``: loss logits of different
        losses among the parameters, and no ``losses``. In ``update``: the losses are
        missing, or are not those of ``init``, or their number was not known there.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> tx = yoto.skip_outliers(optax.sgd(0.1), losses=["fit"])
      >>> w = jnp.float32(1.0)
      >>> state = tx.init(w)
      >>> for x in (2.0, 2.1, 1e6, 2.0):
      ...     loss, gradient = (w - x) ** 2, 2 * (w - x)
      ...     updates, state = tx.update(gradient, state, w, losses=[loss])
      ...     w = optax.apply_updates(w, updates)
      ...     print(round(float(w), 2), state.num_skipped)
      1.2 0
      1.38 0
      1.38 1
      1.5 1
    """
    check_transformation(inner=inner)
    rule = as_rule(rule)
    inner = optax.with_extra_args_support(inner)
    expected = losses
    if isinstance(losses, int | np.integer):
        if isinstance(losses, bool) or losses < 1:
            raise ValueError(
                "losses must be a tree of the losses or their number, which is "
                f"positive, got {losses!r}."
            )
        expected = int(losses)

    def init_fn(params: Params) -> SkipOutliersState:
        names: tuple[str, ...] = ()
        count = expected if isinstance(expected, int) else 0
        # Not known: an error in update. Optax calls init with placeholders, too.
        if (structure := _structure(expected, params)) is not None:
            names, count = loss_names(structure), structure.num_leaves
        state = rule.init(count, jnp.float32, inner.init(params), names)
        if names or jax.tree.leaves(params):
            return state
        placeholder: Any = jnp.zeros((), jnp.int32)  # Of optax.tree.map_params.
        return state._replace(columns=placeholder)

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        losses: Losses | None = None,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SkipOutliersState]:
        structure = _structure(expected, params)
        values = _values(losses, structure, state)
        mask = stack_present(present, jax.tree.structure(losses))
        if present is not None:
            extra_args = extra_args | {"present": present}
        sound = all_finite([_squared(x) for x in jax.tree.leaves(updates)])
        after = rule.step(state, values, sound, mask)
        new, inner_state = inner.update(
            updates, state.inner, params, losses=losses, **extra_args
        )
        ok = after.accepted
        new = jax.tree.map(
            lambda u: u if _is_float0(u) else jnp.where(ok, u, jnp.zeros_like(u)), new
        )
        return new, after._replace(inner=select(ok, inner_state, state.inner))

    return unwrap_loss_logits(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _structure(losses: Losses | None, params: Params) -> Any:
    """The structure of the losses: as given, or as that of loss logits, or None."""
    if losses is not None:
        return None if isinstance(losses, int) else jax.tree.structure(losses)
    leaves = jax.tree.leaves(params, is_leaf=is_loss_logits)
    found = {x.structure for x in leaves if isinstance(x, LossLogits)}
    if len(found) > 1:
        raise ValueError(
            f"the parameters hold loss logits for {len(found)} sets of losses: say "
            "which losses there are, skip_outliers(inner, losses=losses)."
        )
    return found.pop() if found else None


def _values(
    losses: Losses | None, structure: Any, state: SkipOutliersState
) -> jax.Array:
    """The losses of a batch as a vector, checked against those of ``init``."""
    means = state.loss_scales.means
    count = means.shape[-1]
    if losses is None:
        raise ValueError(
            "skip_outliers needs the losses: call update(updates, state, params, "
            "losses=losses)."
        )
    if not count:
        raise ValueError(
            "skip_outliers does not know the number of losses, for it found no loss "
            "logits among the parameters: give skip_outliers(inner, losses=losses)."
        )
    _, leaves, given = scalar_losses(losses)
    check_structure(given, given if structure is None else structure, "skip_outliers")
    if len(leaves) != count:
        raise ValueError(
            f"skip_outliers was made for {count} losses, got {len(leaves)}."
        )
    if state.names and state.names != list(loss_names(given)):
        raise ValueError(
            f"the state of skip_outliers is that of the losses {listed(state.names)}, "
            f"got {listed(loss_names(given))}."
        )
    return loss_vector(losses, given, means.dtype)


def _squared(update: Any) -> Any:
    """A number as large as Adam will make of it: its square may overflow."""
    if _is_float0(update) or not jnp.issubdtype(jnp.result_type(update), jnp.inexact):
        return 0
    return jnp.square(upcast(jnp.abs(update)))  # Complex ones have a size, too.


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0
