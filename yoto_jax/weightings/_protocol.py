"""What a loss weighting is, and the shell that every one of them shares."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from yoto_jax._loss_logits import (
    PyTree,
    check_structure,
    find_loss,
    listed,
    loss_names,
    scalar_losses,
)
from yoto_jax._serialization import serializable_state

GRADIENT_STATISTICS = ("gramian", "norms", "max_abs", "mean_abs")
"""What :func:`yoto_jax.value_and_grad` can tell of per-loss gradients, see there."""


class LossWeighting(NamedTuple):
    """A rule that turns what losses, and their gradients, say into loss weights.

    A pair of pure functions, like ``optax.GradientTransformation``. The functions of
    :mod:`yoto_jax.weightings` make them; :func:`yoto_jax.value_and_grad` and
    :func:`yoto_jax.aggregate` use them; both can be called by hand as well.

    Attributes:
      init: ``init(losses) -> state``, from a tree of scalar losses or anything of their
        shape and dtype.
      update: ``update(losses, state, **statistics) -> (weights, state)``. The weights
        are a tree like the losses. The statistics are those that ``needs`` names, such
        as ``gramian=G`` with G in the order of ``jax.tree.leaves(losses)``.
      needs: What ``update`` looks at: ``"losses"``, and statistics of the gradients.
        ``"gramian"`` (K, K) inner products of per-loss gradients; ``"norms"``,
        ``"max_abs"``, ``"mean_abs"`` (K,) Euclidean norm, largest and mean absolute
        entry of each; ``"alignment"`` (K,) inner products with the gradient of the
        downstream loss. Any other name is the caller's to provide.
      downstream: The loss that steers the weights without a weight of its own, or None.
      due: ``due(state) -> bool``: whether the next update looks at the statistics, so
        that they need not be computed if it does not. None if it always does.
      observe: ``observe(state, *, cotangent_norm, gradient_norm) -> state``: shown the
        norm of the weighted gradient of the shared representation, and that of the
        encoder's parameters which it became. None if of no interest.
      observe_step: ``observe_step(losses, state) -> state``: shown the losses of the
        same batch after the step. To be called by the user. None if of no interest.

    Examples:
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.scale_invariant()
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> state = weighting.init(losses)
      >>> weights, state = weighting.update(losses, state)
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.25, 'depth': 2.0}
    """

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[PyTree, Any]]
    needs: tuple[str, ...] = ("losses",)
    downstream: str | int | None = None
    due: Callable[[Any], jax.Array] | None = None
    observe: Callable[..., Any] | None = None
    observe_step: Callable[[PyTree, Any], Any] | None = None


@serializable_state
class WeightingState(NamedTuple):
    """State of a weighting; ``optax.tree.get`` finds the fields by their names."""

    loss_weights: PyTree  # scalars, a tree like the losses: the weights used last
    learned: Any  # what the method itself remembers
    num_updates: jax.Array  # int32 scalar
    num_skipped: jax.Array  # int32 scalar, batches that changed nothing: not finite


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is known of the losses before they have values (all static)."""

    structure: jax.tree_util.PyTreeDef
    dtype: Any

    @property
    def size(self) -> int:
        """The number of losses, K."""
        return self.structure.num_leaves

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every loss, in the order of the leaves."""
        return loss_names(self.structure)

    def position(self, role: str, chosen: Any) -> int:
        """Place of the loss that ``chosen`` names among the leaves."""
        tree = self.structure.unflatten(range(self.size))
        return find_loss(role, chosen, tree, self.names)

    def apart(self, downstream: Any) -> tuple[int, np.ndarray]:
        """Place of the loss that steers, and those of the others."""
        place = self.position("downstream", downstream)
        return place, np.delete(np.arange(self.size), place)

    def check_others(self, method: str) -> None:
        """Raise unless there is a loss besides the downstream one."""
        if self.size < 2:
            raise ValueError(
                f"{method} needs a loss to weigh besides the downstream one, got "
                f"{listed(self.names)} alone."
            )

    def full(self, value: Any) -> jax.Array:
        """A vector with one entry per loss."""
        return jnp.full((self.size,), value, self.dtype)

    def equal(self) -> jax.Array:
        """The same share 1/K for every loss."""
        return self.full(1.0 / self.size)

    def vector(self, what: str, values: Any) -> jax.Array:
        """One number, a sequence, or a tree like the losses, as a (K,) vector."""
        if self.holds_scalars(values):
            values = jnp.stack([jnp.asarray(v) for v in jax.tree.leaves(values)])
        elif isinstance(values, list | tuple):
            values = jnp.stack([jnp.asarray(v) for v in values])
        elif isinstance(values, dict):
            raise ValueError(
                f"{what} must be one number, or one for each loss "
                f"({listed(self.names)}), got {values!r}."
            )
        values = jnp.asarray(values, self.dtype)
        if values.shape not in ((), (self.size,)):
            raise ValueError(
                f"{what} must be one number, or one for each loss "
                f"({listed(self.names)}), got shape {values.shape}."
            )
        return jnp.broadcast_to(values, (self.size,))

    def holds_scalars(self, values: Any) -> bool:
        """Whether this is a tree like the losses, with a scalar for each."""
        alike = jax.tree.structure(values) == self.structure
        return alike and not any(jnp.ndim(v) for v in jax.tree.leaves(values))

    def preference(self, preference: PyTree) -> jax.Array:
        """What the user prefers, as a vector: equal shares unless told."""
        if preference is None:
            return self.equal()
        return self.vector("preference", preference)


def make_weighting(
    init: Callable[[Layout], Any],
    update: Callable[..., tuple[jax.Array, Any]],
    *,
    needs: Sequence[str] = ("losses",),
    positive: bool = False,
    first_weights: Callable[[Layout], jax.Array] | float = 1.0,
    downstream: str | int | None = None,
    observe: Callable[..., Any] | None = None,
    observe_step: Callable[..., Any] | None = None,
) -> LossWeighting:
    """A :class:`LossWeighting` from the arithmetic of a method on vectors.

    It stacks and unstacks the losses, checks them, brings all numbers to one dtype, and
    leaves weights and state as they were if a loss or a statistic is not finite, or if
    what the method makes of them is not.

    Args:
      init: ``init(layout) -> learned``, the method's own state: a tree of arrays.
      update: ``update(losses, learned, layout, **statistics) -> (weights, learned)``
        with vectors (K,) of losses and weights and the statistics named in ``needs``.
      needs: See :class:`LossWeighting`.
      positive: Whether the method makes sense for positive losses alone.
      first_weights: The weights to report before the first update, and to hold if it is
        not finite: one number or ``first_weights(layout) -> (K,)``.
      downstream: See :class:`LossWeighting`.
      observe: ``observe(learned, layout, *, cotangent_norm, gradient_norm)``.
      observe_step: ``observe_step(losses, learned, layout) -> learned``.

    Returns:
      The weighting.
    """
    statistics_needed = tuple(name for name in needs if name != "losses")

    def init_fn(losses: PyTree) -> WeightingState:
        layout = _layout(losses)
        # Copies: what the caller gave must outlive a state that is donated.
        learned = jax.tree.map(jnp.copy, init(layout))
        first = first_weights(layout) if callable(first_weights) else first_weights
        weights = layout.vector("loss_weights", first)
        counts = [jnp.zeros((), jnp.int32) for _ in range(2)]  # apart, for donation
        return WeightingState(_as_tree(weights, layout), learned, *counts)

    def update_fn(
        losses: PyTree, state: WeightingState, **statistics: Any
    ) -> tuple[PyTree, WeightingState]:
        layout, values = _values(losses, state)
        if positive:
            _check_positive_losses(values, layout)
        given = {
            name: _statistic(name, statistics.get(name), layout)
            for name in statistics_needed
        }
        ok = all_finite((values, given))
        if positive:
            ok &= jnp.all(values > 0)
        weights, learned = update(values, state.learned, layout, **given)
        return _accept(ok, weights, learned, state, layout)

    def observe_fn(
        state: WeightingState, *, cotangent_norm: Any, gradient_norm: Any
    ) -> WeightingState:
        assert observe is not None
        layout = _layout_of(state)
        seen = {"cotangent_norm": cotangent_norm, "gradient_norm": gradient_norm}
        seen = {
            k: lax.stop_gradient(jnp.asarray(v, layout.dtype)) for k, v in seen.items()
        }
        learned = observe(state.learned, layout, **seen)
        return state._replace(
            learned=_select(all_finite((seen, learned)), learned, state.learned)
        )

    def observe_step_fn(losses: PyTree, state: WeightingState) -> WeightingState:
        assert observe_step is not None
        layout, values = _values(losses, state)
        learned = observe_step(values, state.learned, layout)
        ok = all_finite((values, learned))
        if positive:
            ok &= jnp.all(values > 0)
        return state._replace(learned=_select(ok, learned, state.learned))

    return LossWeighting(
        init_fn,
        update_fn,
        tuple(needs),
        downstream=downstream,
        observe=observe_fn if observe else None,
        observe_step=observe_step_fn if observe_step else None,
    )


def _layout(losses: PyTree) -> Layout:
    _, leaves, structure = scalar_losses(losses)
    if not leaves:
        raise ValueError("losses has no leaves: there is nothing to weigh.")
    typed = [leaf for leaf in leaves if not isinstance(leaf, float)]
    dtypes = [jax.dtypes.result_type(leaf) for leaf in typed or leaves]
    wide = jnp.float64 in dtypes
    return Layout(structure, jnp.dtype(jnp.float64 if wide else jnp.float32))


def _layout_of(state: WeightingState) -> Layout:
    leaves, structure = jax.tree.flatten(state.loss_weights)
    return Layout(structure, leaves[0].dtype)


def _values(losses: PyTree, state: WeightingState) -> tuple[Layout, jax.Array]:
    """The losses as one vector, checked against those of ``init``."""
    layout = _layout_of(state)
    _, leaves, structure = scalar_losses(losses)
    check_structure(structure, layout.structure, "the loss weights")
    return layout, jnp.stack([_constant(leaf, layout.dtype) for leaf in leaves])


def _statistic(name: str, value: Any, layout: Layout) -> jax.Array:
    if value is None:
        raise ValueError(
            f"this weighting needs {name}=: use it in value_and_grad or aggregate"
            + (
                ", "
                if name in (*GRADIENT_STATISTICS, "alignment")
                else " with statistics=, "
            )
            + f"or call update(losses, state, {name}=...)."
        )
    if layout.holds_scalars(value):
        value = layout.vector(name, value)
    value = _constant(value, layout.dtype)
    shape = (layout.size,) * (2 if name == "gramian" else 1)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} for the {layout.size} losses "
            f"{listed(layout.names)}, got {value.shape}."
        )
    return value


def _check_positive_losses(values: jax.Array, layout: Layout) -> None:
    """Raise outside ``jit``. Inside, the batch is skipped and counted, no more.

    A check of ``checkify`` would be an effect: it makes calls of a compiled step ten
    times as slow, and keeps ``jax.export`` from writing it.
    """
    if isinstance(values, jax.core.Tracer):
        return
    bad = jnp.isfinite(values) & (values <= 0)
    for name, value, is_bad in zip(layout.names, values, bad, strict=True):
        if is_bad:
            raise ValueError(
                f"this weighting needs positive losses, loss {name!r} is {value:.4g}. "
                "Shift it, or choose a weighting for losses of any sign."
            )


def _accept(
    ok: jax.Array, weights: Any, learned: Any, state: WeightingState, layout: Layout
) -> tuple[PyTree, WeightingState]:
    """The new weights and state, or the old ones if anything is amiss."""
    weights = jnp.asarray(weights, layout.dtype)
    ok &= all_finite((weights, learned))
    new = WeightingState(
        _as_tree(weights, layout), learned, state.num_updates + 1, state.num_skipped
    )
    old = state._replace(num_skipped=state.num_skipped + 1)
    chosen = _select(ok, new, old)
    return chosen.loss_weights, chosen


def _as_tree(weights: jax.Array, layout: Layout) -> PyTree:
    return layout.structure.unflatten([weights[k] for k in range(layout.size)])


def all_finite(tree: PyTree) -> jax.Array:
    """Whether all floating-point numbers of a tree are finite."""
    leaves = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, leaves, jnp.asarray(True))


def _select(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``ok`` else ``old``, in the dtypes of ``old``."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ok, new if _is_key(old) else new.astype(old.dtype), old)

    return jax.tree.map(select, new, old)


def _constant(x: Any, dtype: Any) -> jax.Array:
    return lax.stop_gradient(jnp.asarray(x, dtype))


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_positive(**values: Any) -> None:
    """Raise unless these hyperparameters are positive, as far as that is known."""
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


def check_not_negative(**values: Any) -> None:
    """Raise if one of these hyperparameters is negative, as far as that is known."""
    for name, value in values.items():
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def check_decay(**values: Any) -> None:
    """Raise unless these decays are in [0, 1), as far as that is known."""
    for name, value in values.items():
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")


def as_key(key: Any) -> jax.Array:
    """A typed key from a typed key or a seed."""
    if hasattr(key, "dtype") and _is_key(key):
        return key
    if hasattr(key, "__index__") and not isinstance(key, bool):
        return jax.random.key(operator.index(key))
    raise TypeError(f"key must be jax.random.key(...) or an integer seed, got {key!r}.")


def running_mean(
    mean: jax.Array, x: jax.Array, count: jax.Array, warmup: Any, decay: Any
) -> jax.Array:
    """The first as it is; the plain mean of all during the warmup; then with decay."""
    number = count.astype(x.dtype)
    early = (count == 0) | (count < warmup)
    return jnp.where(
        early, (mean * number + x) / (number + 1), decay * mean + (1 - decay) * x
    )


def descend(
    tx: optax.GradientTransformation, gradient: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """One step of an optimizer: the new parameters and its new state."""
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state
