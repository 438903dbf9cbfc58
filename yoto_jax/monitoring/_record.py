"""Recording of loss weights in the state, on the device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from yoto_jax._checks import check_counts, check_rate
from yoto_jax._hyperparameter_decay import (
    Entropy,
    check_entropy,
    decay_gradient,
)
from yoto_jax._loss_logits import LossLogits, weights_of_present
from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    check_structure,
    find_loss,
    listed,
    loss_names,
    path_name,
    present_of_each,
    scalar_losses,
    stack_present,
)
from yoto_jax._serialization import serializable_state
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits
from yoto_jax._weighting import (
    LossWeighting,
    and_present,
    check_weighting,
    count_skipped,
    of_inner,
)
from yoto_jax.weightings._wrappers import observing_inner

# Roles of losses. These are empty nodes, part of the tree structure of the state like
# optax.EmptyState, so that names take no memory and pass every checkpoint.


@serializable_state
class Weighed(NamedTuple):
    """Role of a loss with a weight of any origin."""


@serializable_state
class Primary(NamedTuple):
    """Role of the loss whose logit is 0."""


@serializable_state
class Auxiliary(NamedTuple):
    """Role of a loss whose logit is learned under the whole regulariser."""


@serializable_state
class Downstream(NamedTuple):
    """Role of the loss that steers the weights and has none."""


Role = Weighed | Primary | Auxiliary | Downstream
Columns = tuple[dict[str, Role], ...]  # Of one name each: JAX sorts those of a dict.


@serializable_state
class HistoryState(NamedTuple):
    """Ring buffer of rows, with a spare last row for steps that are not recorded."""

    calls: jax.Array  # int32 scalar
    row_steps: jax.Array  # int32 (length + 1,), -1 where nothing has been written
    rows: jax.Array  # float32 (length + 1, columns): weights, losses, which losses the
    # batch had; with logits, whether losses were given, the data's gradient, and the
    # prior's if rho is known; of a weighting, how many batches it has skipped, -1 if it
    # does not count them
    columns: tuple[Columns, ...]  # no arrays: names, by LossLogits


@serializable_state
class RecordedState(NamedTuple):
    """State of :func:`recorded`."""

    history: HistoryState
    inner: Any

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def record(
    *,
    length: int = 1000,
    every: jax.typing.ArrayLike = 1,
    hyperparameter_decay: optax.ScalarOrSchedule | None = None,
    entropy: Entropy = "all",
) -> optax.GradientTransformationExtraArgs:
    r"""Records the loss weights in the optimizer state, as first link of a chain.

    Updates pass unchanged. A row holds the loss weights of a step, the losses if given,
    :math:`\|\partial L_e / \partial \mu\|` and :math:`\|\rho \nabla L_r(\mu)\|`.
    Rows stay on the device until :func:`history` fetches them.

    Args:
      length: Number of rows, the latest ones.
      every: Steps from one row to the next (positive integer), from the first step on.
      hyperparameter_decay: rho of the optimizer: a scalar or a schedule. Without it the
        regulariser's gradient is not recorded.
      entropy: Which losses the entropy spans, see :func:`yoto_jax.regularizer`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``, and
      takes ``losses=``, a tree like the losses of the :class:`yoto_jax.LossLogits`
      (a sequence of trees if ``params`` hold several), and ``present=``, which losses
      the batch had, as :func:`yoto_jax.adamw` takes it.

    Raises:
      TypeError: ``length`` (static under ``optax.inject_hyperparams``) or ``every`` is
        no integer, or rho neither a number nor a schedule.
      ValueError: An argument is out of its range; the parameters hold no
        ``LossLogits``; or ``params``, updates or losses do not match in ``update``.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> losses = {"depth": 2.0, "camera": 1.0}
      >>> params = {"mu": yoto.init_loss_logits(losses, "depth", epsilon=0.25)}
      >>> tx = optax.chain(monitoring.record(length=100), yoto.adamw(0.01))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     objective = lambda p: yoto.composite_loss(losses, p["mu"])
      ...     grads = jax.grad(objective)(params)
      ...     updates, state = tx.update(grads, state, params, losses=losses)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> seen = monitoring.history(state)
      >>> print(seen.steps[[0, -1]], seen.loss_weights["camera"].round(2)[[0, -1]])
      [200 299] [0.29 0.29]

    .. note::
      Losses must be averaged over devices, as gradients are.
    """
    check_size(length, every)
    check_entropy(entropy)
    rho = hyperparameter_decay
    if rho is not None:
        check_rate("hyperparameter_decay", rho)

    def init_fn(params: Params) -> HistoryState:
        if not jax.tree.leaves(params):  # The placeholder of optax.tree.map_params.
            placeholder: Any = jnp.zeros((), jnp.int32)
            return HistoryState(*empty_ring(length, 0), placeholder)
        found = _with_logits(params)
        if not found:
            raise ValueError(
                "record finds no LossLogits in the parameters (see init_loss_logits): "
                "they are not there, or a mask or partition hides them."
            )
        off = rho is None or (isinstance(rho, int | float) and rho == 0)
        whole = entropy == "all" and not off
        role, special = (Auxiliary(), Primary()) if whole else (Weighed(), Weighed())
        columns = tuple(
            _columns(
                mu.structure,
                role,
                {mu.primary: special},
                prefix=f"{path}/" if len(found) > 1 else "",
            )
            for path, mu in found
        )
        width = 3 * sum(map(len, columns)) + (2 if rho is None else 3)
        return HistoryState(*empty_ring(length, width), columns)

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        losses: Losses | None = None,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "record needs the current loss logits: call update(updates, state, "
                "params)."
            )
        if not jax.tree.leaves(params):
            return updates, state
        logits = [mu for _, mu in _with_logits(params)]
        slopes = [mu for _, mu in _with_logits(updates)]
        _check_like(logits, slopes, state)
        each = present_of_each(present, [mu.structure for mu in logits])
        pairs = list(zip(logits, each, strict=True))
        weights = [weights_of_present(mu, own) for mu, own in pairs]
        row = [
            *jax.tree.leaves(weights),
            *_given_losses(losses, logits),
            *[x for mu, own in pairs for x in _there(own, mu.structure)],
            losses is not None,
            _norm([mu.learned for mu in slopes]),
        ]
        if rho is not None:
            pulls = [decay_gradient(mu, entropy, own) for mu, own in pairs]
            strength = rho(state.calls) if callable(rho) else rho
            row.append(_as_float32(strength) * _norm(pulls))
        return updates, write_row(state, row, every)

    return unwrap_loss_logits(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def recorded(
    weighting: LossWeighting,
    *,
    length: int = 1000,
    every: jax.typing.ArrayLike = 1,
) -> LossWeighting:
    """Records loss weights and losses in the state of a weighting.

    It goes around all other wrappers. Batches that are not finite are recorded too,
    with their losses and the weights that were held.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      length: Number of rows, the latest ones.
      every: Updates from one row to the next (a positive integer). The first update is
        recorded.

    Returns:
      A :class:`yoto_jax.LossWeighting` with the same weights, for :func:`history`. It
      needs the losses, whether or not the one inside does.

    Raises:
      TypeError: ``length`` or ``every`` is not an integer, or ``weighting`` is no
        weighting.
      ValueError: ``length`` or ``every`` is not positive.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> weighting = monitoring.recorded(yoto.weightings.scale_invariant())
      >>> state = weighting.init({"depth": 0.0, "camera": 0.0})
      >>> for depth in (0.5, 0.25):
      ...     losses = {"depth": depth, "camera": 4.0}
      ...     weights, state = weighting.update(losses, state)
      >>> print(monitoring.history(state).loss_weights["depth"])
      [2. 4.]
    """
    check_size(length, every)
    check_weighting(weighting)

    def init(losses: Losses) -> RecordedState:
        columns = (columns_of(weighting, losses),)
        history = HistoryState(*empty_ring(length, 3 * len(columns[0]) + 1), columns)
        return RecordedState(history, weighting.init(losses))

    def update(
        losses: Losses,
        state: RecordedState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, RecordedState]:
        seen = and_present(weighting, statistics, present)
        weights, inner = weighting.update(losses, state.inner, **seen)
        skipped = count_skipped(inner)
        skipped = -1 if skipped is None else skipped
        there = _there(present, jax.tree.structure(losses))
        values = [*jax.tree.leaves(weights), *jax.tree.leaves(losses)]
        row = [*values, *there, skipped]
        return weights, RecordedState(write_row(state.history, row, every), inner)

    return observing_inner(weighting)._replace(
        init=init,
        update=update,
        needs=tuple(dict.fromkeys(("losses", *weighting.needs))),
    )


def empty_ring(length: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first three fields of a :class:`HistoryState`."""
    return (
        jnp.zeros((), jnp.int32),
        jnp.full((length + 1,), -1, jnp.int32),
        jnp.zeros((length + 1, width), jnp.float32),  # Not NaN: jax_debug_nans.
    )


