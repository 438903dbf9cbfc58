"""Fast adaptive multitask optimization."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yoto_jax._checks import check_not_negative
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting, refuse_losses
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._inner_optimizer import descend, init_each


@serializable_state
class FamoState(NamedTuple):
    """What :func:`famo` has learned, and the losses it waits to see improved."""

    task_logits: jax.Array  # (K,)
    log_gaps: jax.Array  # (K,) log of the last losses above their lower bounds
    has_gaps: jax.Array  # bool (K,), whether there is one to learn from
    opt_state: optax.OptState  # with counters for each loss


def famo(
    *,
    learning_rate: optax.ScalarOrSchedule = 0.025,
    gamma: float = 1e-3,
    lower_bounds: PyTree = 0.0,
    exact: bool = False,
) -> LossWeighting:
    r"""Equal progress on the logarithms of all losses, from the losses alone (FAMO).

    .. math::
      w_i = c\, \frac{z_i}{D_i}, \qquad z = \mathrm{Softmax}(\xi), \qquad
      D_i = L_i - b_i + 10^{-8}, \qquad c = \Big( \sum_j z_j / D_j \Big)^{-1}.

    The logits :math:`\xi` descend
    :math:`z^\top (\log D - \log D') + \gamma \|\xi\|^2 / 2`, the slowest relative
    improvement; the losses of the next update serve as :math:`D'`. Losses below 1e-8
    count as that: scale all of them up.

    Args:
      learning_rate: Of Adam on the logits.
      gamma: Decay of the logits towards equal weights, added to the gradient in front
        of Adam, as in the authors' code.
      lower_bounds: b, in the units of the losses: one number, one per loss in the order
        of ``jax.tree.leaves``, or a tree like the losses.
      exact: Whether to learn nothing before ``observe_step(losses, state)`` is told the
        losses of the same batch after the step: another forward pass.

    Returns:
      A :class:`yoto_jax.LossWeighting`; its weights are positive and sum to 1.

    Raises:
      ValueError: ``gamma`` is negative. In ``init``: ``lower_bounds`` does not fit the
        losses. In ``update`` outside ``jit``: a loss is below its bound. Inside ``jit``
        such a batch leaves the weights as they were.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "camera": 2.0}
      >>> weighting = yoto.weightings.famo()
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> losses = {"depth": 0.1, "camera": 2.0}  # Only one of them improves, so
      >>> weights, state = weighting.update(losses, state)
      >>> print(state.inner.task_logits.round(3))  # the other one gains.
      [ 0.025 -0.025]

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, 2023, Algorithm 1.

    .. warning::
      The authors also clip the norm of the shared gradient to 1: put
      ``optax.clip_by_global_norm(1.0)`` in front of the model's optimizer.
    """
    check_not_negative(gamma=gamma)
    tx = optax.chain(optax.add_decayed_weights(gamma), optax.adam(learning_rate))

    def bounds(spec: LossSpec) -> jax.Array:
        return spec.vector("lower_bounds", lower_bounds)

    def init(spec: LossSpec) -> FamoState:
        bounds(spec)  # To be told now if they do not fit.
        logits = spec.full(0.0)
        return FamoState(
            task_logits=logits,
            log_gaps=spec.full(0.0),
            has_gaps=jnp.zeros((spec.size,), jnp.bool_),
            opt_state=init_each(tx, logits),
        )

    def log_gaps(losses: jax.Array, spec: LossSpec) -> jax.Array:
        gaps = losses - bounds(spec)
        refuse_losses(
            gaps < 0,
            losses,
            spec,
            "losses above their lower bounds",
            "Give famo(lower_bounds=...), or choose another weighting.",
        )
        # A result that is not finite makes the caller hold weights and state.
        gaps = jnp.where(gaps >= 0, gaps + 1e-8, jnp.nan)
        return jnp.log(spec.of_present(gaps, 1))

    def learn(gaps: jax.Array, inner: FamoState, spec: LossSpec) -> FamoState:
        seen = spec.of_present(inner.has_gaps, False)  # both times
        improvement = inner.log_gaps - gaps
        shares = dataclasses.replace(spec, present=seen).softmax(inner.task_logits)
        slope = shares * (improvement - jnp.sum(shares * improvement))
        logits, state = descend(
            tx, slope, inner.opt_state, inner.task_logits, moves=seen
        )
        return inner._replace(task_logits=logits, opt_state=state)

    def update(
        losses: jax.Array, inner: FamoState, spec: LossSpec
    ) -> tuple[jax.Array, FamoState]:
        gaps = log_gaps(losses, spec)
        if not exact:
            inner = learn(gaps, inner, spec)
        # c z / D in logarithms; the sum is 1 because c makes it so.
        weights = spec.softmax(inner.task_logits - gaps)
        return weights, inner._replace(
            log_gaps=gaps, has_gaps=jnp.ones_like(inner.has_gaps)
        )

    def observe_step(losses: jax.Array, inner: FamoState, spec: LossSpec) -> FamoState:
        inner = learn(log_gaps(losses, spec), inner, spec)
        # One step, one lesson: after a batch that was held there is none.
        return inner._replace(has_gaps=jnp.zeros_like(inner.has_gaps))

    weighting = make_weighting(
        init,
        update,
        first_weights=LossSpec.equal,
        observe_step=observe_step if exact else None,
    )
    # It takes losses of zero, which make_weighting would refuse.
    return weighting._replace(positive=not _may_be_negative(lower_bounds))


def _may_be_negative(bounds: PyTree) -> bool:
    leaves = jax.tree.leaves(bounds)
    known = [x for x in leaves if not isinstance(x, jax.core.Tracer)]
    return len(known) < len(leaves) or any(
        bool(np.any(np.asarray(x) < 0)) for x in known
    )
