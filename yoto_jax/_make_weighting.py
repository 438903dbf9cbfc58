"""The one way to write a weighting: the arithmetic of a method, on vectors."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._checks import is_key
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import (
    Losses,
    Present,
    PyTree,
    State,
    listed,
    loss_vector,
    scalar_losses,
    split,
    stack_present,
)
from yoto_jax._numerics import all_finite, float_type, select
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    MATRICES,
    LossWeighting,
    WeightingState,
    check_state,
    mask_weights,
    without_absent,
)

RESERVED = frozenset(("loss_weights", "num_updates", "num_skipped"))
"""Fields that states are searched for by name: weights are in them by loss."""


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
    r"""Makes a weighting from a method's arithmetic on vectors of K losses.

    .. math::
      (L, s, G) \mapsto (w, s'), \qquad
      (w, s) \text{ as they were if anything is not finite.}

    It brings what all weightings share: checks of losses and statistics, one dtype, two
    counters, and the guard above. To the method an absent loss is 1 and its gradient 0;
    its weight becomes 0, and its rows of the state stay as they are.

    Args:
      init: ``init(spec) -> inner``, the state of the method: a tree of arrays. An array
        whose first axis has length K has one row per loss.
      update: ``update(losses, inner, spec, **statistics) -> (weights, inner)`` with
        losses and weights (K,), and the statistics that ``needs`` names. Sums over the
        losses are those of the :class:`LossSpec`, which leaves out absent ones.
      needs: See :class:`LossWeighting`. Of a name of your own the value is (K,),
        of ``"cross_gramian"`` (K, K).
      positive: Whether all losses must be positive.
      first_weights: What is reported before the first update, and held if that is not
        finite: one number, or ``first_weights(spec) -> (K,)``.
      downstream: See :class:`LossWeighting`.
      observe: ``observe(inner, spec, *, cotangent_norm, gradient_norm) -> inner``.
      observe_step: ``observe_step(losses, inner, spec) -> inner``.

    Returns:
      A :class:`LossWeighting`; its state is a :class:`WeightingState`.

    Raises:
      ValueError: In ``init``: there are no losses. In ``update``: losses or statistics
        that do not fit them; outside ``jit``, a loss that is not positive but must be.
      TypeError: In ``update``: the state of another weighting.

    Examples:
      >>> import yoto_jax as yoto
      >>> def inverse(losses, inner, spec):
      ...     return 1 / losses / spec.sum(1 / losses), inner
      >>> weighting = yoto.make_weighting(lambda spec: (), inverse, positive=True)
      >>> losses = {"camera": 4.0, "depth": 1.0}
      >>> weights, _ = weighting.update(losses, weighting.init(losses))
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'camera': 0.2, 'depth': 0.8}
    """
    if isinstance(needs, str):
        raise TypeError(f"needs must be a tuple of names, such as ({needs!r},).")
    statistics_needed = tuple(name for name in needs if name != "losses")
    check = _state_check(init)

    def init_fn(losses: Losses) -> WeightingState:
        spec = _spec(losses)
        # Copies: what the caller gave must outlive a state that is donated.
        inner = jax.tree.map(_copy, init(spec))
        first = first_weights(spec) if callable(first_weights) else first_weights
        weights = spec.vector("loss_weights", first)
        counts = [jnp.zeros((), jnp.int32) for _ in range(2)]  # apart, for donation
        return WeightingState(split(weights, spec.structure), inner, *counts)

    def update_fn(
        losses: Losses,
        state: WeightingState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, WeightingState]:
        shapes = check(state)
        spec, values = loss_values(losses, state, present)
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
        _check_returned(weights, inner, shapes, spec)
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
        losses: Losses, state: WeightingState, *, present: Present | None = None
    ) -> WeightingState:
        assert observe_step is not None
        spec, values = loss_values(losses, state, present)
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
        positive=positive,
    )


def _state_check(init: Callable[[LossSpec], Any]) -> Callable[[Any], PyTree]:
    """A function that raises unless this ``init`` made a state, and has its shapes."""

    @functools.lru_cache(maxsize=16)
    def expected(structure: Any, dtype: Any) -> PyTree:
        return jax.eval_shape(lambda: init(LossSpec(structure, dtype)))

    def check(state: State) -> PyTree:
        check_state(state, WeightingState)
        spec = _spec_of(state)
        shapes = expected(spec.structure, spec.dtype)
        wanted = jax.tree.structure(shapes)
        if jax.tree.structure(state.inner) != wanted:
            raise TypeError(
                "state is that of another weighting: expected "
                f"{wanted} in its field inner, got "
                f"{jax.tree.structure(state.inner)}. Take it from the init of the "
                "weighting that is updated."
            )
        return shapes

    return check


def _spec(losses: Losses) -> LossSpec:
    names, leaves, structure = scalar_losses(losses)
    if not leaves:
        raise ValueError("losses has no leaves: there is nothing to weigh.")
    for name in names:
        if taken := RESERVED.intersection(name.split("/")):
            raise ValueError(
                f"a loss cannot be named {min(taken)!r}: states are searched for the "
                "field of this name."
            )
    return LossSpec(structure, jnp.dtype(float_type(leaves)))


def _spec_of(state: Any) -> LossSpec:
    leaves, structure = jax.tree.flatten(state.loss_weights)
    return LossSpec(structure, leaves[0].dtype)


def loss_values(
    losses: Losses, state: Any, present: Present | None
) -> tuple[LossSpec, jax.Array]:
    """The losses as one vector, checked against those of ``init``, absent ones 1."""
    spec = _spec_of(state)
    values = loss_vector(losses, spec.structure, spec.dtype)
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
    shape = (spec.size,) * (2 if name in MATRICES else 1)
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
    if isinstance(bad, jax.core.Tracer) or not np.any(bad):
        return
    for name, value, is_bad in zip(spec.names, values, bad, strict=True):
        if is_bad:
            raise ValueError(
                f"this weighting needs {needs}, loss {name!r} is {value:.4g}. {remedy}"
            )


def _copy(x: Any) -> jax.Array:
    """A copy of its own type: one with a weak type would be traced again."""
    return jnp.copy(x) if is_key(x) else jnp.array(x, jnp.asarray(x).dtype)


def _check_returned(weights: Any, new: PyTree, old: PyTree, spec: LossSpec) -> None:
    """Raise unless a method returned (K,) weights and a state like its last one."""
    if jnp.shape(weights) != (spec.size,):
        raise ValueError(
            f"update of this weighting must return weights of shape ({spec.size},), "
            f"got {jnp.shape(weights)}."
        )
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    alike = jax.tree.structure(new) == jax.tree.structure(old)
    if not alike or shapes(new) != shapes(old):
        raise ValueError(
            "update of this weighting must keep structure and shapes of its inner "
            f"state: it was {jax.tree.structure(old)} with {shapes(old)}, and is "
            f"{jax.tree.structure(new)} with {shapes(new)}."
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


def _select(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``ok`` else ``old``, in the dtypes of ``old``."""
    cast = lambda x, y: x if is_key(y) else x.astype(y.dtype)
    return select(ok, jax.tree.map(cast, new, old), old)


def _constant(x: Any, dtype: Any) -> jax.Array:
    return lax.stop_gradient(jnp.asarray(x, dtype))
