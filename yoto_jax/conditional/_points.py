"""Random and quasi-random points in the unit cube."""

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32
# Primitive polynomials and first direction numbers of Sobol's sequence, for the second
# dimension and the following: (degree, coefficients, m_1, m_2, ...). Joe and Kuo,
# "Constructing Sobol sequences with better two-dimensional projections", 2008.
_SOBOL = (
    (1, 0, 1),
    (2, 1, 1, 3),
    (3, 1, 1, 3, 1),
    (3, 2, 1, 1, 1),
    (4, 1, 1, 1, 3, 3),
    (4, 4, 1, 3, 5, 13),
    (5, 2, 1, 1, 5, 5, 17),
    (5, 4, 1, 1, 5, 5, 5),
    (5, 7, 1, 1, 7, 11, 19),
    (5, 11, 1, 1, 5, 1, 1),
    (5, 13, 1, 1, 1, 3, 11),
    (5, 14, 1, 3, 5, 5, 31),
    (6, 1, 1, 3, 3, 9, 7, 49),
    (6, 13, 1, 1, 1, 15, 21, 21),
    (6, 16, 1, 3, 1, 13, 27, 49),
)
MOST_SOBOL = len(_SOBOL) + 1


def draw(key: jax.Array, n: int, dimensions: int, method: str) -> jax.Array:
    """Points ``(n, dimensions)``, each uniform in the unit cube."""
    if method == "random":
        return jax.random.uniform(key, (n, dimensions), jnp.float32)
    if method == "stratified":
        return _stratified(key, n, dimensions)
    if method == "sobol":
        return _sobol(key, n, dimensions)
    raise ValueError(
        f"method must be 'random', 'stratified' or 'sobol', got {method!r}."
    )


def _stratified(key: jax.Array, n: int, dimensions: int) -> jax.Array:
    key_order, key_place = jax.random.split(key)
    rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[:, None], (n, dimensions))
    order = jax.random.permutation(key_order, rows, axis=0, independent=True)
    place = order + jax.random.uniform(key_place, (n, dimensions), jnp.float32)
    # Rounding must not lead into the next interval.
    return jnp.minimum(place, jnp.nextafter(order + 1, order)) / n


def _sobol(key: jax.Array, n: int, dimensions: int) -> jax.Array:
    if dimensions > MOST_SOBOL:
        raise ValueError(
            f"method 'sobol' is there for up to {MOST_SOBOL} weights that vary, "
            f"got {dimensions}; use 'stratified'."
        )
    key_shift, key_order = jax.random.split(key)
    directions = sobol_directions(dimensions)
    index = jnp.arange(n, dtype=jnp.uint32)[:, None]
    # One random shift for each dimension keeps the points as even as they are and
    # makes each of them uniform. Their order is random, as that of a batch may not be.
    shift = jax.random.bits(key_shift, (dimensions,), jnp.uint32)
    points = jnp.broadcast_to(shift, (n, dimensions))
    for bit in range(max(1, n - 1).bit_length()):
        chosen = (index >> bit) & 1
        points = points ^ jnp.where(chosen == 1, directions[None, :, bit], 0)
    points = jax.random.permutation(key_order, points, axis=0)
    return (points >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def sobol_directions(dimensions: int) -> np.ndarray:
    """Direction numbers ``(dimensions, 32)``, as binary fractions of 32 digits."""
    table = np.zeros((dimensions, _BITS), np.uint64)
    for d in range(dimensions):
        if d == 0:
            m = [1] * _BITS
        else:
            degree, coefficients, *m = _SOBOL[d - 1]
            m = list(m)
            for i in range(degree, _BITS):
                new = m[i - degree] ^ (m[i - degree] << degree)
                for k in range(1, degree):
                    if coefficients >> (degree - 1 - k) & 1:
                        new ^= m[i - k] << k
                m.append(new)
        table[d] = [m[i] << (_BITS - 1 - i) for i in range(_BITS)]
    return table.astype(np.uint32)
