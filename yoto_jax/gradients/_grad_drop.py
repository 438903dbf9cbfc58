"""Gradients that agree on a sign, entry by entry, as a link of an Optax chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._checks import as_key, check_all_fractions
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import Losses, Params, Present, PyTree, stack_present, tree_of
from yoto_jax._numerics import upcast
from yoto_jax._serialization import serializable_state
from yoto_jax._solvers import safe_divide
from yoto_jax._varying import Axes
from yoto_jax.gradients._devices import spread_of
from yoto_jax.gradients._rows import check_rows, present_rows


@serializable_state
class GradDropState(NamedTuple):
    """State of :func:`grad_drop`."""

    key: jax.Array  # typed key, split at every update


def grad_drop(
    losses: Losses | int,
    *,
    leak: PyTree = 0.0,
    key: jax.Array | int = 0,
    param_specs: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sums per-loss gradients, keeping one sign, drawn at random, for each entry.

    .. math::
      u \leftarrow \sum_k \bigl(\ell_k + (1 - \ell_k) M_k\bigr) u_k, \qquad
      M_k = [u_k > 0][U < P] + [u_k < 0][U \ge P], \qquad
      P = \frac12 \Bigl(1 + \frac{\sum_k u_k}{\sum_k |u_k|}\Bigr).

    U is uniform on [0, 1), one draw for each entry. Loss weights cannot do that,
    so it takes the place of :func:`aggregate` in a chain. With one leak for all losses,
    its mean is the plain sum of the gradients; where they agree it is that sum.

    Args:
      losses: A tree of losses, or of anything with their shape; or just their number K.
      leak: What of a gradient passes whatever the sign, in [0, 1]: one number, one per
        loss, or a tree like the losses.
      key: A typed key, ``jax.random.key(...)``, or an integer seed.
      param_specs: ``PartitionSpec`` of the parameters where ``shard_map`` spreads them
        over devices, so that each device draws for its own part.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes gradients with
      a leading axis of length K, as :func:`value_and_jacobian` makes them, and as
      keyword ``present=``, a tree of booleans. An entry that is not finite stays so.

    Raises:
      ValueError: ``leak`` is not in [0, 1] or does not fit the losses. In ``update``:
        an array has no leading axis of length K.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> tx = optax.chain(yoto.grad_drop(2, key=1), optax.sgd(1.0))
      >>> w = jnp.zeros(3)
      >>> jacobian = jnp.array([[1.0, -3.0, 2.0], [5.0, -1.0, -2.0]])
      >>> updates, state = tx.update(jacobian, tx.init(w), w)
      >>> print(updates[:2], abs(updates[2]))  # Either 2 or -2, at even odds.
      [-6.  4.] 2.0

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
      Sign Dropout <https://arxiv.org/abs/2010.06808>`_, 2020, Algorithm 1.

    .. warning::
      The paper drops gradients of activations, multiplied by the sign of the activation
      and summed over the batch; here they are those of parameters, as in TorchJD.
    """
    losses = tree_of(losses)
    spec = LossSpec(jax.tree.structure(losses), jnp.result_type(float))
    check_all_fractions(leak=leak)
    leaks = spec.vector("leak", leak)

    def init_fn(params: Params) -> GradDropState:
        del params
        # A key of its own: the caller's may be donated with the state otherwise.
        return GradDropState(jax.random.fold_in(as_key(key), 0))

    def update_fn(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GradDropState]:
        del extra_args
        check_rows(updates, spec.names, params)
        updates = present_rows(updates, stack_present(present, spec.structure))
        after, draw = jax.random.split(state.key)
        rows, structure = jax.tree.flatten(updates)
        spread = spread_of(updates, param_specs)
        keys = [_own(jax.random.fold_in(draw, n), x) for n, x in enumerate(spread)]
        kept = [_one_sign(x, k, leaks) for x, k in zip(rows, keys, strict=True)]
        return structure.unflatten(kept), GradDropState(after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _own(key: jax.Array, axes: Axes) -> jax.Array:
    """A key for this device's part of an array."""
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key


def _one_sign(rows: jax.Array, key: jax.Array, leaks: jax.Array) -> jax.Array:
    dtype = rows.dtype
    if dtype == jax.dtypes.float0:
        return rows[0]
    if jnp.issubdtype(dtype, jnp.complexfloating):  # Two entries each.
        parts = jnp.stack([rows.real, rows.imag], axis=-1)
        kept = _one_sign(parts, key, leaks)
        return lax.complex(kept[..., 0], kept[..., 1])
    rows = upcast(rows)
    above, below = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
    total = jnp.sum(above, axis=0)
    size = total - jnp.sum(below, axis=0)
    positive = jax.random.uniform(key, size.shape, size.dtype) < safe_divide(
        total, size
    )
    chosen = jnp.where(positive[None], above, below)
    leak = leaks.astype(rows.dtype).reshape((-1,) + (1,) * (rows.ndim - 1))
    kept = jnp.sum(chosen + leak * (rows - chosen), axis=0)
    # What is not finite has no odds, and is not to be lost among the dropped.
    kept = jnp.where(jnp.isfinite(size), kept, jnp.sum(rows, axis=0))
    return kept.astype(dtype)
