"""The composite loss as a Flax NNX layer. Needs ``pip install yoto_jax[flax]``."""

import jax

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.nnx needs Flax: pip install 'yoto_jax[flax]'"
    ) from error

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import PyTree, init_loss_logits, loss_weights
from yoto_jax._optimizers import unwrap_loss_logits as unwrap_loss_logits


class CompositeLoss(nnx.Module):
    r"""Composite loss layer: :math:`L_e = \sum_i \mathrm{Softmax}(\mu)_i\, l_i`.

    The loss logits are an ``nnx.Param``. Train them with :func:`yoto_jax.adamw` or
    :func:`yoto_jax.sgdw` in an ``nnx.Optimizer`` like any other parameter, or with an
    optimizer of your own inside :func:`unwrap_loss_logits`.

    Args:
      losses: Tree of scalar losses, or of anything with their shape and dtype.
      primary: Path or index of the primary loss, or ``None``.
      epsilon: Initial weights relative to the primary loss, see
        :func:`yoto_jax.init_loss_logits`.
      rngs: Not used.

    Attributes:
      loss_logits: The parameter.

    Examples:
      >>> from yoto_jax.nnx import CompositeLoss
      >>> layer = CompositeLoss({"depth": 0.0, "camera": 0.0}, "depth", epsilon=0.25)
      >>> print(round(float(layer({"depth": 2.0, "camera": 1.0})), 2))
      1.8
      >>> weights = layer.loss_weights
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'camera': 0.2, 'depth': 0.8}

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Section 3.1.
    """

    def __init__(
        self,
        losses: PyTree,
        primary: str | int | None,
        epsilon: PyTree = 0.1,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs  # Accepted as all NNX modules do; nothing here is random.
        self.loss_logits = nnx.Param(init_loss_logits(losses, primary, epsilon))

    def __call__(self, losses: PyTree) -> jax.Array:
        """Composite loss of a tree of scalar losses."""
        return composite_loss(losses, self.loss_logits.get_value())

    @property
    def loss_weights(self) -> PyTree:
        """The current loss weights, a tree like the losses."""
        return loss_weights(self.loss_logits.get_value())
