"""You Only Train Once, with the loss logits in the state of the weighting."""

from typing import Any, NamedTuple

import jax
import optax

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import LossLogits, init_loss_logits, loss_weights
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._optimizers import adamw
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._inner_optimizer import descend, init_each


@serializable_state
class YotoState(NamedTuple):
    """What :func:`yoto` has learned."""

    mu: LossLogits  # (K,) logits, primary loss left out
    opt_state: optax.OptState  # with counters for each loss


def yoto(
    primary: str | int | None,
    *,
    epsilon: PyTree = 0.1,
    optimizer: optax.GradientTransformation | None = None,
) -> LossWeighting:
    r"""Softmax weights that descend the composite loss (YOTO), kept in the state.

    .. math::
      \lambda = \mathrm{Softmax}(\mu), \qquad
      \frac{\partial L_e}{\partial \mu_i} = \lambda_i (l_i - L_e),

    and an optimizer with hyperparameter decay that steps on :math:`\mu`. The logits are
    in the state instead of among the parameters; step for step the weights are those of
    :func:`yoto_jax.composite_loss` with the same optimizer for model and logits, as
    long as all losses are present. Each logit has a step count of its own here, which
    stands still while its loss is absent; there they share the model's.

    Args:
      primary: The loss whose logit stays 0, see :func:`yoto_jax.init_loss_logits`.
      epsilon: Initial weights relative to the primary loss.
      optimizer: What steps on the logits; :func:`yoto_jax.adamw` with a learning rate
        of 1e-3 if none is given. It should decay hyperparameters.

    Returns:
      A :class:`yoto_jax.LossWeighting`; its weights are positive and sum to 1.

    Raises:
      TypeError: ``primary`` is neither a path, nor an index, nor ``None``.
      ValueError: In ``init``: see :func:`yoto_jax.init_loss_logits`.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 2.0, "camera": 1.0}
      >>> weighting = yoto.weightings.yoto("depth", epsilon=0.25)
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'camera': 0.2, 'depth': 0.8}
      >>> state.inner.mu  # The smaller loss gains weight; it was log(0.25) = -1.386.
      LossLogits(camera=-1.385, depth=None)

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Eqs. 5 to 8 and Algorithm 1.
    """
    tx = adamw(1e-3) if optimizer is None else optimizer

    def logits(spec: LossSpec) -> LossLogits:
        losses = spec.structure.unflatten([spec.full(0.0)[0]] * spec.size)
        mu = init_loss_logits(losses, primary, epsilon=epsilon)
        return jax.tree.map(lambda x: x.astype(spec.dtype), mu)

    def init(spec: LossSpec) -> YotoState:
        mu: Any = logits(spec)
        return YotoState(mu, init_each(tx, mu))

    def weights(mu: LossLogits, spec: LossSpec) -> jax.Array:
        values = spec.vector("weights", loss_weights(mu))
        return values if spec.present is None else values / spec.sum(values)

    def update(
        losses: jax.Array, inner: YotoState, spec: LossSpec
    ) -> tuple[jax.Array, YotoState]:
        tree: Any = spec.structure.unflatten(list(losses))
        there = spec.presence
        slope = jax.grad(composite_loss, argnums=1)(tree, inner.mu, present=there)
        mu, state = descend(
            tx, slope, inner.opt_state, inner.mu, spec.present, present=there
        )
        return weights(inner.mu, spec), YotoState(mu, state)

    return make_weighting(
        init, update, first_weights=lambda spec: weights(logits(spec), spec)
    )
