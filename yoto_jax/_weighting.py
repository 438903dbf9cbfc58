"""What a loss weighting is, and the shell that every one of them shares."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._checks import is_key
from yoto_jax._losses import (
    PyTree,
    check_structure,
    find_loss,
    listed,
    loss_names,
    scalar_losses,
    split,
    stack_present,
)
from yoto_jax._numerics import all_finite, float_type, where_rows
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
        as ``gramian=G`` with G in the order of ``jax.tree.leaves(losses)``. With
        ``present=``, a tree of booleans like the losses, absent losses get the weight 0
        and leave no trace in the state; the others are weighed as if alone.
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
        same batch after the step, and ``present=`` as ``update`` is. To be called by
        the user. None if of no interest.

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
    inner: Any  # what the method itself remembers
    num_updates: jax.Array  # int32 scalar, batches with a loss present that was taken
    num_skipped: jax.Array  # int32 scalar, batches that changed nothing: not finite


@dataclasses.dataclass(frozen=True, eq=False)
class LossSpec:
    """What is known of the losses before they have values.

    Reductions over losses go through it: they leave out the losses that are absent.
    """

    structure: jax.tree_util.PyTreeDef
    dtype: Any
    present: jax.Array | None = None  # bool (K,), or None if all losses are there

    @property
    def size(self) -> int:
        """The number of losses, K."""
        return self.structure.num_leaves

    @property
    def count(self) -> Any:
        """The number of losses that are present, at least 1."""
        if self.present is None:
            return self.size
        return jnp.maximum(jnp.sum(self.present, dtype=self.dtype), 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every loss, in the order of the leaves."""
        return loss_names(self.structure)

    @property
    def presence(self) -> PyTree | None:
        """The tree of booleans that ``present`` came from."""
        return None if self.present is None else split(self.present, self.structure)

    def of_present(self, x: jax.Array, other: Any = 0) -> jax.Array:
        """``x``, one entry or row per loss, with ``other`` for absent losses."""
        return x if self.present is None else where_rows(self.present, x, other)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the losses."""
        return jnp.sum(self.of_present(x))

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean over the losses."""
        return jnp.mean(x) if self.present is None else self.sum(x) / self.count

    def log_softmax(self, x: jax.Array) -> jax.Array:
        """Logarithm of the softmax over the losses."""
        if self.present is None:
            return jax.nn.log_softmax(x)
        # Without any loss, that of zeros instead of NaN.
        some = jnp.any(self.present)
        return jax.nn.log_softmax(jnp.where(some, self.of_present(x, -jnp.inf), 0))

    def softmax(self, x: jax.Array) -> jax.Array:
        """The softmax over the losses, 0 for absent ones."""
        if self.present is None:
            return jax.nn.softmax(x)
        return self.of_present(jnp.exp(self.log_softmax(x)))

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
        """The same share for every loss, 1/K if all are present."""
        return self.of_present(self.full(1.0 / self.count))

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
        return self.of_present(self.vector("preference", preference))


