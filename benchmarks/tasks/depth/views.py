"""Geometric views of images, and what they do to depth and camera.

What is at p in the image is at scale * p + shift in the view.
A camera looks along z, x points right and y down. An image spans one unit of width and
one of height around its centre, whatever its resolution: images, features and depth of
any size share these coordinates. Focal lengths are in image widths, pixels are square.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.data.cameras import angles_of

Key = jax.Array


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
