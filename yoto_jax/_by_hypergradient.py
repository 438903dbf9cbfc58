"""A learned factor of the updates of any optimizer: hypergradient descent."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import (
    check_flag,
    check_hyperparameter,
    check_rate,
    check_transformation,
)
from yoto_jax._choice_logits import is_hyperparameter
from yoto_jax._losses import Params, PyTree, State
from yoto_jax._numerics import all_finite, float_type, select, upcast
from yoto_jax._serialization import serializable_state
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits


@serializable_state
class HypergradientState(NamedTuple):
    """State of :func:`by_hypergradient`."""

    log_scale: jax.Array  # float32 scalar, log of the factor of the updates
    num_skipped: jax.Array  # int32 scalar, steps that were not finite
    direction: Params  # the update before, its largest entry 1; 0 of what is left out
    inner: Any


def by_hypergradient(
    inner: optax.GradientTransformation,
    rate: jax.typing.ArrayLike = 0.03,
    *,
    bound: jax.typing.ArrayLike = 1e3,
    scale_logits: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of an optimizer by a factor learned during training.

    .. math::
      \log s_t = \log s_{t-1} - \beta \cos(g_t, u_{t-1}), \qquad
      u_t = s_t \cdot \mathrm{inner}(g_t), \qquad s_0 = 1,

    for the gradient :math:`g_t` and the update before :math:`u_{t-1}`. While the loss
    goes on falling along that update, the factor grows; where the update went too far,
    it shrinks. The cosine has no unit, so the rate has none.

    Args:
      inner: Any transformation that makes updates, its learning rate included.
      rate: :math:`\beta`, how far the log of the factor moves in a step at most.
      bound: The factor stays between 1 / bound and bound (larger than 1, no unit).
      scale_logits: Whether logits, of losses and choices, count and are scaled, too. By
        default they pass as ``inner`` made them: that a composite loss falls because
        weight moves to a smaller one says nothing of the learning rate of the model.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` that hands its keywords to ``inner``.
      Where a gradient or an update is not finite, the factor stays and ``num_skipped``
      goes up by 1; what the update is, ``inner`` decides.

    Raises:
      TypeError: ``inner`` is no transformation, or an argument is of another kind.
      ValueError: ``rate`` is negative or not finite, or ``bound`` not larger than 1.

    Examples:
      >>> import jax.numpy as jnp, optax, yoto_jax as yoto
      >>> tx = yoto.by_hypergradient(optax.sgd(1e-3), 0.1)  # far too small a rate
      >>> w = jnp.float32(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(60):
      ...     updates, state = tx.update(2 * w, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{jnp.exp(state.log_scale):.0f} {abs(w):.3f}")
      365 0.000

    References:
      Baydin et al., `Hypergradient descent <https://arxiv.org/abs/1703.04782>`_, 2018.

    .. warning::
      Experimental. The paper adds :math:`-\beta\, g_t \cdot \partial u_{t-1} / \partial
      \alpha` to the learning rate itself; here its cosine moves the logarithm.
    """
    check_transformation(inner=inner)
    if callable(rate):
        raise TypeError(f"rate must be a number or a scalar array, got {rate!r}.")
    check_rate("rate", rate)
    check_hyperparameter("bound", bound, lambda x: x > 1, "be larger than 1")
    check_flag(scale_logits=scale_logits)
    inner = optax.with_extra_args_support(inner)
    part = functools.partial(_part, scale_logits=scale_logits)

    def init_fn(params: Params) -> HypergradientState:
        learned = part(params)
        return HypergradientState(
            jnp.zeros((), float_type(jax.tree.leaves(learned))),
            jnp.zeros((), jnp.int32),
            optax.tree.zeros_like(params),
            inner.init(params),
        )

    def update_fn(
        updates: Params, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, HypergradientState]:
        gradient = part(updates)
        before = part(state.direction)
        cosine = _cosine(_brought_to_1(gradient), before)
        made, inner_state = inner.update(updates, state.inner, params, **extra_args)
        direction = _brought_to_1(part(made))
        ok = jnp.isfinite(cosine) & all_finite(_reals(direction))
        limit = jnp.log(jnp.asarray(bound, state.log_scale.dtype))
        moved = jnp.clip(state.log_scale - rate * cosine, -limit, limit)
        log_scale = jnp.where(ok, moved.astype(state.log_scale.dtype), state.log_scale)
        skipped = state.num_skipped + (~ok).astype(jnp.int32)
        direction = optax.tree.cast_like(direction, before)
        direction = jax.tree.map(
            lambda old, new: old if new is None else new,
            state.direction,
            select(ok, direction, before),
            is_leaf=is_hyperparameter,
        )
        scale = jnp.exp(log_scale)
        made = jax.tree.map(
            lambda x: x if _is_left(x, scale_logits) else _scaled(scale, x),
            made,
            is_leaf=is_hyperparameter,
        )
        return made, HypergradientState(log_scale, skipped, direction, inner_state)

    return unwrap_loss_logits(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _is_left(x: Any, scale_logits: bool) -> bool:
    """Whether a leaf or logits neither count nor are scaled."""
    if is_hyperparameter(x):
        return not scale_logits
    if getattr(x, "dtype", None) == jax.dtypes.float0:
        return True
    return not jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _part(tree: PyTree, scale_logits: bool) -> PyTree:
    """What counts, with None in the places of the rest."""
    return jax.tree.map(
        lambda x: None if _is_left(x, scale_logits) else x,
        tree,
        is_leaf=is_hyperparameter,
    )


def _scaled(scale: jax.Array, tree: PyTree) -> PyTree:
    """Leaves times a factor, in their dtype."""
    return jax.tree.map(lambda x: (scale * _wide(x)).astype(x.dtype), tree)


def _wide(x: jax.Array) -> jax.Array:
    return x if jnp.iscomplexobj(x) else upcast(x)


def _reals(tree: PyTree) -> list[jax.Array]:
    """The leaves as real numbers: complex ones as two arrays."""
    split = lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    return [upcast(real) for x in jax.tree.leaves(tree) for real in split(x)]


def _brought_to_1(tree: PyTree) -> PyTree:
    """A tree divided by its largest entry: no square of it overflows or vanishes."""
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in _reals(tree)]
    largest = functools.reduce(jnp.maximum, sizes, jnp.float32(0))
    divisor = jnp.where(largest == 0, 1, largest)
    return jax.tree.map(lambda x: _wide(x) / divisor, tree)


def _cosine(x: PyTree, y: PyTree) -> jax.Array:
    """Cosine of two trees whose largest entry is 1; 0 if one of them is 0."""
    pairs = list(zip(_reals(x), _reals(y), strict=True))
    zero = jnp.float32(0)
    product = sum((jnp.sum(a * b) for a, b in pairs), zero)
    of_x = sum((jnp.sum(a * a) for a, _ in pairs), zero)
    of_y = sum((jnp.sum(b * b) for _, b in pairs), zero)
    length = jnp.sqrt(of_x) * jnp.sqrt(of_y)
    return jnp.where(length == 0, 0, product / jnp.where(length == 0, 1, length))