def make_weighting(
    init: Callable[[LossSpec], Any],
    update: Callable[..., tuple[jax.Array, Any]],
    *,
    needs: Sequence[str] = ("losses",),
    positive: bool = False,
    first_weights: Callable[[LossSpec], jax.Array] | float = 1.0,
    downstream: str | int | None = None,
    observe: Callable[..., Any] | None = None,
    observe_step: Callable[..., Any] | None = None,
) -> LossWeighting:
    """A :class:`LossWeighting` from the arithmetic of a method on vectors.

    It stacks and unstacks the losses, checks them, brings all numbers to one dtype, and
    leaves weights and state as they were if a loss or a statistic is not finite, or if
    what the method makes of them is not. Of absent losses it shows the method a loss of
    1 and a gradient of 0, makes their weight 0, and holds their rows of the state.

    Args:
      init: ``init(spec) -> inner``, the method's own state: a tree of arrays. An
        array whose first axis has length K has one row per loss.
      update: ``update(losses, inner, spec, **statistics) -> (weights, inner)``
        with vectors (K,) of losses and weights and the statistics named in ``needs``.
        Sums over losses are those of ``spec``, which leaves out absent ones.
      needs: See :class:`LossWeighting`.
      positive: Whether the method makes sense for positive losses alone.
      first_weights: The weights to report before the first update, and to hold if it is
        not finite: one number or ``first_weights(spec) -> (K,)``.
      downstream: See :class:`LossWeighting`.
      observe: ``observe(inner, spec, *, cotangent_norm, gradient_norm)``.
      observe_step: ``observe_step(losses, inner, spec) -> inner``.

    Returns:
      The weighting.
    """
    statistics_needed = tuple(name for name in needs if name != "losses")

    check = _state_check(init)

    def init_fn(losses: PyTree) -> WeightingState:
        spec = _spec(losses)
        # Copies: what the caller gave must outlive a state that is donated.
        inner = jax.tree.map(jnp.copy, init(spec))
        first = first_weights(spec) if callable(first_weights) else first_weights
        weights = spec.vector("loss_weights", first)
        counts = [jnp.zeros((), jnp.int32) for _ in range(2)]  # apart, for donation
        return WeightingState(split(weights, spec.structure), inner, *counts)

    def update_fn(
        losses: PyTree,
        state: WeightingState,
        *,
        present: PyTree | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, WeightingState]:
        check(state)
        spec, values = _values(losses, state, present)
        if positive:
            _check_positive_losses(values, spec)
        given = {
            name: _statistic(name, statistics.get(name), spec)
            for name in statistics_needed
        }
        ok = all_finite((values, given))
        if positive:
            ok &= jnp.all(values > 0)
        weights, inner = update(values, state.inner, spec, **given)
        return _accept(ok, weights, inner, state, spec)

    def observe_fn(
        state: WeightingState, *, cotangent_norm: Any, gradient_norm: Any
    ) -> WeightingState:
        assert observe is not None
        spec = _spec_of(state)
        seen = {"cotangent_norm": cotangent_norm, "gradient_norm": gradient_norm}
        seen = {
            k: lax.stop_gradient(jnp.asarray(v, spec.dtype)) for k, v in seen.items()
        }
        inner = observe(state.inner, spec, **seen)
        return state._replace(
            inner=_select(all_finite((seen, inner)), inner, state.inner)
        )

    def observe_step_fn(
        losses: PyTree, state: WeightingState, *, present: PyTree | None = None
    ) -> WeightingState:
        assert observe_step is not None
        spec, values = _values(losses, state, present)
        inner = observe_step(values, state.inner, spec)
        inner = _hold_absent(inner, state.inner, spec)
        ok = all_finite((values, inner))
        if positive:
            ok &= jnp.all(values > 0)
        return state._replace(inner=_select(ok, inner, state.inner))

    return LossWeighting(
        init_fn,
        update_fn,
        tuple(needs),
        downstream=downstream,
        observe=observe_fn if observe else None,
        observe_step=observe_step_fn if observe_step else None,
    )


