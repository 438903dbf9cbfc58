"""A transformation of each loss's gradient, in front of what combines them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_transformation, is_key
from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    loss_names,
    stack_present,
    tree_of,
)
from yoto_jax._numerics import where_rows
from yoto_jax.gradients._devices import spread_of
from yoto_jax.gradients._rows import check_rows, present_rows
from yoto_jax.gradients._statistics import statistics_of


def per_loss(
    inner: optax.GradientTransformation,
    losses: Losses | int,
    *,
    param_specs: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a transformation to each loss's gradient, with a state of its own.

    .. math::
      u_k \leftarrow \mathrm{inner}(u_k), \qquad k = 1, \ldots, K.

    In front of :func:`aggregate` it gives gradients a memory: ``optax.ema`` for MoCo
    and DB-MTL, ``optax.scale_by_adam`` for AdaTask; or ``optax.clip_by_global_norm``
    clips each of them.

    Args:
      inner: Any transformation. Schedules count the batches that a loss was in. Random
        keys in its state are folded with the position of the loss; of keys that are
        bare integers, as of ``jax.random.PRNGKey``, all losses have the same.
      losses: A tree of losses, or of anything with their shape; or just their number K.
      param_specs: ``PartitionSpec`` of the parameters where ``shard_map`` spreads them
        over devices, so that all devices find the same batches bad.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is that of ``inner`` with
      a leading axis of length K. Its ``update`` takes and returns gradients with such
      an axis, as :func:`value_and_jacobian` makes them. With ``present=``, a tree of
      booleans, absent losses keep their state, and their updates are 0. A batch that is
      not finite leaves the state as it is: what comes behind skips and counts it.

    Raises:
      TypeError: ``inner`` is no transformation.
      ValueError: In ``update``: an array has no leading axis of length K.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> mgda = yoto.weightings.mgda()
      >>> tx = optax.chain(
      ...     yoto.per_loss(optax.ema(0.5), 2), yoto.aggregate(mgda, 2), optax.sgd(1.0)
      ... )
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for noise in (2.0, -1.0):  # It cancels in the mean.
      ...     jacobian = jnp.array([[4.0, noise], [0.0, 2.0]])
      ...     updates, state = tx.update(jacobian, state, w)
      >>> print(state[0].ema.shape, f"{updates[0]:.1f} {updates[1]:.1f}")
      (2, 2) -0.8 -1.6

    .. note::
      ``optax.ema`` alone in front of ``aggregate`` starts with the shape of the
      parameters, which is not that of the gradients: ``jax.lax.scan`` refuses it.
    """
    check_transformation(inner=inner)
    inner = optax.with_extra_args_support(inner)
    structure = jax.tree.structure(tree_of(losses))
    names = loss_names(structure)

    def init_fn(params: Params) -> Any:
        def each(row: jax.Array) -> Any:
            own = lambda x: jax.random.fold_in(x, row) if is_key(x) else x
            return jax.tree.map(own, inner.init(params))

        return jax.vmap(each)(jnp.arange(len(names)))

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        check_rows(updates, names, params)
        there = stack_present(present, structure)
        updates = present_rows(updates, there)
        spread = spread_of(updates, param_specs)
        norms = statistics_of(updates, ["norms"], spread)["norms"]
        takes = jnp.broadcast_to(jnp.all(jnp.isfinite(norms)), norms.shape)
        if there is not None:
            takes &= there

        def one(row: Params, state: State) -> tuple[PyTree, Any]:
            return inner.update(row, state, params, **extra_args)

        new, after = jax.vmap(one)(updates, state)
        state = jax.tree.map(functools.partial(where_rows, takes), after, state)
        return present_rows(new, there), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
