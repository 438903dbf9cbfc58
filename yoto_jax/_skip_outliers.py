"""An optimizer that takes no step on batches with absurd losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yoto_jax._loss_logits import LossLogits, is_loss_logits
from yoto_jax._losses import PyTree, check_structure, scalar_losses, stack_present
from yoto_jax._numerics import all_finite, upcast
from yoto_jax._outliers import LossScales, OutlierRule, choose, loss_vector
from yoto_jax._serialization import serializable_state
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits


@serializable_state
class SkipOutliersState(NamedTuple):
    """State of :func:`skip_outliers`."""

    num_skipped: jax.Array  # int32 scalar, batches that changed nothing
    loss_scales: LossScales
    inner_state: Any


def skip_outliers(
    inner: optax.GradientTransformation,
    limit: jax.typing.ArrayLike = 1e3,
    *,
    losses: PyTree | None = None,
    decay: jax.typing.ArrayLike = 0.99,
    patience: jax.typing.ArrayLike = 10,
    positive: bool = False,
    two_sided: bool = False,
    floor: jax.typing.ArrayLike = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    r"""Take no step on a batch that is not finite, or whose loss is absurd.

    ``optax.apply_if_finite`` keeps NaN from the parameters. One loss of 1e10 is finite:
    it throws parameters far off, or leaves Adam with second moments under which they
    stand still for thousands of steps. With :math:`m_k` the running mean of
    :math:`|L_k|` over the batches accepted so far, a batch is bad if a loss is not
    finite, if an update is not (or its square), or if

    .. math::
      |L_k| > \mathtt{limit} \cdot m_k

    for any loss. Then the updates are zero, the state of ``inner`` stays what it was,
    and ``num_skipped`` goes up by 1: parameters, loss logits, moments and schedules are
    those of a run in which the batch never came. The mean is the plain one of the first
    :math:`1 / (1 - \beta)` batches, then one with decay :math:`\beta`.

    Args:
      inner: Any transformation. Wrap the whole chain, and ``optax.MultiSteps`` too:
        outside of it every small batch is judged by its own losses, and a bad one is
        left out of the sum; inside, only the losses of the last one are seen.
      limit: How many times larger than usual a loss may be (larger than 1, no unit).
      losses: A tree of the losses, or of anything with their shape; or just their
        number. May be left out if the parameters hold :class:`yoto_jax.LossLogits`.
      decay: :math:`\beta`, in [0, 1).
      patience: For how many finite batches in a row one loss may cause a skip. The next
        one like them is accepted, and the mean of that loss starts anew with it: the
        losses have changed for good. A loss that stays that much *smaller* than usual
        is accepted all the while; its mean starts anew likewise.
      positive: Whether all losses are positive by definition: a batch with a loss of 0
        or less is then skipped, as one that is not finite is, without end.
      two_sided: Whether a loss ``limit`` times smaller than usual, or 0, is an outlier
        too. For losses that never come near 0.
      floor: Losses smaller than this in size count as this size (in the unit of the
        losses): how they vary down there is no reason to skip a batch.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs the losses of
      the batch as keyword ``losses=`` and hands them on to ``inner``. On batches that
      are all good it does what ``inner`` does.

    Raises:
      ValueError: ``limit`` is not larger than 1, ``decay`` is not in [0, 1),
        ``patience`` or ``floor`` is negative, or a number of losses not positive. In
        ``init``: loss logits of different losses among the parameters, and no
        ``losses``. In ``update``: the losses are missing, or are not those of ``init``,
        or their number was not known there.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> def loss_fn(w, x): return {"fit": (w - x) ** 2, "size": w**2 / 10}
      >>> params = {"w": 1.0, "mu": yoto.init_loss_logits(loss_fn(1.0, 0.0), "fit")}
      >>> tx = yoto.skip_outliers(yoto.adamw(1e-2))
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, opt_state, x):
      ...     def objective(params):
      ...         losses = loss_fn(params["w"], x)
      ...         return yoto.composite_loss(losses, params["mu"]), losses
      ...     grads, losses = jax.grad(objective, has_aux=True)(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
      ...     return optax.apply_updates(params, updates), opt_state
      >>> for x in (2.0, 2.1, 1e6, 2.0):
      ...     params, opt_state = train_step(params, opt_state, x)
      ...     print(f"{params['w']:.2f}", opt_state.num_skipped)
      1.01 0
      1.02 0
      1.02 1
      1.03 1

    .. note::
      What it cannot see: the first batch of all, to which there is nothing to compare
      (if that one was the outlier, ``patience`` mends the mean); faults within a factor
      of ``limit``; faults that last longer than ``patience``; gradients that are large
      though their losses are not, for which there is ``optax.clip_by_global_norm``; a
      change of sign or a constant 0, unless ``positive``: a log-likelihood may pass
      through 0, a hinge loss be 0 most of the time. Zeros never enter the mean.

      Give it losses and gradients that are averaged over all devices, so that all
      decide alike; under ``jit`` with sharded arrays they are. A loss that is absurd on
      one device of n is then seen if it is n times ``limit`` above the usual. Inside
      ``shard_map`` with parameters that are spread over devices, each device tests the
      updates of its own part alone: there the losses must tell.

    .. warning::
      Batches whose loss is rarely, but rightly, ``limit`` times the usual are never
      learned from. Watch ``num_skipped``, and raise ``limit`` if it grows where data
      and code are sound: 1e6 still keeps out what overflows.
    """
    rule = OutlierRule(limit, decay, patience, positive, two_sided, floor)
    inner = optax.with_extra_args_support(inner)
    expected = losses
    if isinstance(losses, int | np.integer):
        if isinstance(losses, bool) or losses < 1:
            raise ValueError(
                "losses must be a tree of the losses or their number, which is "
                f"positive, got {losses!r}."
            )
        expected = int(losses)

    def init_fn(params: PyTree) -> SkipOutliersState:
        if isinstance(expected, int):
            count = expected
        else:
            # Not known: an error in update. Optax calls init with placeholders, too.
            structure = _structure(expected, params)
            count = 0 if structure is None else structure.num_leaves
        return SkipOutliersState(
            jnp.zeros((), jnp.int32),
            rule.init(count, jnp.float32),
            inner.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        losses: PyTree | None = None,
        present: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SkipOutliersState]:
        structure = _structure(expected, params)
        values = _values(losses, structure, state.loss_scales)
        mask = stack_present(present, jax.tree.structure(losses))
        if present is not None:
            extra_args = extra_args | {"present": present}
        sound = all_finite([_squared(x) for x in jax.tree.leaves(updates)])
        ok, scales = rule.judge(values, state.loss_scales, sound, mask)
        new, inner_state = inner.update(
            updates, state.inner_state, params, losses=losses, **extra_args
        )
        new = jax.tree.map(
            lambda u: u if _is_float0(u) else jnp.where(ok, u, jnp.zeros_like(u)), new
        )
        inner_state = choose(ok, inner_state, state.inner_state)
        return new, SkipOutliersState(
            state.num_skipped + (~ok).astype(jnp.int32), scales, inner_state
        )

    return unwrap_loss_logits(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _structure(losses: PyTree | None, params: PyTree) -> Any:
    """The structure of the losses: as given, or as that of loss logits, or None."""
    if losses is not None:
        return None if isinstance(losses, int) else jax.tree.structure(losses)
    leaves = jax.tree.leaves(params, is_leaf=is_loss_logits)
    found = {x.structure for x in leaves if isinstance(x, LossLogits)}
    if len(found) > 1:
        raise ValueError(
            f"the parameters hold loss logits for {len(found)} sets of losses: say "
            "which losses there are, skip_outliers(inner, losses=losses)."
        )
    return found.pop() if found else None


def _values(losses: PyTree | None, structure: Any, scales: LossScales) -> jax.Array:
    """The losses of a batch as a vector, checked against those of ``init``."""
    count = scales.means.shape[-1]
    if losses is None:
        raise ValueError(
            "skip_outliers needs the losses: call update(updates, state, params, "
            "losses=losses)."
        )
    if not count:
        raise ValueError(
            "skip_outliers does not know the number of losses, for it found no loss "
            "logits among the parameters: give skip_outliers(inner, losses=losses)."
        )
    _, leaves, given = scalar_losses(losses)
    check_structure(given, given if structure is None else structure, "skip_outliers")
    if len(leaves) != count:
        raise ValueError(
            f"skip_outliers was made for {count} losses, got {len(leaves)}."
        )
    return loss_vector(losses, given, scales)


def _squared(update: Any) -> Any:
    """A number as large as Adam will make of it: its square may overflow."""
    if _is_float0(update) or not jnp.issubdtype(jnp.result_type(update), jnp.inexact):
        return 0
    return jnp.square(upcast(jnp.abs(update)))  # Complex ones have a size, too.


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0
