"""Compact encoder and decoder for images, quick wherever many of them train at once.

Neighbouring pixels meet by shifts of groups of channels, followed by matrix products
(Wu et al., `Shift <https://arxiv.org/abs/1711.08141>`_, 2018). Convolutions would cost
an order of magnitude more here: under ``vmap`` over runs, those with a kernel for each
become grouped ones, and inside a loop XLA's CPU backend does without its fast kernels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

PATCH = 4


class ShiftConv(nn.Module):
    """Of [n, h, w, c], a ninth of the channels from each of the 3x3 pixels around."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return nn.Dense(self.features)(shifted(padded))


def shifted(x: jax.Array) -> jax.Array:
    """The shifts alone: [n, h - 2, w - 2, c] of [n, h, w, c]."""
    h, w, c = x.shape[-3] - 2, x.shape[-2] - 2, x.shape[-1]
    ends = [c * k // 9 for k in range(10)]
    ninths = [
        x[:, k // 3 : k // 3 + h, k % 3 : k % 3 + w, ends[k] : ends[k + 1]]
        for k in range(9)
    ]
    return jnp.concatenate(ninths, axis=-1)


def normalize(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the channels; what follows can scale and shift."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


class Block(nn.Module):
    """Residual: normalise, convolve, look around the whole image, convolve."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.gelu(ShiftConv(width)(normalize(x)))
        everywhere = nn.Dense(width)(jnp.mean(y, axis=(1, 2), keepdims=True))
        return x + ShiftConv(width)(nn.gelu(y + everywhere))


class Encoder(nn.Module):
    """Features [n, h / 4, w / 4, width] of images [n, h, w, 3] from 0 to 1.

    The features are normalised, so that a loss between those of two views can only fall
    by making them agree, not by making them small.
    """

    width: int
    blocks: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        n, h, w, _ = images.shape
        place = jnp.stack(
            jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij"),
            axis=-1,
        )
        place = jnp.broadcast_to(place, (n, h, w, 2))
        x = jnp.concatenate([4 * images - 2, place], axis=-1)
        x = nn.Dense(self.width)(to_patches(x))
        for _ in range(self.blocks):
            x = Block()(x)
        return normalize(x)


class Decoder(nn.Module):
    """Maps [n, h, w, channels] from features [n, h / 4, w / 4, width]."""

    channels: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = Block()(nn.Dense(features.shape[-1])(features))
        return from_patches(nn.Dense(PATCH**2 * self.channels)(normalize(x)))


def to_patches(x: jax.Array, patch: int = PATCH) -> jax.Array:
    """[n, h, w, c] to [n, h / patch, w / patch, patch^2 c]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h // patch, w // patch, -1)


def from_patches(x: jax.Array, patch: int = PATCH) -> jax.Array:
    """The inverse of :func:`to_patches`."""
    n, h, w, _ = x.shape
    x = x.reshape(n, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * patch, w * patch, -1)
