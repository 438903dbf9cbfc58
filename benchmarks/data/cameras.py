"""Directions of pixels, and their angles.

A camera looks along z, x points right and y down.
"""

import jax
import jax.numpy as jnp


def angles_of(directions: jax.Array) -> jax.Array:
    """Azimuth atan2(x, z) and elevation asin(y / norm) of [..., 3], as [..., 2]."""
    x, y, z = directions[..., 0], directions[..., 1], directions[..., 2]
    return jnp.stack([jnp.arctan2(x, z), jnp.arctan2(y, jnp.hypot(x, z))], axis=-1)


def directions_of(angles: jax.Array) -> jax.Array:
    """The inverse of ``angles_of``, with z = 1."""
    x = jnp.tan(angles[..., 0])
    y = jnp.tan(angles[..., 1]) * jnp.hypot(x, jnp.ones_like(x))
    return jnp.stack([x, y, jnp.ones_like(x)], axis=-1)
