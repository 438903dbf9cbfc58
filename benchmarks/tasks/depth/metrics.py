"""Metrics of monocular depth."""

import math

import jax
import jax.numpy as jnp

METRICS = ("A.Rel", "RMS", "RMSlog", "delta1", "SIlog", "CD", "FA")
MAX_DEPTH = 40.0
"""Metres. The thresholds of FA reach up to a twentieth of it."""
_THRESHOLDS = 100
_CLOUD = 256  # points at most, for distances between clouds


def depth_metrics(
    depth_hat: jax.Array,
    directions_hat: jax.Array,
    depth: jax.Array,
    directions: jax.Array,
    *,
    max_depth: float = MAX_DEPTH,
) -> dict[str, jax.Array]:
    """The seven metrics of every image, over its valid pixels.

    ``A.Rel``, ``delta1`` are shares (not percent), ``RMS`` and ``CD`` are in metres,
    ``RMSlog`` in units of log depth, ``SIlog`` (100 times the standard deviation of the
    error of log depth) and ``FA`` in percent.

    ``CD`` and ``FA`` compare the clouds of points of at most 256 pixels on a grid. With
    the distances to the nearest point of the other cloud, ``CD`` is the mean of both
    ways; ``FA`` is the F-score of the shares closer than a threshold, averaged over 100
    equally spaced thresholds up to ``max_depth / 20``.

    Args:
      depth_hat: Predicted metres along z, positive, [n, h, w].
      directions_hat: Predicted directions of the pixels, z = 1, [n, h, w, 3].
      depth: True metres, [n, h, w]. Pixels without depth have 0.
      directions: True directions, [n, h, w, 3].
      max_depth: Metres, one number for a whole set of images.

    Returns:
      [n] for each of ``METRICS``: NaN for images without a valid pixel, which
      ``mean_metrics`` leaves out.
    """
    valid = depth > 0
    safe = jnp.where(valid, depth, 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x, axis=(1, 2), where=valid)

    error = depth_hat - safe
    log_error = jnp.log(depth_hat) - jnp.log(safe)
    ratio = jnp.maximum(depth_hat / safe, safe / depth_hat)
    bias = mean(log_error)[:, None, None]
    there, back, points = _cloud_distances(depth_hat, directions_hat, depth, directions)
    return {
        "A.Rel": mean(jnp.abs(error) / safe),
        "RMS": jnp.sqrt(mean(error**2)),
        "RMSlog": jnp.sqrt(mean(log_error**2)),
        "delta1": mean((ratio < 1.25).astype(safe.dtype)),
        "SIlog": 100 * jnp.sqrt(mean((log_error - bias) ** 2)),
        "CD": (_mean(there, points) + _mean(back, points)) / 2,
        "FA": 100 * _f_area(there, back, points, max_depth / 20),
    }


def mean_metrics(
    metrics: dict[str, jax.Array], depth: jax.Array
) -> dict[str, jax.Array]:
    """Means over the images that have a valid pixel.

    Predictions that are not finite show: only missing depth is left out.
    """
    seen = jnp.any(depth > 0, axis=(1, 2))
    return {name: jnp.mean(x, where=seen) for name, x in metrics.items()}


def _cloud_distances(
    depth_hat: jax.Array,
    directions_hat: jax.Array,
    depth: jax.Array,
    directions: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Metres from each point to the other cloud, both ways, and which points count.

    [n, points] each.
    """
    grid = _grid(*depth.shape[1:])

    def cloud(depth: jax.Array, directions: jax.Array) -> jax.Array:
        points = depth[:, *grid][..., None] * directions[:, *grid]
        return points.reshape(len(points), -1, 3)

    def nearest(arguments: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hat, true, valid = arguments
        # Differences first: squares of large coordinates would cancel.
        squares = jnp.sum((hat[:, None] - true[None]) ** 2, axis=-1)
        there = jnp.min(jnp.where(valid[None, :], squares, jnp.inf), axis=1)
        back = jnp.min(jnp.where(valid[:, None], squares, jnp.inf), axis=0)
        return jnp.sqrt(there), jnp.sqrt(back)

    valid = (depth[:, *grid] > 0).reshape(len(depth), -1)
    clouds = cloud(depth_hat, directions_hat), cloud(depth, directions), valid
    there, back = jax.lax.map(nearest, clouds, batch_size=32)
    return there, back, valid


def _grid(height: int, width: int) -> tuple[slice, slice]:
    """Every k-th row and column, k the smallest that leaves few enough points."""
    k = 1
    while math.ceil(height / k) * math.ceil(width / k) > _CLOUD:
        k += 1
    return slice(k // 2, None, k), slice(k // 2, None, k)


def _mean(x: jax.Array, points: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=1, where=points)


def _f_area(
    there: jax.Array, back: jax.Array, points: jax.Array, reach: float
) -> jax.Array:
    """The mean F-score for thresholds up to ``reach``, [n]."""

    def f_score(threshold: jax.Array) -> jax.Array:
        precision = _mean((there < threshold).astype(there.dtype), points)
        recall = _mean((back < threshold).astype(back.dtype), points)
        some = precision + recall != 0  # or NaN, which stays
        product = 2 * precision * recall
        return jnp.where(some, product / jnp.where(some, precision + recall, 1), 0)

    steps = jnp.arange(1, _THRESHOLDS + 1, dtype=there.dtype)
    return jnp.mean(jax.vmap(f_score)(steps * (reach / _THRESHOLDS)), axis=0)
