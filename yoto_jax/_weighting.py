"""The protocol of loss weightings, and helpers of the code that uses one."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._losses import Present, PyTree, State, Weights
from yoto_jax._numerics import where_rows
from yoto_jax._serialization import serializable_state

GRADIENT_STATISTICS = ("gramian", "norms", "max_abs", "mean_abs", "std")
"""What :func:`yoto_jax.value_and_grad` can tell of per-loss gradients, see there."""

MATRICES = ("gramian", "cross_gramian")
"""Statistics that have one number for each pair of losses."""


class LossWeighting(NamedTuple):
    """A rule that computes loss weights from losses and statistics of gradients.

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
        ``"max_abs"``, ``"mean_abs"``, ``"std"`` (K,) Euclidean norm, largest and mean
        absolute entry, and standard deviation of the entries of each; ``"alignment"``
        (K,) inner products with the gradient of the downstream loss. Any other name is
        the caller's to provide, such as ``"cross_gramian"`` (K, K), see
        :func:`yoto_jax.cross_gramian`.
      downstream: The loss that steers the weights without a weight of its own, or None.
      due: ``due(state) -> bool``: whether the next update looks at the statistics, so
        that they need not be computed if it does not. None if it always does.
      observe: ``observe(state, *, cotangent_norm, gradient_norm) -> state``: shown the
        norm of the weighted gradient of the shared representation, and that of the
        encoder's parameters which it became. None if not needed.
      observe_step: ``observe_step(losses, state) -> state``: shown the losses of the
        same batch after the step, and ``present=`` as ``update`` is. To be called by
        the user. None if not needed.
      positive: Whether losses must be positive, or at least not negative: others are an
        error, and inside ``jit`` a batch that is skipped.

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
    positive: bool = False


@serializable_state
class WeightingState(NamedTuple):
    """State of a weighting; ``optax.tree.get`` finds the fields by their names."""

    loss_weights: Weights  # scalars, a tree like the losses: the weights used last
    inner: Any  # what the method itself remembers
    num_updates: jax.Array  # int32 scalar, batches with a loss present that was taken
    num_skipped: jax.Array  # int32 scalar, bad batches, that changed nothing


def check_weighting(weighting: Any) -> None:
    """Checks that it is one, and not what makes one."""
    if not isinstance(weighting, LossWeighting):
        raise TypeError(
            "weighting must be a LossWeighting, such as yoto.weightings.equal(), got "
            f"{type(weighting).__name__}."
        )


def check_state(state: State, kind: type) -> None:
    """Raise unless the state is of this kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init of this weighting returns, "
            f"got {type(state).__name__}."
        )


def weights_of(state: State) -> PyTree:
    """The loss weights in a state, inside wrappers too."""
    return optax.tree.get(state, "loss_weights")


def count_skipped(state: State) -> jax.Array | None:
    """Batches skipped by a weighting and all wrappers in a state, or None."""
    counts = [x for _, x in optax.tree.get_all_with_path(state, "num_skipped")]
    return sum(counts[1:], counts[0]) if counts else None


def skipped_between(before: Any, after: Any) -> jax.Array:
    """How many batches have been skipped between two states, as far as they tell."""
    old, new = count_skipped(before), count_skipped(after)
    if old is None or new is None:
        return jnp.zeros((), jnp.int32)
    return new - old


def skip_one(state: State) -> Any:
    """The state of a weighting as it is but for one more batch that is skipped."""
    counts = optax.tree.get_all_with_path(state, "num_skipped")
    if not counts:
        return state
    outermost, count = min(counts, key=lambda entry: len(entry[0]))
    return optax.tree.set(
        state, lambda path, _: path == outermost, num_skipped=count + 1
    )


def of_inner(name: str) -> property:
    """A property of a wrapper's state: what the state inside has under this name."""

    def read(state: Any) -> Any:
        if name == "num_skipped":  # Several may skip batches, one in the other.
            found = count_skipped(state.inner)
        else:
            found = optax.tree.get(state.inner, name)
        if found is None:
            kind = type(state).__name__
            raise AttributeError(f"no {name} in what this {kind} holds.", name=name)
        return found

    return property(read, doc=f"``{name}`` of the state inside.")


def mask_weights(weights: Weights, present: jax.Array | None) -> PyTree:
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
    weighting: LossWeighting, statistics: dict[str, Any], present: Present | None
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
