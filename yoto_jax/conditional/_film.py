"""Conditioning layers as pure functions on dicts of arrays."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._checks import as_key, check_integers

SLOPE = 0.2  # of leaky ReLU in the reference


def init_film(
    key: jax.Array | int,
    encoding_size: int,
    features: int,
    *,
    hidden: Sequence[int] = (256,),
) -> dict[str, Any]:
    """Initialises the parameters of :func:`film`.

    The last layer is zero, so that :func:`film` changes nothing at the start, exactly.

    Args:
      key: A random key, or an integer seed.
      encoding_size: Size E of the encoding of loss weights.
      features: Number C of features to modulate.
      hidden: Widths of the hidden layers. ``()`` makes scale and shift linear in the
        encoding: the right choice behind a trunk that several layers share.

    Returns:
      A dict of lists of layers, each with ``"kernel"`` and ``"bias"``.

    Raises:
      TypeError: ``key`` is neither a key nor a seed, or a size is no integer.
      ValueError: A size that cannot be.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> params = conditional.init_film(jax.random.key(0), 1, 3, hidden=(16,))
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> print((conditional.film(params, x, jnp.ones((2, 1))) == x).all())
      True

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018. Dosovitskiy and
      Djolonga, `You Only Train Once
      <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.

    .. warning::
      The authors' code has two networks, one for scales and one for shifts, whose
      outputs it multiplies by 0.1 and 0.01: near the identity at the start, not at it.
    """
    check_sizes(encoding_size, features, hidden)
    widths = (encoding_size, *hidden, 2 * features)
    return {"film": init_mlp(as_key(key), widths, 0.0)}


def film(params: dict[str, Any], x: jax.Array, encoding: jax.Array) -> jax.Array:
    r"""FiLM: scales and shifts every feature by functions of the loss weights.

    .. math::
      y = (1 + s(c))\, x + t(c)

    Put it behind a linear layer and before the nonlinearity, or behind the
    normalisation of an attention block.

    Args:
      params: From :func:`init_film`.
      x: Features ``(n, ..., C)``: of a dense layer, an image, or tokens. Inside
        ``vmap`` over examples, those of one: ``(..., C)`` with an encoding ``(E,)``.
      encoding: From :func:`encode`: ``(n, E)``, one row per example; ``(1, E)`` or
        ``(E,)`` if all examples have the same weights, which costs least. With E = 0
        (no weight varies, and the parameters are of that size), ``x`` comes back.

    Returns:
      Array like ``x``, in its dtype.

    Raises:
      ValueError: Shapes do not match.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> params = conditional.init_film(jax.random.key(0), 1, 8)
      >>> images, encoding = jnp.ones((2, 4, 4, 8)), jnp.array([[-1.0], [1.0]])
      >>> conditional.film(params, images, encoding).shape
      (2, 4, 4, 8)

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018.
    """
    layers = params["film"]
    if is_empty(encoding, layers[0]["kernel"].shape[0]):
        return x
    scale, shift = jnp.split(mlp(layers, encoding), 2, axis=-1)
    return modulate(x, scale, shift)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    r"""Applies a given scale and shift to features: :math:`(1 + s)\, x + t`.

    For networks in any framework: a layer gives ``scale`` and ``shift``, with its
    parameters zero at the start.

    Args:
      x: Features ``(n, ..., C)``.
      scale: ``(n, C)``, ``(1, C)`` or ``(C,)``; 0 is no change.
      shift: Likewise.

    Returns:
      Array like ``x``, in its dtype.

    Raises:
      ValueError: Shapes do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> x, scale, shift = jnp.ones((1, 2)), jnp.array([0.5, 0.0]), jnp.ones(2)
      >>> print(conditional.modulate(x, scale, shift))
      [[2.5 2. ]]
    """
    scale, shift = (beside(x, v, "scale and shift") for v in (scale, shift))
    return ((1 + scale) * x + shift).astype(x.dtype)


def init_gate(encoding_size: int, features: int) -> dict[str, Any]:
    """Initialises the parameters of :func:`gate` with zeros: the identity.

    Args:
      encoding_size: Size E of the encoding of loss weights.
      features: Number C of features to gate.

    Returns:
      A dict with ``"kernel"`` ``(E, C)`` and ``"bias"`` ``(C,)``.

    Raises:
      TypeError: A size is no integer.
      ValueError: A size that cannot be.

    Examples:
      >>> import jax
      >>> from yoto_jax import conditional
      >>> params = conditional.init_gate(1, 3)
      >>> jax.tree.map(lambda x: x.shape, params)
      {'bias': (3,), 'kernel': (1, 3)}
    """
    check_sizes(encoding_size, features)
    kernel = jnp.zeros((encoding_size, features), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros((features,), jnp.float32)}


def gate(params: dict[str, Any], x: jax.Array, encoding: jax.Array) -> jax.Array:
    r"""Multiplies every feature by a gate, a function of the loss weights.

    .. math::
      y = 2\, \sigma(W c + b)\, x

    With two vectors per layer and encoded weight, the cheapest conditioning here.

    Args:
      params: From :func:`init_gate`.
      x: Features ``(n, ..., C)`` before the nonlinearity.
      encoding: ``(n, E)``, ``(1, E)`` or ``(E,)``; with E = 0, ``x`` comes back.

    Returns:
      Array like ``x``, in its dtype.

    Raises:
      ValueError: Shapes do not match.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> params = conditional.init_gate(1, 3)
      >>> print(conditional.gate(params, jnp.arange(3.0)[None], jnp.ones((1, 1))))
      [[0. 1. 2.]]

    References:
      Bae et al., `Multi-Rate VAE <https://arxiv.org/abs/2212.03905>`_, 2023. Their
      gates are not scaled by 2; here a gate is exactly 1 at the start.
    """
    if is_empty(encoding, params["kernel"].shape[0]):
        return x
    return open_gate(x, affine(params, encoding))


def open_gate(x: jax.Array, logits: jax.Array) -> jax.Array:
    """Multiplies features by gates, which are 1 where their logits are 0."""
    opened = beside(x, 2 * jax.nn.sigmoid(logits), "the gate")
    return (opened * x).astype(x.dtype)


def concatenate(x: jax.Array, encoding: jax.Array) -> jax.Array:
    """Appends the encoding of the loss weights to the features at every position.

    Args:
      x: Features ``(n, ..., C)``.
      encoding: ``(n, E)``, ``(1, E)`` or ``(E,)``.

    Returns:
      Array ``(n, ..., C + E)`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> conditional.concatenate(jnp.ones((2, 4, 4, 8)), jnp.ones((2, 1))).shape
      (2, 4, 4, 9)
    """
    aligned = beside(x, encoding, "the encoding", features=encoding.shape[-1])
    aligned = jnp.broadcast_to(aligned, (*x.shape[:-1], encoding.shape[-1]))
    return jnp.concatenate([x, aligned.astype(x.dtype)], axis=-1)


def check_sizes(encoding_size: int, features: int, hidden: Sequence[int] = ()) -> None:
    """Checks the sizes of a layer."""
    if not isinstance(hidden, list | tuple):
        raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}.")
    check_integers(encoding_size=encoding_size, features=features)
    for width in hidden:
        check_integers(hidden=width)
    if encoding_size < 0 or min(features, *hidden, 1) < 1:
        raise ValueError(
            "encoding_size must not be negative, features and hidden must be positive; "
            f"got {encoding_size}, {features} and {hidden}."
        )


def is_empty(encoding: jax.Array, size: int | None = None) -> bool:
    """Whether an encoding has no features, after a check of its shape."""
    if encoding.ndim not in (1, 2) or size not in (None, encoding.shape[-1]):
        wanted = "E" if size is None else size
        raise ValueError(
            f"the encoding of the loss weights must have shape (n, {wanted}), "
            f"(1, {wanted}) or ({wanted},), got {encoding.shape}."
        )
    return encoding.shape[-1] == 0


def beside(
    x: jax.Array, v: jax.Array, what: str, features: int | None = None
) -> jax.Array:
    """Reshapes ``(n, C)`` with axes of length 1 between to broadcast with ``x``."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"only floating-point features are conditioned, got {x.dtype}.")
    expected = x.shape[-1] if features is None else features
    shapes = [(expected,)]
    if x.ndim > 1:  # Else x is a single example.
        shapes += [(1, expected), (x.shape[0], expected)]
    if v.shape not in shapes:
        raise ValueError(
            f"{what} of shape {v.shape} cannot condition features of shape {x.shape}: "
            f"expected {' or '.join(map(str, shapes))}."
        )
    return v.reshape(v.shape[:-1] + (1,) * (x.ndim - v.ndim) + (expected,))


def init_mlp(
    key: jax.Array, widths: tuple[int, ...], gain: float
) -> list[dict[str, jax.Array]]:
    layers = []
    pairs = list(itertools.pairwise(widths))
    for i, (inputs, outputs) in enumerate(pairs):
        scale = gain if i == len(pairs) - 1 else 1.0
        # Variance 2 / inputs, as in the reference.
        deviation = scale * math.sqrt(2 / max(1, inputs))
        shape = (inputs, outputs)
        normal = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        bias = jnp.zeros((outputs,), jnp.float32)
        layers.append({"kernel": deviation * normal, "bias": bias})
    return layers


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.leaky_relu(affine(layer, x), SLOPE)
    return affine(layers[-1], x)


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    is_empty(x, layer["kernel"].shape[0])
    y = x @ layer["kernel"]
    return y + jnp.broadcast_to(layer["bias"], y.shape)
