"""The composite loss as a Flax Linen layer. Needs ``pip install yoto_jax[flax]``."""

import dataclasses

import jax

try:
    from flax import linen as nn
    from flax import serialization
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.linen needs Flax: pip install 'yoto_jax[flax]'"
    ) from error

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import (
    LossLogits,
    PyTree,
    check_loss_logits,
    init_loss_logits,
    loss_weights,
)


def _from_state_dict(mu: LossLogits, state: dict[str, jax.Array]) -> LossLogits:
    restored = dataclasses.replace(mu, learned=state["learned"])
    check_loss_logits(restored)
    return restored


serialization.register_serialization_state(
    LossLogits, lambda mu: {"learned": mu.learned}, _from_state_dict
)


class CompositeLoss(nn.Module):
    r"""Composite loss layer: :math:`L_e = \sum_i \mathrm{Softmax}(\mu)_i\, l_i`.

    The loss logits are the parameter ``"loss_logits"`` of the layer. Train them with
    :func:`yoto_jax.adamw` or :func:`yoto_jax.sgdw` like any other parameter. Called
    with a tree of scalar losses, the layer returns the composite loss, and sows the
    loss weights into the collection ``"intermediates"`` for logging.

    Attributes:
      primary: Path or index of the primary loss, or ``None``.
      epsilon: Initial weights relative to the primary loss, see
        :func:`yoto_jax.init_loss_logits`.

    Examples:
      >>> import jax, yoto_jax as yoto
      >>> from yoto_jax.linen import CompositeLoss
      >>> layer = CompositeLoss(primary="depth", epsilon=0.25)
      >>> losses = {"depth": 2.0, "camera": 1.0}
      >>> variables = layer.init(jax.random.key(0), losses)
      >>> loss, logs = layer.apply(variables, losses, mutable="intermediates")
      >>> print(round(float(loss), 2))
      1.8
      >>> weights = logs["intermediates"]["loss_weights"][0]
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'camera': 0.2, 'depth': 0.8}

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Section 3.1.
    """

    primary: str | int | None
    epsilon: PyTree = 0.1

    @nn.compact
    def __call__(self, losses: PyTree) -> jax.Array:
        """Composite loss of a tree of scalar losses."""
        if self.has_variable("params", "loss_logits"):
            # Not self.param, which would compare shapes first and hide our message
            # on losses that do not match.
            mu = self.get_variable("params", "loss_logits")
        else:
            mu = self.param(
                "loss_logits",
                lambda _: init_loss_logits(losses, self.primary, self.epsilon),
            )
        self.sow("intermediates", "loss_weights", loss_weights(mu))
        return composite_loss(losses, mu)
