"""Auto-Lambda: weights that descend a validation loss one step ahead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each


@serializable_state
class AutoLambdaState(NamedTuple):
    """What :func:`auto_lambda` has learned."""

    meta_weights: jax.Array  # (K,), lambda
    opt_state: optax.OptState  # with counters for each loss


def auto_lambda(
    downstream: str | int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    step_size: float = 1.0,
    initial: PyTree = 0.1,
    downstream_weight: float | None = 0.0,
) -> LossWeighting:
    r"""Weights that descend the downstream loss as it is after one step of the model.

    With :math:`g_i` the gradient of loss i, and v that of the downstream loss at the
    end of the step :math:`\theta' = \theta - \alpha \sum_i \lambda_i g_i`,

    .. math::
      \frac{\partial L_D(\theta')}{\partial \lambda_i}
      = -\alpha \langle g_i, v \rangle,

    and an optimizer steps on :math:`\lambda`. All the inner products are one
    directional derivative of the losses along v.

    :func:`yoto_jax.value_and_grad` takes v on the training batch, at :math:`\theta`.
    With ``steering=yoto.on_validation(lookahead=alpha)`` it takes v on a validation
    batch, at :math:`\theta'`, as in the paper.

    Args:
      downstream: The loss to descend: its path or its index among the losses.
      optimizer: Steps on the weights; ``optax.adam(1e-4, eps=1e-16)`` if none is
        given, whose eps is small enough for inner products from 1e-14 to 1e18.
      step_size: :math:`\alpha`, the learning rate of the model. To Adam it makes no
        difference.
      initial: First weights: one number, one for each loss, or a tree like the losses.
      downstream_weight: Weight of the downstream loss itself. 0.0: it steers only.
        ``None``: it is learned as the others are, as in the paper.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the derivative of each loss along v.

    Raises:
      ValueError: In ``init``: no single loss is called ``downstream``, or there is no
        loss with a weight to learn.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> def loss_fn(x, center):
      ...     return {"helps": x**2, "hurts": (x - 9) ** 2, "label": (x - center) ** 2}
      >>> weighting = yoto.weightings.auto_lambda("label", optimizer=optax.sgd(1e-3))
      >>> state = weighting.init({"helps": 0.0, "hurts": 0.0, "label": 0.0})
      >>> step = yoto.value_and_grad(loss_fn, weighting, steering=yoto.on_validation())
      >>> x, training, validation = 3.0, 0.0, 1.0
      >>> _, grad, state = jax.jit(step)(x, state, (validation,), training)
      >>> print({k: round(float(w), 3) for k, w in state.loss_weights.items()})
      {'helps': 0.124, 'hurts': 0.052, 'label': 0.0}

    References:
      Liu et al., `Auto-Lambda: Disentangling Dynamic Task Relationships
      <https://arxiv.org/abs/2202.03091>`_, 2022.

    .. warning::
      A weight may become negative, as in the authors' code. Unlike there, the
      derivative is exact, and the step ahead has neither momentum nor weight decay.
    """
    tx = chosen(optimizer, optax.adam(1e-4, eps=1e-16))

    def current(meta_weights: jax.Array, spec: LossSpec) -> jax.Array:
        if downstream_weight is None:
            return meta_weights
        position = spec.position("downstream", downstream)
        own = jnp.asarray(downstream_weight, spec.dtype)
        return meta_weights.at[position].set(own)

    def init(spec: LossSpec) -> AutoLambdaState:
        spec.position("downstream", downstream)
        if downstream_weight is not None:
            spec.check_others("auto_lambda")
        meta_weights = spec.vector("initial", initial)
        return AutoLambdaState(meta_weights, init_each(tx, meta_weights))

    def update(
        losses: jax.Array,
        inner: AutoLambdaState,
        spec: LossSpec,
        *,
        alignment: jax.Array,
    ) -> tuple[jax.Array, AutoLambdaState]:
        del losses
        slope = -jnp.asarray(step_size, spec.dtype) * alignment
        meta_weights: Any
        moves = spec.present
        if moves is not None:  # Without the loss that steers, none of them does.
            moves = moves & moves[spec.position("downstream", downstream)]
        meta_weights, opt_state = descend(
            tx, slope, inner.opt_state, inner.meta_weights, moves
        )
        weights = current(meta_weights, spec)
        return weights, AutoLambdaState(meta_weights, opt_state)

    return make_weighting(
        init,
        update,
        needs=("alignment",),
        downstream=downstream,
        first_weights=lambda spec: current(spec.vector("initial", initial), spec),
    )
