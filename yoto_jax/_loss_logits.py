"""Loss logits: the learned parameters behind the loss weights."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._losses import (
    Losses,
    Present,
    PyTree,
    check_structure,
    find_loss,
    listed,
    loss_names,
    path_name,
    present_of_each,
    scalar_losses,
    shape_and_dtype,
    stack_present,
)
from yoto_jax._numerics import softmax, upcast
from yoto_jax._serialization import register_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class LossLogits:
    r"""Logits :math:`\mu` of the loss weights :math:`\lambda = \mathrm{Softmax}(\mu)`.

    A pytree node with one array leaf. It may sit anywhere in a tree of parameters, and
    the transformations of this package find it there by its type. Build one with
    :func:`yoto_jax.init_loss_logits`. A checkpoint holds the array alone: which loss
    each entry belongs to is known from the ``LossLogits`` that it is restored into.

    Attributes:
      learned: The logits that are learned, float32 of shape ``(K,)``, in the order of
        ``jax.tree.leaves(losses)`` without the primary loss. Leading axes may be added
        by ``vmap`` or ``scan``.
      structure: Tree structure of the losses (static).
      primary: Position of the primary loss among the leaves of the losses, or ``None``
        if all logits are learned (static).

    Examples:
      >>> import yoto_jax as yoto
      >>> mu = yoto.init_loss_logits({"depth": 0.0, "camera": 0.0}, primary="depth")
      >>> mu
      LossLogits(camera=-2.303, depth=None)
      >>> mu.names
      ('camera', 'depth')
    """

    learned: jax.Array
    structure: jax.tree_util.PyTreeDef = dataclasses.field(metadata={"static": True})
    primary: int | None = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        learned: jax.Array,
        structure: jax.tree_util.PyTreeDef,
        primary: int | None,
    ):
        # Every compiled step makes three of these: the parameter and Adam's moments.
        # This is faster than the ``__init__`` of a frozen dataclass.
        values = self.__dict__
        values["learned"] = learned
        values["structure"] = structure
        values["primary"] = primary

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits that are learned, as libraries ask parameters for it."""
        return self.learned.shape

    @property
    def logits(self) -> PyTree:
        """The logits as a tree like the losses, with ``None`` at the primary loss."""
        learned = iter(range(self.structure.num_leaves))
        return self.structure.unflatten(
            None if position == self.primary else self.learned[..., next(learned)]
            for position in range(self.structure.num_leaves)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every loss, such as ``"heads/depth"``, in the order of the leaves."""
        return loss_names(self.structure)

    def __repr__(self) -> str:
        learned = iter(range(self.structure.num_leaves))
        values = (
            "None"
            if position == self.primary
            else show_entry(self.learned, next(learned))
            for position in range(self.structure.num_leaves)
        )
        entries = (
            f"{name or 'loss'}={value}"
            for name, value in zip(self.names, values, strict=True)
        )
        return f"LossLogits({', '.join(entries)})"


def is_loss_logits(x: Any) -> bool:
    """Whether ``x`` is a :class:`LossLogits`, for ``is_leaf``."""
    return isinstance(x, LossLogits)


def init_loss_logits(
    losses: Losses, primary: str | int | None, *, epsilon: PyTree = 0.1
) -> LossLogits:
    r"""Initialises loss logits from initial weights relative to the primary loss.

    .. math::
      \mu_0 = 0, \quad \mu_i = \log \epsilon_i, \quad\text{so that}\quad
      \lambda_i = \frac{\epsilon_i}{1 + \sum_j \epsilon_j}.

    Args:
      losses: A tree of scalar losses, or of anything with their shape and dtype, such
        as ``jax.eval_shape`` of the loss function. Only the structure is kept.
      primary: The paper's basic loss: the path of one loss (``"depth"``,
        ``"heads/depth"``, or its last part if that is unique), or its index in a
        sequence of losses. Its logit stays 0. ``None`` learns every logit.
      epsilon: Initial weight relative to the primary loss (positive, no unit): one
        number, one number per auxiliary loss in the order of ``jax.tree.leaves``, or
        a tree like the losses without the primary.

    Returns:
      :class:`LossLogits` with float32 logits of shape ``(K,)``, K auxiliary losses.

    Raises:
      TypeError: A loss is not a floating-point number, or ``primary`` is neither a
        path, nor an index, nor ``None``.
      ValueError: No losses, a loss that is not a scalar, an unknown or ambiguous
        ``primary``, or an ``epsilon`` that is not positive or does not fit the losses.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.0, "camera": 0.0, "invariance": 0.0}
      >>> mu = yoto.init_loss_logits(losses, primary="depth", epsilon=0.1)
      >>> print({k: round(float(v), 3) for k, v in yoto.loss_weights(mu).items()})
      {'camera': 0.083, 'depth': 0.833, 'invariance': 0.083}
      >>> epsilon = {"camera": 0.25, "invariance": 0.1}
      >>> yoto.init_loss_logits(losses, "depth", epsilon=epsilon)
      LossLogits(camera=-1.386, depth=None, invariance=-2.303)

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Section 3.5 and Algorithm 1.

    .. note::
      ``primary=None`` is ours, not the paper's. A common shift of all logits leaves
      the weights as they are, and the softplus of the regulariser then moves all
      logits down together, ever more slowly.
    """
    names, leaves, structure = scalar_losses(losses)
    if not leaves:
        raise ValueError("losses has no leaves: there is nothing to weigh.")
    position = None if primary is None else find_loss("primary", primary, losses)
    auxiliary = [name for k, name in enumerate(names) if k != position]
    values = number_per_loss("epsilon", epsilon, auxiliary)
    if any(isinstance(value, jax.core.Tracer) for value in values):
        learned = jnp.log(jnp.stack([jnp.asarray(v, jnp.float32) for v in values]))
    else:
        learned = jnp.asarray([math.log(float(v)) for v in values], jnp.float32)
    return LossLogits(learned, structure, position)


# Where loss logits come out of a tree of parameters, as ``params["mu"]``, type checkers
# have lost their type: public functions take ``Any``, and check what they get.
def loss_weights(mu: LossLogits | Any) -> PyTree:
    r"""Loss weights :math:`\lambda = \mathrm{Softmax}(\mu)` of loss logits.

    .. math::
      \lambda_i = \frac{e^{\mu_i}}{\sum_j e^{\mu_j}}, \quad \mu_0 = 0.

    Args:
      mu: Loss logits. Leading axes are kept, so the stacked logits of a whole training
        run give the history of every weight.

    Returns:
      A tree like the losses: float32 scalars (float64 if the logits are) that sum to
      1, positive unless they underflow to 0. With leading axes, arrays of that shape.

    Raises:
      TypeError: ``mu`` is not a :class:`LossLogits`.
      ValueError: ``mu`` holds another number of logits than its losses need.

    Examples:
      >>> import yoto_jax as yoto
      >>> mu = yoto.init_loss_logits((0.0, 0.0), primary=0, epsilon=0.25)
      >>> print([round(float(weight), 2) for weight in yoto.loss_weights(mu)])
      [0.8, 0.2]

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025, Eq. 5.
    """
    return weights_of_present(mu, None)


def weights_of_present(mu: LossLogits, present: Present | None) -> PyTree:
    """The weights of a batch: those of absent losses are 0."""
    mask = present_in_order(present, mu)
    weights = softmax(upcast(mu.learned), mu.primary is not None, mask)
    order = primary_first(range(mu.structure.num_leaves), mu.primary)
    by_position = {position: weights[..., k] for k, position in enumerate(order)}
    return mu.structure.unflatten(by_position[k] for k in sorted(by_position))


def primary_first(items: Sequence[Any], primary: int | None) -> list[Any]:
    """Moves the primary item to the front; the others keep their order."""
    items = list(items)
    return items if primary is None else [items.pop(primary), *items]


def _where(tree: Any) -> str:
    """Where a tree holds loss logits, for a message."""
    is_mu = lambda x: isinstance(x, LossLogits)
    found = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_mu)
        if is_mu(leaf)
    ]
    return f" with one at {', '.join(found)}" if found else ""


# Checks on structure, shape and dtype alone: they cost nothing under jit.


def check_loss_logits(mu: Any) -> None:
    """Checks that ``mu`` holds as many logits as its losses need."""
    if not isinstance(mu, LossLogits):
        raise TypeError(
            f"mu must be a LossLogits (see init_loss_logits), got {type(mu).__name__}"
            f"{_where(mu)}."
            + (" Take its get_value()." if hasattr(mu, "get_value") else "")
        )
    if not hasattr(mu.learned, "shape"):
        raise TypeError(
            f"mu must hold an array of logits, got {type(mu.learned).__name__}."
        )
    if not jnp.issubdtype(mu.learned.dtype, jnp.floating):
        raise TypeError(
            f"mu must hold floating-point logits, got dtype {mu.learned.dtype}."
        )
    if mu.primary is not None and mu.primary not in range(mu.structure.num_leaves):
        raise ValueError(
            f"the primary of mu must be the position of one of the losses "
            f"{listed(mu.names)}, got {mu.primary!r}."
        )
    needed = mu.structure.num_leaves - (mu.primary is not None)
    if mu.learned.shape[-1:] != (needed,):
        raise ValueError(
            f"mu must hold {needed} logits for the losses {listed(mu.names)} with "
            f"primary {mu.primary}, got shape {mu.learned.shape}."
        )


def present_in_order(present: Present | None, mu: LossLogits) -> jax.Array | None:
    """Mask of the present losses, the primary loss first; None for all."""
    check_loss_logits(mu)
    (own,) = present_of_each(present, [mu.structure])
    mask = stack_present(own, mu.structure)
    if mask is None:
        return None
    return jnp.stack(primary_first(list(mask), mu.primary))


def present_by_logits(present: Present | None, tree: PyTree) -> list[Any]:
    """Which losses there are, of each LossLogits that no mask has emptied."""
    nodes = jax.tree.leaves(tree, is_leaf=is_loss_logits)
    logits = [x for x in nodes if is_loss_logits(x) and jax.tree.leaves(x)]
    return present_of_each(present, [mu.structure for mu in logits])


def choose_present(present: Present, new: PyTree, old: PyTree) -> PyTree:
    """Takes the logits of absent losses from ``old``, all else from ``new``."""
    own = iter(present_by_logits(present, new))

    def select(new: Any, old: Any) -> Any:
        if not is_loss_logits(new) or not jax.tree.leaves(new):
            return new
        mask = present_in_order(next(own), new)
        assert mask is not None
        there = mask[int(new.primary is not None) :]
        learned = jnp.where(there, new.learned, old.learned)
        return LossLogits(learned, new.structure, new.primary)

    return jax.tree.map(select, new, old, is_leaf=is_loss_logits)


register_node(
    LossLogits,
    lambda static, children: LossLogits(*children, *static),
    check=check_loss_logits,
)


def losses_in_order(losses: Losses, mu: LossLogits) -> list[Any]:
    """Leaves of ``losses``, checked against ``mu``, primary loss first."""
    check_loss_logits(mu)
    _, leaves, structure = scalar_losses(losses)
    check_structure(structure, mu.structure, "the loss logits")
    return primary_first(leaves, mu.primary)


def show_entry(learned: Any, index: int) -> str:
    """Text of one logit; dtype and leading axes if it has no single value."""
    if not hasattr(learned, "dtype"):
        return str(learned)  # A label, a mask: anything can be a leaf.
    try:
        (_,) = learned.shape
        return format(float(learned[index]), ".4g")
    except Exception:  # A tracer, a batch of logits, a shape without an array.
        return f"{learned.dtype}[{','.join(map(str, learned.shape[:-1]))}]"


def number_per_loss(what: str, numbers: PyTree, names: list[str]) -> list[Any]:
    """One positive number for each of the auxiliary losses with these names."""
    if getattr(numbers, "ndim", 0) == 1:
        numbers = list(numbers)
    flat = jax.tree.leaves_with_path(numbers)
    given = [(path_name(path), leaf) for path, leaf in flat]
    values = [leaf for _, leaf in given]
    if jax.tree.structure(numbers) == jax.tree.structure(0):
        values *= len(names)
    elif isinstance(numbers, list | tuple) and len(numbers) == len(values):
        pass  # In the order of the losses.
    else:
        by_name = dict(given)
        values = [by_name[name] for name in names if name in by_name]
        if len(by_name) < len(given) or len(values) < len(given):
            values = []
    if len(values) != len(names):
        raise ValueError(
            f"{what} must be one number, or one for each auxiliary loss "
            f"({listed(names)}), got {numbers!r}."
        )
    for name, value in zip(names, values, strict=True):
        shape, _ = shape_and_dtype(f"{what} of loss {name!r}", value)
        if shape:
            raise ValueError(
                f"{what} of loss {name!r} must be a scalar, got shape {shape}."
            )
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 < float(value) < math.inf:
            raise ValueError(
                f"{what} of loss {name!r} must be positive and finite, got {value}."
            )
    return values
