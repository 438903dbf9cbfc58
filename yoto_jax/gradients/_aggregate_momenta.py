"""Per-loss momenta that are combined, from the gradient of one loss at a time."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_decay, check_positive
from yoto_jax._losses import (
    Losses,
    Params,
    PyTree,
    find_loss,
    loss_names,
    tree_of,
)
from yoto_jax._numerics import select
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting, check_weighting
from yoto_jax.gradients._aggregate import aggregate
from yoto_jax.gradients._devices import spread_of
from yoto_jax.gradients._statistics import squared_norm


@serializable_state
class MomentaState(NamedTuple):
    """State of :func:`aggregate_momenta`."""

    momenta: Params  # (K, ...) running means of the gradients
    num_seen: jax.Array  # int32 (K,), gradients in each
    combined: Params  # the last combination, as a running mean from zero
    second_moment: Params  # of the gradients whose running mean that would be
    num_combined: jax.Array  # int32 scalar, combinations so far
    inner: Any  # of the weighting


def aggregate_momenta(
    weighting: LossWeighting,
    losses: Losses | int,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    param_specs: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the momenta of all losses, and updates one of them in each step.

    .. math::
      m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k, \qquad
      u = \sum_j w_j \hat m_j, \quad w = \mathrm{weighting}(\hat M \hat M^\top), \\
      f_t = (1 - \beta_1^t)\, u, \qquad
      s \leftarrow \beta_2 s + (1 - \beta_2)
      \Bigl(\frac{f_t - \beta_1 f_{t-1}}{1 - \beta_1}\Bigr)^2, \qquad
      u \leftarrow \frac{u}{\sqrt{\hat s} + \epsilon}.

    A hat divides by :math:`1 - \beta^n`, with n what is in the mean so far. A step
    costs one backward pass, of one loss, and memory for K gradients. With
    ``weightings.config()`` this is M-ConFIG.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting` of gradients, such as ``config()``.
      losses: A tree of losses, or of anything with their shape; or just their number K.
      b1: :math:`\beta_1`, decay of the momenta, in [0, 1).
      b2: :math:`\beta_2`, decay of the second moment, in [0, 1).
      eps: :math:`\epsilon > 0`.
      param_specs: ``PartitionSpec`` of the parameters where ``shard_map`` spreads them
        over devices, see :func:`yoto_jax.value_and_grad`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, an optimizer but for the learning
      rate. Its ``update`` takes the gradient of one loss, and which one as keyword
      ``loss=``: its path, its place in a list, or an integer array, its place in
      ``jax.tree.leaves(losses)``. Updates are 0 until each loss has been there once. A
      gradient that is not finite, or a traced place that does not exist, leaves the
      state as it is, is counted in ``num_skipped`` of the weighting, and makes updates
      NaN.

    Raises:
      ValueError: A decay is not in [0, 1). In ``update``: ``loss`` is missing, or
        unknown; the gradient has not the shapes of the parameters.
      TypeError: A parameter is not floating-point. In ``update``: ``loss`` is no name.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, yoto_jax as yoto
      >>> losses = {"fit": lambda w: jnp.sum((w - 1) ** 2), "size": lambda w: w @ w}
      >>> m_config = yoto.aggregate_momenta(yoto.weightings.config(), losses)
      >>> tx = optax.chain(m_config, optax.scale_by_learning_rate(0.01))
      >>> w = jnp.array([0.0, 2.0])
      >>> state = tx.init(w)
      >>> for step in range(200):
      ...     name = ("fit", "size")[step % 2]
      ...     updates, state = tx.update(jax.grad(losses[name])(w), state, w, loss=name)
      ...     w = optax.apply_updates(w, updates)
      >>> print(bool(jnp.all((w > -0.1) & (w < 1.1))))  # Between the two optima.
      True

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, 2024, Algorithm 1, and the authors'
      ``PseudoMomentumOperator``.

    .. warning::
      It scales as Adam does: put no Adam behind it. Moments are kept in float32 at
      least.
    """
    check_weighting(weighting)
    check_decay(b1=b1, b2=b2)
    check_positive(eps=eps)
    losses = tree_of(losses)
    names = loss_names(jax.tree.structure(losses))
    tx = aggregate(
        weighting, jax.tree.map(lambda _: 0.0, losses), param_specs=param_specs
    )

    def init_fn(params: Params) -> MomentaState:
        for path, x in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                raise TypeError(
                    "aggregate_momenta takes floating-point parameters, got "
                    f"{jnp.result_type(x)} at params{jax.tree_util.keystr(path)}."
                )
        row = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(x)), params)
        return MomentaState(
            momenta=jax.tree.map(
                lambda x: jnp.zeros((len(names), *x.shape), x.dtype), row
            ),
            num_seen=jnp.zeros((len(names),), jnp.int32),
            combined=row,
            second_moment=jax.tree.map(lambda x: jnp.zeros_like(x.real), row),
            num_combined=jnp.zeros((), jnp.int32),
            inner=tx.init(params),
        )

    def update_fn(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        loss: str | int | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, MomentaState]:
        if loss is None:
            raise ValueError(
                "aggregate_momenta has to know whose gradient it is: call "
                "update(updates, state, params, loss=...)."
            )
        place = jnp.asarray(_place(loss, losses, names))
        _check_shapes(updates, state.combined)
        ok = jnp.isfinite(squared_norm(updates, spread_of(updates, param_specs)))
        ok &= (place >= 0) & (place < len(names))

        def renew(rows: jax.Array, g: jax.Array) -> jax.Array:
            decay = jnp.asarray(b1, rows.dtype)
            new = decay * rows[place] + (1 - decay) * g.astype(rows.dtype)
            return rows.at[place].set(jnp.where(ok, new, rows[place]))

        momenta = jax.tree.map(renew, state.momenta, updates)
        num_seen = state.num_seen.at[place].add(ok.astype(jnp.int32))
        every = jnp.all(num_seen > 0)
        # Not finite if the batch is not: then the weighting skips and counts it.
        known = jnp.where(ok, jnp.maximum(num_seen, 1).astype(jnp.float32), jnp.nan)
        corrected = jax.tree.map(lambda x: x / _mass(b1, known, x), momenta)
        combination, inner = tx.update(corrected, state.inner, params, **extra_args)
        count = state.num_combined + 1
        combined = jax.tree.map(lambda u: u * _mass(b1, count, u), combination)

        def moment(s: jax.Array, new: jax.Array, old: jax.Array) -> Any:
            decay = jnp.asarray(b1, new.dtype)
            pseudo = jnp.abs((new - decay * old) / (1 - decay))
            decay = jnp.asarray(b2, s.dtype)
            return decay * s + (1 - decay) * jnp.square(pseudo)

        second = jax.tree.map(moment, state.second_moment, combined, state.combined)

        def scaled(u: jax.Array, s: jax.Array, g: jax.Array) -> jax.Array:
            u = u / (jnp.sqrt(s / _mass(b2, count, s)) + jnp.asarray(eps, s.dtype))
            return jnp.where(every | ~ok, u, 0).astype(g.dtype)

        after = (combined, second, count)
        before = (state.combined, state.second_moment, state.num_combined)
        return jax.tree.map(scaled, combination, second, updates), MomentaState(
            momenta,
            num_seen,
            *select(ok & every, after, before),
            inner=select(every | ~ok, inner, state.inner),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide(x: Any) -> Any:
    dtype = jnp.result_type(x)
    return dtype if dtype.itemsize >= 4 else jnp.float32


def _place(loss: Any, losses: PyTree, names: Sequence[str]) -> Any:
    """The place of a loss among all of them; a tracer is one."""
    if isinstance(loss, jax.core.Tracer):
        if loss.shape or not jnp.issubdtype(loss.dtype, jnp.integer):
            raise TypeError(
                f"loss must be an integer scalar, got {loss.dtype}{loss.shape}."
            )
        return loss
    if hasattr(loss, "dtype") and hasattr(loss, "__index__"):
        place = operator.index(loss)
        if not -len(names) <= place < len(names):
            raise ValueError(f"loss {place} is out of range for {len(names)} losses.")
        return place % len(names)
    return find_loss("loss", loss, losses)


def _check_shapes(updates: Params, like: Params) -> None:
    """Checks that a gradient is that of one loss, and not stacked."""
    wanted = jax.tree.leaves_with_path(like)
    for (path, x), g in zip(wanted, jax.tree.leaves(updates), strict=False):
        if jnp.shape(g) != x.shape:
            raise ValueError(
                "aggregate_momenta takes the gradient of one loss, of the shape of the "
                f"parameters: updates{jax.tree_util.keystr(path)} must have shape "
                f"{x.shape}, got {jnp.shape(g)}."
            )


def _mass(decay: Any, count: jax.Array, like: jax.Array) -> jax.Array:
    """What a running mean from zero has of a constant after so many steps."""
    dtype = like.real.dtype
    mass = 1 - jnp.power(jnp.asarray(decay, dtype), count.astype(dtype))
    return mass.reshape(count.shape + (1,) * (like.ndim - 1)) if count.ndim else mass
