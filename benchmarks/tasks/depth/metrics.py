"""Monocular depth: losses, geometric views and metrics.

A camera looks along z, x points right and y down. An image spans one unit of width and
one of height around its centre, whatever its resolution: images, features and depth of
any size share these coordinates. Focal lengths are in image widths, pixels are square.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Key = jax.Array

METRICS = ("A.Rel", "RMS", "RMSlog", "delta1", "SIlog", "CD", "FA")
MAX_DEPTH = 40.0
"""Metres. The thresholds of FA reach up to a twentieth of it."""

_SCALE_WEIGHT = 0.15  # of the mean error of log depth in silog
_THRESHOLDS = 100
_CLOUD = 256  # points at most, for distances between clouds

# Losses.


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


# Views: what is at p in the image is at scale * p + shift in the view.


class Warp(NamedTuple):
    """Views of n images: zoomed about the centre, then moved."""

    scale: jax.Array  # [n], above 1 zooms in
    shift: jax.Array  # [n, 2], right and down, in image widths and heights


def identity(n: int) -> Warp:
    return Warp(jnp.ones(n), jnp.zeros((n, 2)))


def random_warp(key: Key, n: int, scale: tuple[float, float] = (1.0, 1.6)) -> Warp:
    """Views that stay inside the image or, zoomed out, show all of it.

    Args:
      key: For the scale (log-uniform) and the shift (uniform).
      n: How many.
      scale: Lowest and highest.
    """
    key_scale, key_shift = jax.random.split(key)
    low, high = jnp.log(jnp.asarray(scale, jnp.float32))
    s = jnp.exp(jax.random.uniform(key_scale, (n,), minval=low, maxval=high))
    room = jnp.abs(s - 1)[:, None] / 2
    return Warp(s, room * jax.random.uniform(key_shift, (n, 2), minval=-1))


def relative(warp2: Warp, warp1: Warp) -> Warp:
    """From view 1 to view 2: ``warp1`` undone, then ``warp2``."""
    scale = warp2.scale / warp1.scale
    return Warp(scale, warp2.shift - scale[:, None] * warp1.shift)


def warp_images(images: jax.Array, warp: Warp) -> jax.Array:
    """Bilinear views of images [n, h, w, c]; what lies outside repeats the border.

    Products with matrices: under ``vmap`` on a CPU much faster than gathering pixels.
    """
    _, height, width, _ = images.shape
    rows = _interpolation(_rows(warp, height), height)
    columns = _interpolation(_columns(warp, width), width)
    images = jnp.einsum("nyi,nijc->nyjc", rows, images, precision="highest")
    return jnp.einsum("nxj,nyjc->nyxc", columns, images, precision="highest")


def warp_nearest(maps: jax.Array, warp: Warp, outside: float | int = 0) -> jax.Array:
    """Views [n, h, w] of labels or depth, which must not be averaged."""
    _, height, width = maps.shape
    rows, columns = _rows(warp, height), _columns(warp, width)
    near = jnp.take_along_axis(maps, _nearest(rows, height)[:, :, None], axis=1)
    near = jnp.take_along_axis(near, _nearest(columns, width)[:, None, :], axis=2)
    inside = (
        _within(rows, height, 0.5)[:, :, None]
        & (_within(columns, width, 0.5)[:, None, :])
    )
    return jnp.where(inside, near, jnp.asarray(outside, maps.dtype))


def warp_depth(depth: jax.Array, warp: Warp) -> jax.Array:
    """Depth along z of the views: zooming and moving leave it as it is, 0 outside."""
    return warp_nearest(depth, warp)


def warp_focal(focal: jax.Array, warp: Warp) -> jax.Array:
    """Focal lengths [n] of the views, in image widths."""
    return focal * warp.scale


def warp_directions(focal: jax.Array, warp: Warp, height: int, width: int) -> jax.Array:
    """Directions of the pixels of the views, z = 1, [n, h, w, 3].

    Args:
      focal: Of the images, in image widths, [n].
      warp: The shift moves the principal point.
      height: Of the view in pixels.
      width: Of the view in pixels.
    """
    # Rows and columns of the image that the view's pixels see, from its centre.
    x = (_columns(warp, width) + 0.5) / width - 0.5
    y = ((_rows(warp, height) + 0.5) / height - 0.5) * (height / width)
    x, y = x / focal[:, None], y / focal[:, None]
    shape = (len(focal), height, width)
    x = jnp.broadcast_to(x[:, None, :], shape)
    y = jnp.broadcast_to(y[:, :, None], shape)
    return jnp.stack([x, y, jnp.ones(shape, x.dtype)], axis=-1)


def warp_angles(focal: jax.Array, warp: Warp, height: int, width: int) -> jax.Array:
    """Azimuth and elevation of the pixels of the views, radians, [n, h, w, 2]."""
    return angles_of(warp_directions(focal, warp, height, width))


def angles_of(directions: jax.Array) -> jax.Array:
    """Azimuth atan2(x, z) and elevation asin(y / norm) of [..., 3], as [..., 2]."""
    x, y, z = directions[..., 0], directions[..., 1], directions[..., 2]
    return jnp.stack([jnp.arctan2(x, z), jnp.arctan2(y, jnp.hypot(x, z))], axis=-1)


def directions_of(angles: jax.Array) -> jax.Array:
    """The inverse of ``angles_of``, with z = 1."""
    x = jnp.tan(angles[..., 0])
    y = jnp.tan(angles[..., 1]) * jnp.hypot(x, jnp.ones_like(x))
    return jnp.stack([x, y, jnp.ones_like(x)], axis=-1)


def seen_by_both(warp1: Warp, warp2: Warp, height: int, width: int) -> jax.Array:
    """Pixels of view 2 whose content view 1 and the image have too, bool [n, h, w].

    View 1 has it where interpolation finds pixels on all sides.
    """
    to_view2 = relative(warp2, warp1)
    rows = _within(_rows(to_view2, height), height, 0.0)
    rows &= _within(_rows(warp2, height), height, 0.5)
    columns = _within(_columns(to_view2, width), width, 0.0)
    columns &= _within(_columns(warp2, width), width, 0.5)
    return rows[:, :, None] & columns[:, None, :]


def _rows(warp: Warp, height: int) -> jax.Array:
    return _sources(warp.scale, warp.shift[:, 1], height)


def _columns(warp: Warp, width: int) -> jax.Array:
    return _sources(warp.scale, warp.shift[:, 0], width)


def _sources(scale: jax.Array, shift: jax.Array, size: int) -> jax.Array:
    """Positions in the image, in pixels, of the pixels of the view, [n, size]."""
    pixels = jnp.arange(size, dtype=scale.dtype) - (size - 1) / 2
    moved = pixels[None] - (size * shift)[:, None]
    return moved / scale[:, None] + (size - 1) / 2


def _interpolation(positions: jax.Array, size: int) -> jax.Array:
    """Weights [n, positions, size] of pixels for linear interpolation."""
    positions = jnp.clip(positions, 0, size - 1)
    pixels = jnp.arange(size, dtype=positions.dtype)
    distance = jnp.abs(positions[:, :, None] - pixels[None, None])
    return jnp.maximum(1 - distance, 0)


def _nearest(positions: jax.Array, size: int) -> jax.Array:
    return jnp.clip(jnp.round(positions), 0, size - 1).astype(jnp.int32)


def _within(positions: jax.Array, size: int, margin: float) -> jax.Array:
    """Whether positions lie in the image; rounding does not put its border outside."""
    margin += 1e-3
    return (positions >= -margin) & (positions <= size - 1 + margin)


# Metrics.


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
