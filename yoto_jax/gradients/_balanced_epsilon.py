"""Initial weights of auxiliary losses, measured on a few batches."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_flag
from yoto_jax._loss_logits import number_per_loss
from yoto_jax._losses import (
    Params,
    PyTree,
    check_structure,
    find_loss,
    listed,
    loss_names,
    stack_present,
)
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._numerics import stacked
from yoto_jax._regularizer_range import Range, regularizer_range
from yoto_jax._varying import named_axes
from yoto_jax.gradients._devices import mean_losses
from yoto_jax.gradients._jacobian import value_and_jacobian
from yoto_jax.gradients._output import read_output
from yoto_jax.gradients._statistics import statistics_of

By = Literal["gradient", "loss"]


class Sizes(NamedTuple):
    """What is measured of one batch."""

    losses: jax.Array  # (K,)
    values: jax.Array  # (K,), gradient norms or losses
    there: jax.Array  # (K,), whether the batch has the loss

    @property
    def finite(self) -> jax.Array:
        """Whether all of each batch is."""
        return jnp.all(jnp.isfinite(self.losses) & jnp.isfinite(self.values), axis=-1)


def balanced_epsilon(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    primary: str | int,
    share: PyTree = 1.0,
    *,
    by: By = "gradient",
    clip: bool = True,
    has_aux: bool = False,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    chunk_size: int | None = None,
) -> PyTree:
    r"""Initial weights at which auxiliary gradients are a share of the primary one's.

    .. math::
      \epsilon_k = \mathrm{clip}\Bigl(c_k \frac{\bar n_0}{\bar n_k},\;
        \epsilon_{\min}, \epsilon_{\max}\Bigr), \qquad
      \bar n_k = \text{mean over batches of } \|\nabla_\theta l_k\| \text{ or } l_k.

    Up to the bounds, the regulariser pulls a weight back the harder the further it is:
    (0.091, 11) for one auxiliary loss, (0.067, 8.9) for two, (0.025, 6.4) for ten. The
    paper leaves epsilon open.

    Args:
      loss_fn: ``loss_fn(params, batch) -> losses``, any tree of scalars.
      params: The parameters of the model: at the start, or after some steps.
      batches: A few batches, in a list. Those that are not finite are left out.
      primary: The loss to measure by, see :func:`yoto_jax.init_loss_logits`.
      share: c, as ``epsilon`` in :func:`yoto_jax.init_loss_logits`: positive, no unit.
      by: ``"gradient"`` compares gradient norms, ``"loss"`` the (positive) losses.
      clip: Whether to keep to the bounds: for weights that are learned from there.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      axis_name: See :func:`yoto_jax.value_and_grad`.
      chunk_size: How many gradients are computed at a time (``None``: all).

    Returns:
      A tree like the losses, float32 scalars with ``None`` at the primary, for
      ``epsilon=``. A loss that is 0, or absent, in all batches gets what the
      regulariser prefers (0.28, 0.20, 0.07). Under ``jit``, where nothing can be
      raised, so do all others without a positive, finite ratio to the primary loss.

    Raises:
      TypeError: ``batches`` is one batch, or ``primary`` is ``None``.
      ValueError: An argument does not fit, there is no finite batch, the primary loss
        has no gradient (or is not positive), or, by losses, another one is negative.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> loss_fn = lambda w, x: {"fit": jnp.sum((w - x) ** 2), "size": 4 * w @ w}
      >>> w, batches = jnp.array([1.0, 1.0]), [jnp.array([2.0, 1.0])]
      >>> epsilon = yoto.balanced_epsilon(loss_fn, w, batches, "fit")  # 2 / |8 w|
      >>> yoto.init_loss_logits(loss_fn(w, batches[0]), "fit", epsilon=epsilon)
      LossLogits(fit=None, size=-1.733)
    """
    check_flag(clip=clip)
    if by not in ("gradient", "loss"):
        raise ValueError(f"by must be 'gradient' or 'loss', got {by!r}.")
    axes = named_axes(axis_name)
    jacobian_of = value_and_jacobian(
        loss_fn, has_aux=has_aux, axis_name=axis_name, chunk_size=chunk_size
    )

    def of_gradients(params: Params, batch: Any) -> tuple[PyTree, Any, jax.Array]:
        losses, rows = jacobian_of(params, batch)
        losses = losses[0] if has_aux else losses
        present = None
        if isinstance(losses, MaskedLosses):
            losses, present = losses
        there = stack_present(present, jax.tree.structure(losses))
        return losses, there, statistics_of(rows, ["norms"])["norms"]

    def of_losses(params: Params, batch: Any) -> tuple[PyTree, Any, jax.Array]:
        losses, (_, there) = read_output(loss_fn(params, batch), has_aux, axes)
        losses = mean_losses(losses, axes)
        return losses, there, stacked(losses)

    @jax.jit
    def look(params: Params, batch: Any) -> tuple[PyTree, Sizes]:
        measure = of_gradients if by == "gradient" else of_losses
        losses, there, values = measure(params, batch)
        there = jnp.ones(values.shape, bool) if there is None else there
        return losses, Sizes(stacked(losses), values, there)

    looks = [look(params, batch) for batch in _sequence(batches)]
    losses = looks[0][0]
    structure = jax.tree.structure(losses)
    for other, _ in looks:
        check_structure(jax.tree.structure(other), structure, "the first batch")
    sizes = jax.tree.map(lambda *x: jnp.stack(x), *(sizes for _, sizes in looks))
    names = loss_names(structure)
    if primary is None:
        raise TypeError("primary must name the loss to measure by, got None.")
    position = find_loss("primary", primary, losses)
    auxiliary = [name for k, name in enumerate(names) if k != position]
    shares = number_per_loss("share", share, auxiliary)
    means = _means(sizes)
    if not isinstance(means, jax.core.Tracer):
        _check_sizes(sizes, means, names, position, by)
    if not auxiliary:
        return structure.unflatten([None])
    bounds = regularizer_range(len(auxiliary))
    others = jnp.stack([means[k] for k in range(len(names)) if k != position])
    values = jnp.stack([jnp.asarray(x, jnp.float32) for x in shares])
    found = list(_ratios(means[position], others, values, bounds, clip))
    return structure.unflatten([*found[:position], None, *found[position:]])


def _sequence(batches: Any) -> list[Any]:
    """The batches, unless they are one batch."""
    one = isinstance(batches, Mapping | str) or hasattr(batches, "_fields")
    if one or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be a list of batches, got one "
            f"{type(batches).__name__}: put it in a list."
        )
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch.")
    return batches


def _means(sizes: Sizes) -> jax.Array:
    """Means (K,) over the batches that are finite and have the loss; else 0."""
    counted = sizes.there & sizes.finite[:, None]
    number = jnp.sum(counted, axis=0)
    total = jnp.sum(jnp.where(counted, sizes.values, 0), axis=0)
    return (total / jnp.maximum(number, 1)).astype(jnp.float32)


def _ratios(
    own: jax.Array, others: jax.Array, shares: jax.Array, bounds: Range, clip: bool
) -> jax.Array:
    """Weights (K,) relative to the primary loss, of which ``own`` is the size."""
    usable = (others > 0) & (own > 0)
    ratios = shares * (own / jnp.where(usable, others, 1.0))
    if clip:  # Those that have overflowed as well.
        ratios = jnp.clip(ratios, bounds.low, bounds.high)
    usable &= jnp.isfinite(ratios) & (ratios > 0)
    return jnp.where(usable, ratios, bounds.preferred)


def _check_sizes(
    sizes: Sizes, means: jax.Array, names: tuple[str, ...], primary: int, by: By
) -> None:
    if not bool(jnp.any(sizes.finite)):
        # Gradients do not tell whose fault it is: 0 times infinity spoils them all.
        bad = ~jnp.all(jnp.isfinite(sizes.losses), axis=0)
        which = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
        what = (
            f"the loss {listed(which)} is not" if which else "their gradients are not"
        )
        raise ValueError(f"none of the {len(sizes.finite)} batches is finite: {what}.")
    for name, mean in zip(names, means, strict=True):
        if mean < 0:
            raise ValueError(
                f"the loss {name!r} is negative, {mean:.3g} on average: its value says "
                "nothing of its weight. Balance by='gradient'."
            )
    if means[primary] == 0:
        what = "has no gradient" if by == "gradient" else "is 0"
        raise ValueError(
            f"the primary loss {names[primary]!r} {what} in all batches, or they lack "
            "it: nothing to measure the others by."
        )