def columns_of(weighting: LossWeighting, losses: Losses) -> Columns:
    """Name and role of each loss of a weighting."""
    structure = jax.tree.structure(losses)
    special: dict[int | None, Role] = {}
    if (name := weighting.downstream) is not None:
        place = find_loss("downstream", name, losses)
        special[place] = Downstream()
    return _columns(structure, Weighed(), special)


def _columns(
    structure: jax.tree_util.PyTreeDef,
    role: Role,
    special: Mapping[int | None, Role],
    prefix: str = "",
) -> Columns:
    """Name and role of each loss; ``special`` roles are given by position."""
    names = [prefix + (name or "loss") for name in loss_names(structure)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"two losses have the same path {listed(sorted(twice))}: their histories "
            "could not be told apart. Rename one."
        )
    return tuple({name: special.get(k, role)} for k, name in enumerate(names))


def write_row(ring: Any, row: Sequence[Any], every: Any) -> Any:
    """Writes a row in place; one that is not due goes to the spare row, unbranched."""
    values = jnp.stack([_as_float32(x) for x in row])
    return write_values(ring, values, is_due(ring, every), every)


def is_due(ring: Any, every: Any) -> jax.Array:
    """Whether the next row is one to keep."""
    return ring.calls % every == 0


def write_values(ring: Any, values: jax.Array, keep: jax.Array, every: Any) -> Any:
    """Writes a row of float32 in place, to the spare row unless it is to be kept."""
    length = ring.row_steps.shape[-1] - 1
    place = jnp.where(keep, ring.calls // every % length, length)
    set_row = lax.dynamic_update_index_in_dim
    return ring._replace(
        calls=jnp.asarray(optax.safe_increment(ring.calls)),
        row_steps=set_row(ring.row_steps, ring.calls, place, 0),
        rows=set_row(ring.rows, values, place, 0),
    )


def nodes(tree: PyTree, kind: type | tuple[type, ...]) -> list[tuple[str, Any]]:
    """Nodes of these types, with their paths."""
    is_kind = lambda x: isinstance(x, kind)
    flat = jax.tree.leaves_with_path(tree, is_leaf=is_kind)
    return [(path_name(path), x) for path, x in flat if is_kind(x)]


def _with_logits(tree: PyTree) -> list[tuple[str, LossLogits]]:
    """Loss logits with their paths, without those that a mask has emptied."""
    return [(path, mu) for path, mu in nodes(tree, LossLogits) if jax.tree.leaves(mu)]


def _norm(vectors: Sequence[jax.Array]) -> jax.Array:
    return optax.tree.norm([_as_float32(x) for x in vectors])


def _as_float32(x: Any) -> jax.Array:
    return lax.stop_gradient(jnp.asarray(x, jnp.float32))


def _given_losses(losses: Losses, logits: Sequence[LossLogits]) -> list[Any]:
    """Losses in the order of the weights, 0 if none are given."""
    if losses is None:
        return [0.0] * sum(mu.structure.num_leaves for mu in logits)
    trees = [losses] if len(logits) == 1 else losses
    if not isinstance(trees, list | tuple) or len(trees) != len(logits):
        raise ValueError(
            f"the parameters hold {len(logits)} LossLogits: losses= must be a sequence "
            f"of {len(logits)} trees of losses, in their order."
        )
    leaves = []
    for tree, mu in zip(trees, logits, strict=True):
        _, values, structure = scalar_losses(tree)
        check_structure(structure, mu.structure, "the loss logits")
        leaves += values
    return leaves


def _there(present: Present | None, structure: jax.tree_util.PyTreeDef) -> list[Any]:
    """Which losses the batch has, all unless it is told."""
    mask = stack_present(present, structure)
    return [1.0] * structure.num_leaves if mask is None else list(mask)


def _check_like(
    logits: Sequence[LossLogits], slopes: Sequence[LossLogits], state: HistoryState
) -> None:
    for mu in logits:
        if mu.learned.ndim != 1:
            raise ValueError(
                "record takes the logits of one run, of shape (K,); got shape "
                f"{mu.learned.shape}. Use vmap over the whole optimizer."
            )
    if [mu.structure for mu in slopes] != [mu.structure for mu in logits]:
        raise ValueError(
            f"the parameters hold {len(logits)} LossLogits and the updates "
            f"{len(slopes)}, or of other losses: give gradients of all of them."
        )
    known = [len(group) for group in state.columns]
    given = [mu.structure.num_leaves for mu in logits]
    if known != given:
        raise ValueError(
            f"the history was begun with {known} losses, and the parameters now hold "
            f"LossLogits of {given}."
        )


def check_size(length: Any, every: Any) -> None:
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(
            f"length must be an integer, got {length!r}; with inject_hyperparams make "
            "it one of the static_args."
        )
    check_counts(length=length, every=every)
