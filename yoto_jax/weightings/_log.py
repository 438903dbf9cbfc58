"""Weightings of the logarithms of the losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._losses import Losses, Present, PyTree, split
from yoto_jax._make_weighting import loss_values, refuse_losses
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    LossWeighting,
    check_state,
    check_weighting,
    mask_weights,
    of_inner,
    weights_of,
)
from yoto_jax.weightings._wrappers import observing_inner, update_rescaled


@serializable_state
class LogState(NamedTuple):
    """State of :func:`log`."""

    inner: Any  # with weights for the losses as they come in its ``loss_weights``
    log_weights: PyTree  # what the weighting inside has there, of the log losses

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def log(weighting: LossWeighting) -> LossWeighting:
    r"""Applies a weighting to the logarithms of the losses.

    .. math::
      w_k = \frac{1}{L_k}\, \mathrm{weighting}(\log L)_k, \qquad
      \nabla \log L_k = \frac{\nabla L_k}{L_k},

    so that :math:`\sum_k w_k \nabla L_k` is the composite gradient of the log losses.
    What the weighting sees are log losses and statistics of their gradients. If it
    looks at gradients alone, that sum does not depend on the unit of any loss.

    Args:
      weighting: A :class:`yoto_jax.LossWeighting` for losses of any sign.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses. Its ``loss_weights`` apply
      to the losses as they come.

    Raises:
      ValueError: The weighting needs losses that are positive, or not negative, or a
        statistic of which it is not known what the logarithm does to it. In ``update``
        outside ``jit``: a loss is not positive. Inside ``jit`` such a batch leaves the
        weights as they were.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.log(yoto.weightings.mgda())
      >>> losses = {"depth": 0.5, "camera": 4.0}
      >>> gramian = jnp.array([[16.0, 0.0], [0.0, 0.25]])  # camera, depth
      >>> state = weighting.init(losses)
      >>> weights, state = weighting.update(losses, state, gramian=gramian)
      >>> print({name: float(weight) for name, weight in weights.items()})
      {'camera': 0.125, 'depth': 1.0}

    References:
      LOG-MGDA, LOG-CAGrad and LOG-IMTL-G of the `code of FAMO
      <https://github.com/Cranial-XIX/FAMO>`_ are ``log(mgda())`` and so on; Lin et al.,
      `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, do
      likewise. All but LOG-CAGrad add 1e-8 to the losses; LOG-MGDA's weights sum to 1.

    .. warning::
      A weight grows without bound as its loss goes to 0. Heads that follow no weights
      (:func:`yoto_jax.of_representation`) descend the losses, not their logarithms. A
      downstream gradient is divided by the downstream loss of the training batch. Where
      :func:`yoto_jax.weightings.every` inside holds weights, it holds those of losses.
    """
    check_weighting(weighting)
    if weighting.positive:
        raise ValueError(
            "log shows a weighting the logarithms of the losses, of any sign, and this "
            "one needs positive losses, or losses above bounds that are not negative: "
            "leave out log, or take normalize."
        )
    known = {*GRADIENT_STATISTICS, "losses", "alignment"}
    if strange := sorted({*weighting.needs} - known):
        raise ValueError(
            f"log cannot tell what {', '.join(strange)} of the log losses would be."
        )

    def init(losses: Losses) -> LogState:
        inner = weighting.init(losses)
        return LogState(inner, jax.tree.map(jnp.copy, weights_of(inner)))

    def update(
        losses: Losses,
        state: LogState,
        *,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, LogState]:
        check_state(state, LogState)
        spec, values = loss_values(losses, state, present)
        remedy = "Shift it, or weigh the losses without log."
        refuse_losses(values <= 0, values, spec, "positive losses", remedy)
        # Without a logarithm all is NaN, so that the weighting inside skips the batch.
        values = jnp.where((values > 0) & jnp.isfinite(values), values, jnp.nan)
        weights, inner, own, _ = update_rescaled(
            weighting,
            state.inner,
            state.log_weights,
            jnp.log(values),
            values,
            {name: x for name, x in statistics.items() if name in known},
            present,
        )
        return mask_weights(weights, spec.present), LogState(inner, own)

    def observe_step(losses: Losses, state: LogState, **kwargs: Any) -> LogState:
        assert weighting.observe_step is not None
        spec, values = loss_values(losses, state, None)
        logs = split(jnp.log(values), spec.structure)
        return state._replace(inner=weighting.observe_step(logs, state.inner, **kwargs))

    return observing_inner(weighting)._replace(
        init=init,
        update=update,
        needs=tuple(dict.fromkeys(("losses", *weighting.needs))),
        observe_step=weighting.observe_step and observe_step,
        positive=True,
    )
