"""Weightings that learn nothing from batches with absurd losses."""

from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._losses import (
    Losses,
    Present,
    PyTree,
    loss_vector,
    stack_present,
)
from yoto_jax._numerics import all_finite, select
from yoto_jax._outliers import (
    OutlierRule,
    SkipOutliersState,
    as_rule,
)
from yoto_jax._weighting import (
    LossWeighting,
    and_present,
    check_state,
    check_weighting,
    mask_weights,
    skipped_between,
    weights_of,
    without_absent,
)


def skip_outliers(
    weighting: LossWeighting, rule: OutlierRule | None = None
) -> LossWeighting:
    """Holds weights and state on a batch with a loss far larger than usual.

    A batch that is not finite leaves every weighting as it was; this wrapper holds
    weights and state also if the rule calls the losses bad. It is the rule of
    :func:`yoto_jax.skip_outliers`, which keeps such batches from the parameters: use
    both, with the same rule.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`. Of several wrappers this should be
        the outermost: inside :func:`yoto_jax.weightings.normalize` it would see losses
        that are divided by the outlier already.
      rule: Which losses are outliers; ``yoto_jax.OutlierRule()`` if none is given.

    Returns:
      A :class:`yoto_jax.LossWeighting`, which counts the batches that it or the
      weighting inside skips in ``num_skipped`` of its state. On batches that are all
      good it does what the weighting inside does.

    Raises:
      TypeError: ``rule`` is something else, such as a bare limit.

    Examples:
      >>> import yoto_jax as yoto
      >>> scale_free = yoto.weightings.scale_invariant()
      >>> weighting = yoto.weightings.skip_outliers(scale_free)
      >>> state = weighting.init({"depth": 0.5})
      >>> for loss in (0.5, 0.25, 1e10, 0.25):
      ...     weights, state = weighting.update({"depth": loss}, state)
      ...     print(weights["depth"], state.num_skipped)
      2.0 0
      4.0 0
      4.0 1
      4.0 1
    """
    check_weighting(weighting)
    rule = as_rule(rule)

    def init(losses: Losses) -> SkipOutliersState:
        inner = weighting.init(losses)
        leaves = jax.tree.leaves(weights_of(inner))
        return rule.init(len(leaves), leaves[0].dtype, inner)

    def update(
        losses: Losses,
        state: SkipOutliersState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, SkipOutliersState]:
        check_state(state, SkipOutliersState)
        held = weights_of(state.inner)
        structure = jax.tree.structure(held)
        values = loss_vector(losses, structure, state.loss_scales.means.dtype)
        mask = stack_present(present, structure)
        if mask is not None:
            statistics = {
                name: without_absent(x, mask) for name, x in statistics.items()
            }
        after = rule.step(state, values, all_finite(statistics), mask)
        ok = after.accepted
        # What is thrown away is computed from ones: no complaint about a bad loss.
        tame = jax.tree.map(
            lambda x: jnp.where(ok, x, jnp.ones_like(x)),
            jax.tree.map(jnp.asarray, losses),
        )
        seen = and_present(weighting, statistics, present)
        weights, inner = weighting.update(tame, state.inner, **seen)
        # What the weighting itself refuses is counted here as well, and not twice.
        refused = ok & (skipped_between(state.inner, inner) > 0)
        bad = state._replace(
            num_skipped=state.num_skipped + 1, accepted=jnp.zeros((), jnp.bool_)
        )
        unused = mask_weights(held, mask), state.inner
        weights, inner = select(ok & ~refused, (weights, inner), unused)
        return weights, select(refused, bad, after._replace(inner=inner))

    def observe(state: SkipOutliersState, **seen: Any) -> SkipOutliersState:
        assert weighting.observe is not None
        inner = weighting.observe(state.inner, **seen)
        return state._replace(inner=select(state.accepted, inner, state.inner))

    def observe_step(
        losses: Losses, state: SkipOutliersState, **kwargs: Any
    ) -> SkipOutliersState:
        assert weighting.observe_step is not None
        structure = jax.tree.structure(weights_of(state.inner))
        values = loss_vector(losses, structure, state.loss_scales.means.dtype)
        mask = stack_present(kwargs.get("present"), structure)
        ok, _ = rule.judge(values, state.loss_scales, state.accepted, mask)
        inner = weighting.observe_step(losses, state.inner, **kwargs)
        return state._replace(inner=select(ok, inner, state.inner))

    due = weighting.due
    return weighting._replace(
        init=init,
        update=update,
        needs=tuple(dict.fromkeys(("losses", *weighting.needs))),
        due=due and (lambda state: due(state.inner)),
        observe=weighting.observe and observe,
        observe_step=weighting.observe_step and observe_step,
    )
