"""Layers for Flax Linen: ``pip install 'yoto_jax[flax]'``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.linen needs Flax: pip install 'yoto_jax[flax]'"
    ) from error

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import init_loss_logits, weights_of_present
from yoto_jax._losses import Losses, Present, PyTree
from yoto_jax.conditional._film import (
    SLOPE,
    is_empty,
    modulate,
    open_gate,
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
    def __call__(self, losses: Losses, *, present: Present | None = None) -> jax.Array:
        """Returns the composite loss of a tree of scalar losses."""
        if self.has_variable("params", "loss_logits"):
            # Not self.param, which would compare shapes first and hide our message
            # on losses that do not match.
            mu = self.get_variable("params", "loss_logits")
        else:
            mu = self.param(
                "loss_logits",
                lambda _: init_loss_logits(losses, self.primary, epsilon=self.epsilon),
            )
        weights = weights_of_present(mu, present)
        self.sow("intermediates", "loss_weights", weights)
        return composite_loss(losses, mu, present=present)


def _is_empty(layer: nn.Module, encoding: jax.Array) -> bool:
    """Whether the encoding is empty; an error if the layer has parameters for one."""
    empty = is_empty(encoding)
    if empty and layer.variables.get("params"):
        raise ValueError(
            f"this layer was initialised with encoded loss weights and got none, of "
            f"shape {encoding.shape}: encode with the same support."
        )
    return empty


class FiLM(nn.Module):
    r"""FiLM: scales and shifts every feature by functions of the loss weights.

    .. math::
      y = (1 + s(c))\, x + t(c)

    The layer changes nothing at the start, exactly: its last kernel is zero. Put it
    behind ``nn.Dense`` or ``nn.Conv`` and before the nonlinearity, or behind the
    normalisation of an attention block. See :func:`yoto_jax.conditional.film`.

    Attributes:
      hidden: Widths of the hidden layers between encoding and modulation. ``()`` is a
        linear map: the choice behind a trunk of your own that several layers share.
      dtype: Of the computation of scale and shift; default: that of its inputs.
      param_dtype: Of the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax.linen import FiLM
      >>> images, encoding = jnp.ones((2, 4, 4, 8)), jnp.array([[-1.0], [1.0]])
      >>> layer = FiLM(hidden=(16,))
      >>> variables = layer.init(jax.random.key(0), images, encoding)
      >>> print((layer.apply(variables, images, encoding) == images).all())
      True

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018. Dosovitskiy and
      Djolonga, `You Only Train Once
      <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.
    """

    hidden: Sequence[int] = (256,)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Returns modulated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if _is_empty(self, encoding):
            return x
        first = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        c = encoding
        for i, width in enumerate((*self.hidden, 2 * x.shape[-1])):
            last = i == len(self.hidden)
            c = nn.leaky_relu(c, SLOPE) if i else c
            c = nn.Dense(
                width,
                kernel_init=nn.initializers.zeros if last else first,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"film_{i}",
            )(c)
        return modulate(x, *jnp.split(c, 2, axis=-1))


class Gate(nn.Module):
    r"""Multiplies every feature by a gate, a function of the loss weights.

    .. math::
      y = 2\, \sigma(W c + b)\, x

    Exactly the identity at the start. See :func:`yoto_jax.conditional.gate`.

    Attributes:
      dtype: Of the computation of the gate; default: that of its inputs.
      param_dtype: Of the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax.linen import Gate
      >>> x, encoding = jnp.arange(6.0).reshape(2, 3), jnp.array([[-1.0], [1.0]])
      >>> variables = Gate().init(jax.random.key(0), x, encoding)
      >>> print((Gate().apply(variables, x, encoding) == x).all())
      True

    References:
      Bae et al., `Multi-Rate VAE <https://arxiv.org/abs/2212.03905>`_, 2023.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Returns gated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if _is_empty(self, encoding):
            return x
        logits = nn.Dense(
            x.shape[-1],
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="gate",
        )(encoding)
        return open_gate(x, logits)
