"""Weightings that learn nothing from batches with absurd losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._losses import PyTree, stack_present
from yoto_jax._numerics import all_finite
from yoto_jax._outliers import LossScales, OutlierRule, choose, loss_vector
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import (
    LossWeighting,
    and_present,
    check_state,
    mask_weights,
    without_absent,
)


@serializable_state
class SkipOutliersState(NamedTuple):
    """State of :func:`skip_outliers`; the batches skipped are counted inside."""

    loss_scales: LossScales
    accepted: jax.Array  # bool scalar, whether the last batch was good
    inner: Any


def skip_outliers(
    weighting: LossWeighting,
    limit: jax.typing.ArrayLike = 1e3,
    *,
    decay: jax.typing.ArrayLike = 0.99,
    patience: jax.typing.ArrayLike = 10,
    positive: bool = False,
    two_sided: bool = False,
    floor: jax.typing.ArrayLike = 1e-6,
) -> LossWeighting:
    r"""Learn nothing from a batch with a loss far larger than usual.

    A batch that is not finite leaves every weighting as it was. One loss of 1e10 is
    finite, and spoils running means and second moments for thousands of steps. With
    :math:`m_k` the running mean of :math:`|L_k|` over the batches accepted so far, this
    wrapper holds weights and state also if

    .. math::
      |L_k| > \mathtt{limit} \cdot m_k

    for any loss, and counts the batch in ``num_skipped``. The mean is the plain one of
    the first :math:`1 / (1 - \beta)` batches, then one with decay :math:`\beta`. It is
    the rule of :func:`yoto_jax.skip_outliers`, which keeps the same batches from the
    parameters: use both, with the same options.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`. Of several wrappers this should be
        the outermost: inside :func:`yoto_jax.weightings.normalize` it would see losses
        that are divided by the outlier already.
      limit: How many times larger than usual a loss may be (larger than 1, no unit).
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
      A :class:`yoto_jax.LossWeighting`. On batches that are all good it does what the
      weighting inside does.

    Raises:
      ValueError: ``limit`` is not larger than 1, ``decay`` is not in [0, 1), or
        ``patience`` or ``floor`` is negative.

    Examples:
      >>> import yoto_jax as yoto
      >>> scale_free = yoto.weightings.scale_invariant()
      >>> weighting = yoto.weightings.skip_outliers(scale_free)
      >>> state = weighting.init({"depth": 0.5})
      >>> for loss in (0.5, 0.25, 1e10, 0.25):
      ...     weights, state = weighting.update({"depth": loss}, state)
      ...     print(weights["depth"], state.inner.num_skipped)
      2.0 0
      4.0 0
      4.0 1
      4.0 1

    .. note::
      What it cannot see: the first batch of all, to which there is nothing to compare
      (if that one was the outlier, ``patience`` mends the mean); faults within a factor
      of ``limit``; faults that last longer than ``patience``; a change of sign or a
      constant 0, unless ``positive``: a log-likelihood may pass through 0, a hinge loss
      be 0 most of the time. Zeros never enter the mean.

    .. warning::
      Batches whose loss is rarely, but rightly, ``limit`` times the usual are never
      learned from. Watch ``num_skipped``, and raise ``limit`` if it grows where data
      and code are sound: 1e6 still keeps out what overflows.
    """
    rule = OutlierRule(limit, decay, patience, positive, two_sided, floor)

    def init(losses: PyTree) -> SkipOutliersState:
        inner = weighting.init(losses)
        leaves = jax.tree.leaves(_weights(inner))
        scales = rule.init(len(leaves), leaves[0].dtype)
        return SkipOutliersState(scales, jnp.ones((), jnp.bool_), inner)

    def update(
        losses: PyTree,
        state: SkipOutliersState,
        *,
        present: PyTree | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, SkipOutliersState]:
        check_state(state, SkipOutliersState)
        held = _weights(state.inner)
        structure = jax.tree.structure(held)
        values = loss_vector(losses, structure, state.loss_scales)
        mask = stack_present(present, structure)
        if mask is not None:
            statistics = {
                name: without_absent(x, mask) for name, x in statistics.items()
            }
        sound = all_finite(statistics)
        ok, scales = rule.judge(values, state.loss_scales, sound, mask)
        # What is thrown away is computed from ones: no complaint about a bad loss.
        tame = jax.tree.map(
            lambda x: jnp.where(ok, x, jnp.ones_like(x)),
            jax.tree.map(jnp.asarray, losses),
        )
        seen = and_present(weighting, statistics, present)
        weights, inner = weighting.update(tame, state.inner, **seen)
        unused = mask_weights(held, mask), _skip(state.inner)
        weights, inner = choose(ok, (weights, inner), unused)
        return weights, SkipOutliersState(scales, ok, inner)

    def observe(state: SkipOutliersState, **seen: Any) -> SkipOutliersState:
        assert weighting.observe is not None
        inner = weighting.observe(state.inner, **seen)
        return state._replace(inner=choose(state.accepted, inner, state.inner))

    def observe_step(
        losses: PyTree, state: SkipOutliersState, **kwargs: Any
    ) -> SkipOutliersState:
        assert weighting.observe_step is not None
        structure = jax.tree.structure(_weights(state.inner))
        values = loss_vector(losses, structure, state.loss_scales)
        mask = stack_present(kwargs.get("present"), structure)
        ok, _ = rule.judge(values, state.loss_scales, state.accepted, mask)
        inner = weighting.observe_step(losses, state.inner, **kwargs)
        return state._replace(inner=choose(ok, inner, state.inner))

    due = weighting.due
    return weighting._replace(
        init=init,
        update=update,
        needs=tuple(dict.fromkeys(("losses", *weighting.needs))),
        due=due and (lambda state: due(state.inner)),
        observe=weighting.observe and observe,
        observe_step=weighting.observe_step and observe_step,
    )


def _weights(state: Any) -> PyTree:
    return optax.tree.get(state, "loss_weights")


def _skip(state: Any) -> Any:
    """The state with one more batch counted as skipped, if it counts them."""
    count = optax.tree.get(state, "num_skipped")
    return state if count is None else optax.tree.set(state, num_skipped=count + 1)
