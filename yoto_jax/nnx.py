"""Layers for Flax NNX. Needs ``pip install yoto_jax[flax]``."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.nnx needs Flax: pip install 'yoto_jax[flax]'"
    ) from error

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import PyTree, init_loss_logits, loss_weights
from yoto_jax._optimizers import unwrap_loss_logits as unwrap_loss_logits
from yoto_jax.conditional._film import (
    SLOPE,
    Initialization,
    check_initialization,
    is_empty,
    modulate,
    open_gate,
)


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


class FiLM(nnx.Module):
    r"""Scale and shift every feature by what the loss weights say.

    .. math::
      y = (1 + s(c))\, x + t(c)

    Put it behind ``nnx.Linear`` or ``nnx.Conv`` and before the nonlinearity, or behind
    the normalisation of an attention block. See :func:`yoto_jax.conditional.film`.

    Args:
      encoding_size: Size E of the encoding of the loss weights, see
        :func:`yoto_jax.conditional.encoding_size`. With 0 the layer does nothing.
      features: Number C of features to modulate.
      hidden: Widths of the hidden layers between encoding and modulation. ``()`` is a
        linear map: the choice behind a trunk of your own that several layers share.
      initialization: ``"identity"``: the layer changes nothing at the start, exactly.
        ``"reference"``: a network each for scale and shift, near the identity.
      gain: Of the last layers of the reference initialisation.
      dtype: Of the computation of scale and shift; default: that of its inputs.
      param_dtype: Of the parameters.
      rngs: Random streams; ``params`` is used.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from yoto_jax.nnx import FiLM
      >>> layer = FiLM(1, 8, hidden=(16,), rngs=nnx.Rngs(0))
      >>> images, encoding = jnp.ones((2, 4, 4, 8)), jnp.array([[-1.0], [1.0]])
      >>> print((layer(images, encoding) == images).all())
      True

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018. Dosovitskiy and
      Djolonga, `You Only Train Once
      <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.
    """

    def __init__(
        self,
        encoding_size: int,
        features: int,
        hidden: Sequence[int] = (256,),
        *,
        initialization: Initialization = "identity",
        gain: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_initialization(initialization)
        first = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        small = nnx.initializers.variance_scaling(2 * gain**2, "fan_in", "normal")

        def network(outputs: int, last: Any) -> nnx.List:
            pairs = list(itertools.pairwise((encoding_size, *hidden, outputs)))
            return nnx.List(
                nnx.Linear(
                    *pair,
                    kernel_init=last if i == len(pairs) - 1 else first,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for i, pair in enumerate(pairs)
            )

        self.encoding_size = encoding_size
        # Nothing to be told: nothing to learn from.
        if encoding_size == 0:
            self.networks = nnx.List([])
        elif initialization == "identity":
            zeros = nnx.initializers.zeros_init()
            self.networks = nnx.List([network(2 * features, zeros)])
        else:
            self.networks = nnx.List([network(features, small) for _ in range(2)])

    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Modulated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if is_empty(encoding, self.encoding_size):
            return x
        outputs = []
        for network in self.networks:
            c = encoding
            for i, layer in enumerate(network):
                c = layer(nnx.leaky_relu(c, SLOPE) if i else c)
            outputs.append(c)
        if len(outputs) == 1:
            outputs = jnp.split(outputs[0], 2, axis=-1)
        return modulate(x, *outputs)


class Gate(nnx.Module):
    r"""Multiply every feature by a gate that the loss weights open and close.

    .. math::
      y = 2\, \sigma(W c + b)\, x

    Exactly the identity at the start. See :func:`yoto_jax.conditional.gate`.

    Args:
      encoding_size: Size E of the encoding of the loss weights. With 0 the layer does
        nothing.
      features: Number C of features to gate.
      dtype: Of the computation of the gate; default: that of its inputs.
      param_dtype: Of the parameters.
      rngs: Random streams, accepted as all NNX modules do; nothing here is random.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from yoto_jax.nnx import Gate
      >>> x, encoding = jnp.arange(6.0).reshape(2, 3), jnp.array([[-1.0], [1.0]])
      >>> print((Gate(1, 3, rngs=nnx.Rngs(0))(x, encoding) == x).all())
      True

    References:
      Bae et al., `Multi-Rate VAE <https://arxiv.org/abs/2212.03905>`_, 2023.
    """

    def __init__(
        self,
        encoding_size: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.encoding_size = encoding_size
        if encoding_size == 0:
            return  # Nothing to be told: nothing to learn from.
        self.linear = nnx.Linear(
            encoding_size,
            features,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Gated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if is_empty(encoding, self.encoding_size):
            return x
        return open_gate(x, self.linear(encoding))
