"""The weightings as a link of an Optax chain, over stacked per-loss gradients."""

from typing import Any

import jax
import optax

from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    find_loss,
    loss_names,
    stack_present,
    tree_of,
)
from yoto_jax._numerics import stacked
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    LossWeighting,
    and_present,
    check_weighting,
    weights_of,
)
from yoto_jax.gradients._devices import spread_of
from yoto_jax.gradients._rows import check_rows, combine_rows, present_rows
from yoto_jax.gradients._statistics import if_due, statistics_of


def aggregate(
    weighting: LossWeighting,
    losses: Losses | int,
    *,
    param_specs: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Combines per-loss gradients, stacked on a leading axis, into one gradient.

    .. math::
      u \leftarrow \sum_k w_k u_k, \qquad w = \mathrm{weighting}(L, J J^T).

    The first link of a chain: what comes after it sees gradients of the usual shape. In
    front of gradient accumulation, each batch is aggregated on its own. On many devices
    average losses and gradients first (``axis_name`` of ``value_and_jacobian``).

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      losses: A tree of losses, or of anything with their shape and dtype; or just their
        number K.
      param_specs: ``PartitionSpec`` of the parameters where ``shard_map`` spreads them
        over devices, see :func:`yoto_jax.value_and_grad`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is that of the weighting.
      Its ``update`` takes gradients with a leading axis of length K, as
      :func:`yoto_jax.value_and_jacobian` makes them, and as keywords ``losses=``, if
      the weighting looks at loss values, ``present=``, a tree of booleans, if losses
      may be absent from a batch, and any other statistic that it needs.

    Raises:
      ValueError: In ``update``: ``losses`` is missing although the weighting needs
        them, or an array is not K gradients of a parameter.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> loss_fn = lambda w: {"fit": jnp.sum((w - 1) ** 2), "size": jnp.sum(w**2)}
      >>> w = jnp.array([0.0, 2.0])
      >>> losses, jacobian = yoto.value_and_jacobian(loss_fn)(w)
      >>> upgrad = yoto.weightings.upgrad()
      >>> tx = optax.chain(yoto.aggregate(upgrad, losses), optax.sgd(1.0))
      >>> updates, state = tx.update(jacobian, tx.init(w), w)
      >>> print(updates)
      [ 1. -3.]
      >>> print(optax.tree.get(state, "loss_weights")["fit"])
      0.5
    """
    check_weighting(weighting)
    losses = tree_of(losses)
    names = loss_names(jax.tree.structure(losses))
    asked = [name for name in weighting.needs if name in GRADIENT_STATISTICS]
    aligned = "alignment" in weighting.needs

    def init_fn(params: Params) -> Any:
        del params
        return weighting.init(losses)

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        losses: Losses | None = None,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        check_rows(updates, names, params)
        if losses is None:
            if "losses" in weighting.needs:
                raise ValueError(
                    "this weighting needs the losses: call update(updates, state, "
                    "params, losses=losses)."
                )
            losses = optax.tree.ones_like(weights_of(state))
        mask = stack_present(present, jax.tree.structure(losses))
        updates = present_rows(updates, mask)
        extra_args = and_present(weighting, extra_args, present)
        seen = extra_args | if_due(weighting, state, lambda: statistics(updates))
        weights, state = weighting.update(losses, state, **seen)
        return combine_rows(updates, stacked(weights)), state

    def statistics(rows: PyTree) -> dict[str, jax.Array]:
        spread = spread_of(rows, param_specs)
        if not aligned:
            return statistics_of(rows, asked, spread)
        found = statistics_of(rows, [*asked, "gramian"], spread)
        position = find_loss("downstream", weighting.downstream, losses)
        return found | {"alignment": found["gramian"][position]}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