def check_state(state: Any, kind: type) -> None:
    """Raise unless the state is of this kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init of this weighting returns, "
            f"got {type(state).__name__}."
        )


def _state_check(init: Callable[[LossSpec], Any]) -> Callable[[Any], None]:
    """A function that raises unless this ``init`` made a state."""

    @functools.lru_cache(maxsize=16)
    def expected(structure: Any, dtype: Any) -> Any:
        shapes = jax.eval_shape(lambda: init(LossSpec(structure, dtype)))
        return jax.tree.structure(shapes)

    def check(state: Any) -> None:
        check_state(state, WeightingState)
        spec = _spec_of(state)
        wanted = expected(spec.structure, spec.dtype)
        if jax.tree.structure(state.inner) != wanted:
            raise TypeError(
                "state is that of another weighting: expected "
                f"{wanted} in its field inner, got "
                f"{jax.tree.structure(state.inner)}. Take it from the init of the "
                "weighting that is updated."
            )

    return check


def _spec(losses: PyTree) -> LossSpec:
    _, leaves, structure = scalar_losses(losses)
    if not leaves:
        raise ValueError("losses has no leaves: there is nothing to weigh.")
    return LossSpec(structure, jnp.dtype(float_type(leaves)))


def _spec_of(state: WeightingState) -> LossSpec:
    leaves, structure = jax.tree.flatten(state.loss_weights)
    return LossSpec(structure, leaves[0].dtype)


def _values(
    losses: PyTree, state: WeightingState, present: PyTree | None
) -> tuple[LossSpec, jax.Array]:
    """The losses as one vector, checked against those of ``init``, absent ones 1."""
    spec = _spec_of(state)
    _, leaves, structure = scalar_losses(losses)
    check_structure(structure, spec.structure, "the loss weights")
    values = jnp.stack([_constant(leaf, spec.dtype) for leaf in leaves])
    mask = stack_present(present, spec.structure)
    spec = dataclasses.replace(spec, present=mask)
    return spec, spec.of_present(values, 1)


def _statistic(name: str, value: Any, spec: LossSpec) -> jax.Array:
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
    if spec.holds_scalars(value):
        value = spec.vector(name, value)
    value = _constant(value, spec.dtype)
    shape = (spec.size,) * (2 if name == "gramian" else 1)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} for the {spec.size} losses "
            f"{listed(spec.names)}, got {value.shape}."
        )
    return value if spec.present is None else without_absent(value, spec.present)


def _check_positive_losses(values: jax.Array, spec: LossSpec) -> None:
    refuse_losses(
        values <= 0,
        values,
        spec,
        "positive losses",
        "Shift it, or choose a weighting for losses of any sign.",
    )


def refuse_losses(
    bad: jax.Array, values: jax.Array, spec: LossSpec, needs: str, remedy: str
) -> None:
    """Raise outside ``jit``. Inside, the batch is skipped and counted, no more.

    A check of ``checkify`` would be an effect: it makes calls of a compiled step ten
    times as slow, and keeps ``jax.export`` from writing it.
    """
    bad = spec.of_present(bad & jnp.isfinite(values), False)
    if isinstance(bad, jax.core.Tracer):
        return
    for name, value, is_bad in zip(spec.names, values, bad, strict=True):
        if is_bad:
            raise ValueError(
                f"this weighting needs {needs}, loss {name!r} is {value:.4g}. {remedy}"
            )


def _accept(
    ok: jax.Array, weights: Any, inner: Any, state: WeightingState, spec: LossSpec
) -> tuple[PyTree, WeightingState]:
    """The new weights and state, or the old ones if anything is amiss."""
    weights = jnp.asarray(weights, spec.dtype)
    inner = _hold_absent(inner, state.inner, spec)
    some = jnp.ones((), jnp.bool_) if spec.present is None else jnp.any(spec.present)
    one = some.astype(jnp.int32)
    if spec.present is not None:
        before = jnp.stack(jax.tree.leaves(state.loss_weights))
        weights = spec.of_present(weights, before)
        inner = _select(some, inner, state.inner)
    ok &= all_finite((weights, inner))
    new = WeightingState(
        split(weights, spec.structure),
        inner,
        state.num_updates + one,
        state.num_skipped,
    )
    old = state._replace(num_skipped=state.num_skipped + one)
    chosen = _select(ok, new, old)
    return mask_weights(chosen.loss_weights, spec.present), chosen


def _hold_absent(new: PyTree, old: PyTree, spec: LossSpec) -> PyTree:
    """The new state, with the old rows of absent losses."""
    if spec.present is None:
        return new

    def hold(new: jax.Array, old: jax.Array) -> jax.Array:
        one_row_each = old.shape[:1] == (spec.size,) and not is_key(old)
        return spec.of_present(new, old) if one_row_each else new

    return jax.tree.map(hold, new, old)


def mask_weights(weights: PyTree, present: jax.Array | None) -> PyTree:
    """The weights, 0 for absent losses."""
    if present is None:
        return weights
    leaves, structure = jax.tree.flatten(weights)
    masked = [jnp.where(present[k], x, 0) for k, x in enumerate(leaves)]
    return structure.unflatten(masked)


def without_absent(statistic: Any, present: jax.Array) -> Any:
    """A statistic of K losses, 0 for absent ones, whatever stands there."""
    if jnp.ndim(jax.tree.leaves(statistic)[0]) == 0:  # a tree like the losses
        return mask_weights(statistic, present)
    statistic = where_rows(present, statistic, 0)
    return where_rows(present, statistic.T, 0).T if statistic.ndim > 1 else statistic


def and_present(
    weighting: LossWeighting, statistics: dict[str, Any], present: PyTree | None
) -> dict[str, Any]:
    """Keywords for ``update``: a weighting without absent losses needs no such one.

    Raises if it would take ``present=`` for something else.
    """
    if present is None:
        return statistics
    if "present" not in inspect.signature(weighting.update).parameters:
        raise TypeError(
            "this weighting does not know of absent losses: its update must take "
            "present=, a tree of booleans like the losses."
        )
    return statistics | {"present": present}


def _select(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``ok`` else ``old``, in the dtypes of ``old``."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(ok, new if is_key(old) else new.astype(old.dtype), old)

    return jax.tree.map(select, new, old)


def _constant(x: Any, dtype: Any) -> jax.Array:
    return lax.stop_gradient(jnp.asarray(x, dtype))
