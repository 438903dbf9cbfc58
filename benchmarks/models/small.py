"""Models small enough to build here, without a library, for timing."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Losses = dict[str, Array]
NAMES = ("fit", "size", "class", "smooth")


class Model(NamedTuple):
    """A model and the shape of its batch."""

    init: Callable[[Array], Any]
    apply: Callable[[Any, Array], Array]
    inputs: tuple[int, ...]


def dense(key: Array, sizes: tuple[int, int]) -> dict[str, Array]:
    scale = 1 / np.sqrt(sizes[0])
    return {
        "w": jax.random.normal(key, sizes, jnp.float32) * scale,
        "b": jnp.zeros(sizes[1:], jnp.float32),
    }


def linear(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def mlp(*widths: int, batch: int) -> Model:
    def init(key: Array) -> Any:
        keys = jax.random.split(key, len(widths) - 1)
        pairs = itertools.pairwise(widths)
        return [dense(k, pair) for k, pair in zip(keys, pairs, strict=True)]

    def apply(params: Any, x: Array) -> Array:
        for layer in params[:-1]:
            x = jnp.tanh(linear(layer, x))
        return linear(params[-1], x)

    return Model(init, apply, (batch, widths[0]))


def convolutional(channels: int, depth: int, batch: int, side: int) -> Model:
    def init(key: Array) -> Any:
        keys = jax.random.split(key, depth + 1)
        widths = [3] + [channels] * depth
        kernels = [
            jax.random.normal(k, (3, 3, a, b), jnp.float32) / np.sqrt(9 * a)
            for k, a, b in zip(keys, widths[:-1], widths[1:], strict=False)
        ]
        return {"kernels": kernels, "head": dense(keys[-1], (channels, 10))}

    def apply(params: Any, x: Array) -> Array:
        for kernel in params["kernels"]:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = jax.nn.relu(y)
            x = y if x.shape != y.shape else x + y
        return linear(params["head"], x.mean((1, 2)))

    return Model(init, apply, (batch, side, side, 3))


def transformer(width: int, depth: int, heads: int, batch: int, length: int) -> Model:
    def block(key: Array) -> Any:
        keys = jax.random.split(key, 4)
        return {
            "qkv": dense(keys[0], (width, 3 * width)),
            "out": dense(keys[1], (width, width)),
            "up": dense(keys[2], (width, 4 * width)),
            "down": dense(keys[3], (4 * width, width)),
        }

    def init(key: Array) -> Any:
        return [block(k) for k in jax.random.split(key, depth)]

    def norm(x: Array) -> Array:
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
            x.var(-1, keepdims=True) + 1e-5
        )

    def apply(params: Any, x: Array) -> Array:
        for layer in params:
            split = linear(layer["qkv"], norm(x)).reshape(batch, length, 3, heads, -1)
            mixed = jax.nn.dot_product_attention(*jnp.moveaxis(split, 2, 0))
            x = x + linear(layer["out"], mixed.reshape(x.shape))
            x = x + linear(layer["down"], jax.nn.gelu(linear(layer["up"], norm(x))))
        return x

    return Model(init, apply, (batch, length, width))


class Shared(NamedTuple):
    """A model with a shared encoder and four heads, each with a loss of its own."""

    init: Callable[[Array], Any]
    encoder: Callable[[Any, Array], Array]
    inputs: tuple[int, ...]


def with_heads(model: Model, width: int) -> Shared:
    """Four linear heads of ten outputs on what ``model`` gives, of ``width``."""

    def init(key: Array) -> Any:
        keys = jax.random.split(key, 5)
        kernels = {
            name: jax.random.normal(k, (width, 10), jnp.float32) / np.sqrt(width)
            for name, k in zip(NAMES, keys[1:], strict=True)
        }
        return {"encoder": model.init(keys[0]), "heads": kernels}

    encoder = lambda params, x: model.apply(params["encoder"], x)
    return Shared(init, encoder, model.inputs)


def residual(channels: int, blocks: int, batch: int, side: int) -> Shared:
    """A stem and blocks of two convolutions with a skip, averaged over the image."""

    def init(key: Array) -> Any:
        stem, *keys = jax.random.split(key, 2 * blocks + 1)
        normal = lambda k, n: jax.random.normal(k, (3, 3, n, channels), jnp.float32)
        return {
            "stem": normal(stem, 3) / np.sqrt(27),
            "blocks": [normal(k, channels) / np.sqrt(9 * channels) for k in keys],
        }

    def convolve(x: Array, kernel: Array) -> Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    def apply(params: Any, x: Array) -> Array:
        x = convolve(x, params["stem"])
        for k in range(0, 2 * blocks, 2):
            y = jax.nn.relu(convolve(jax.nn.relu(x), params["blocks"][k]))
            x = x + convolve(y, params["blocks"][k + 1])
        return x.mean((1, 2))

    inputs = (batch, side, side, 3)
    return with_heads(Model(init, apply, inputs), channels)


def heads(params: Any, z: Array, x: Array) -> Losses:
    del x
    flat = z.reshape(-1, z.shape[-1])
    y = {name: flat @ kernel for name, kernel in params["heads"].items()}
    logits = y["class"]
    return {
        "fit": jnp.mean((y["fit"] - 1.0) ** 2),
        "size": jnp.mean(jnp.abs(y["size"])) + 0.1,
        "class": jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0]),
        "smooth": jnp.mean((y["smooth"][1:] - y["smooth"][:-1]) ** 2),
    }
