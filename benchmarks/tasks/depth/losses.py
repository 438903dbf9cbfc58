"""Losses of monocular depth."""

import jax
import jax.numpy as jnp

from benchmarks.tasks.depth.views import Warp, relative, seen_by_both, warp_images

_SCALE_WEIGHT = 0.15  # of the mean error of log depth in silog


def silog(log_prediction: jax.Array, depth: jax.Array) -> jax.Array:
    """Scale-invariant error of log depth, over the valid pixels of the whole batch.

    ``sqrt(Var(e) + 0.15 mean(e)^2)`` with the error ``e`` of log depth. Zero, with zero
    gradient, where there is nothing to improve: all errors zero or no pixel valid.

    Args:
      log_prediction: Natural logarithm of metres, any shape.
      depth: Metres, same shape. Pixels without depth have 0.
    """
    valid = depth > 0
    n = jnp.maximum(jnp.sum(valid), 1)
    error = jnp.where(valid, log_prediction - jnp.log(jnp.where(valid, depth, 1)), 0)
    mean = jnp.sum(error) / n
    variance = jnp.sum(jnp.where(valid, (error - mean) ** 2, 0)) / n
    return _sqrt(variance + _SCALE_WEIGHT * mean**2)


def camera(angles_hat: jax.Array, angles: jax.Array) -> jax.Array:
    """Mean squared error of ray angles [..., h, w, 2], in radians squared."""
    return jnp.mean((angles_hat - angles) ** 2)


def invariance(
    features1: jax.Array, features2: jax.Array, warp1: "Warp", warp2: "Warp"
) -> jax.Array:
    """Mean absolute difference of the features of two views of the same images.

    The features of view 1 are brought into the frame of view 2 and compared where both
    views see the image. The features of view 2 are a constant target: no gradient.

    Args:
      features1: Of the images seen through ``warp1``, [n, h, w, c].
      features2: Of the images seen through ``warp2``, [n, h, w, c].
      warp1: Of n images.
      warp2: Of n images.
    """
    _, height, width, channels = features1.shape
    moved = warp_images(features1, relative(warp2, warp1))
    difference = jnp.abs(moved - jax.lax.stop_gradient(features2))
    shared = seen_by_both(warp1, warp2, height, width)
    total = jnp.sum(jnp.where(shared[..., None], difference, 0))
    return total / (channels * jnp.maximum(jnp.sum(shared), 1))


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 instead of infinity at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)
