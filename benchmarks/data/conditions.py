"""Conditions of images: stylised views for training, and target conditions.

All are pure functions of keys and arrays. Images are float32 [n, h, w, 3] from 0 to 1.
"""

import jax
import jax.numpy as jnp

Key = jax.Array
Range = tuple[float, float]

_LIGHTS = 10
_PARTICLES = 100


def fda(source: jax.Array, target: jax.Array, band: float | jax.Array) -> jax.Array:
    """Fourier domain adaptation: low-frequency amplitudes of other images.

    Per channel, the amplitudes of the frequencies from -b to b along both axes, b =
    floor(band min(h, w)), come from the target; all phases stay. The result is real and
    not clipped.

    Args:
      source: [n, h, w, c].
      target: [n, h, w, c].
      band: Half width of the square of frequencies relative to the smaller side, one
        number or [n].

    References:
      Yang and Soatto, `FDA: Fourier Domain Adaptation for Semantic Segmentation
      <https://arxiv.org/abs/2004.05498>`_, 2020.
    """
    n, height, width, _ = source.shape
    half = jnp.floor(jnp.asarray(band) * min(height, width))
    half = jnp.broadcast_to(half, (n,))[:, None, None, None]
    rows = jnp.abs(jnp.fft.fftfreq(height, 1 / height))[None, :, None, None]
    columns = jnp.arange(width // 2 + 1, dtype=rows.dtype)[None, None, :, None]
    low = (rows <= half) & (columns <= half)

    spectrum = jnp.fft.rfft2(source, axes=(1, 2))
    amplitude = jnp.abs(spectrum)
    wanted = jnp.abs(jnp.fft.rfft2(target, axes=(1, 2)))
    some = amplitude > 0
    phase = jnp.where(some, spectrum / jnp.where(some, amplitude, 1), 1)
    styled = jnp.where(low, wanted * phase, spectrum)
    return jnp.fft.irfft2(styled, s=(height, width), axes=(1, 2))


# Target conditions: never labelled in training.


def night(
    key: Key,
    images: jax.Array,
    depth: jax.Array | None = None,
    *,
    strength: Range = (0.6, 1.0),
) -> jax.Array:
    """Night: dark and blue, with warm spots of light and the noise of the sensor.

    Args:
      key: For the strength and all that is random.
      images: By day.
      depth: Not used.
      strength: Range of the strengths of the images; 0 is by day.
    """
    del depth
    n, height, width, _ = images.shape
    key_image, key_lights, key_noise = jax.random.split(key, 3)
    u = jax.random.uniform(key_image, (2, n, 1, 1, 1))
    a = _between(*strength, u[0])
    grey = jnp.mean(images, axis=-1, keepdims=True)
    x = images + 0.6 * a * (grey * _colour(0.75, 0.9, 1.25) - images)
    # The sky is the brightest by day and among the darkest at night.
    sky = jnp.clip(1 - 2 * _height_in_image(height), 0, 1)
    x = (1 - 0.5 * a * sky) * jnp.clip(x, 0, 1) ** (1 + 0.6 * a)
    # The camera opens up until the image has its usual, low brightness.
    gain = _between(0.08, 0.2, u[1]) / jnp.maximum(
        jnp.mean(x, axis=(1, 2, 3), keepdims=True), 1e-3
    )
    x = x + a * (jnp.minimum(gain, 1) - 1) * x
    x = x + a * _lights(key_lights, n, height, width)
    # Noise of the light itself and of reading it out.
    deviation = a * jnp.sqrt(0.03**2 * x + 0.02**2)
    x = x + deviation * jax.random.normal(key_noise, x.shape)
    return jnp.clip(x, 0, 1)


def fog(
    key: Key,
    images: jax.Array,
    depth: jax.Array | None = None,
    *,
    strength: Range = (0.5, 1.0),
) -> jax.Array:
    """Fog: each pixel fades into the colour of the air with its distance.

    Args:
      key: For the strength and the colour of the air.
      images: In clear air.
      depth: Metres [n, h, w], 0 where there is no surface. Without it, as over flat
        ground below a horizon in the upper half.
      strength: Range of the strengths of the images; 0 is clear, at 1 a fifth of the
        contrast is left at 16 metres.
    """
    n, height, _, _ = images.shape
    u = jax.random.uniform(key, (6, n, 1, 1, 1))
    a = _between(*strength, u[0])
    if depth is None:
        below = _height_in_image(height) - _between(0.35, 0.5, u[1])
        metres = 1.5 / (jax.nn.softplus(20 * below) / 20 + 0.06)  # 25 at most
    else:
        metres = jnp.where(depth > 0, depth, 1e3)[..., None]
    clear = jnp.exp(-0.1 * a * metres)
    tint = _between(-0.03, 0.03, jnp.concatenate([*u[3:]], axis=-1))
    air = _between(0.65, 0.9, u[2]) + tint
    return jnp.clip(clear * images + (1 - clear) * air, 0, 1)


def weather(
    key: Key,
    images: jax.Array,
    depth: jax.Array | None = None,
    *,
    strength: Range = (0.5, 1.0),
) -> jax.Array:
    """Rain or snow: streaks or flakes, a blurred lens, grey light.

    Args:
      key: For the strength, rain or snow, and where streaks and flakes are.
      images: In fair weather.
      depth: Not used.
      strength: Range of the strengths of the images; 0 is fair.
    """
    del depth
    n, height, width, _ = images.shape
    key_image, key_particles = jax.random.split(key)
    u = jax.random.uniform(key_image, (3, n, 1, 1, 1))
    a = _between(*strength, u[0])
    snow = u[1] < 0.5
    x = images + a * (_blur(images) - images)
    grey = jnp.mean(x, axis=-1, keepdims=True)
    x = x + 0.5 * a * (grey - x)
    # Rain darkens; snow brightens, most of all the ground.
    ground = jnp.clip(2 * _height_in_image(height) - 1, 0, 1)
    light = jnp.where(snow, 0.7 + 0.2 * ground, 0.4)
    x = x + a * jnp.where(snow, 0.25 + 0.2 * ground, 0.5) * (light - x)
    slant = _between(-0.35, 0.35, u[2])
    cover = _particles(key_particles, snow[..., 0], slant[..., 0], height, width)
    cover = cover[..., None]
    x = x + a * cover * jnp.where(snow, 0.95, 0.6) * (jnp.where(snow, 1, 0.85) - x)
    return jnp.clip(x, 0, 1)


CONDITIONS = {"night": night, "fog": fog, "weather": weather}


def _between(low: float, high: float, u: jax.Array) -> jax.Array:
    return low + (high - low) * u


def _height_in_image(height: int) -> jax.Array:
    """0 at the top and 1 at the bottom, [1, h, 1, 1]."""
    return ((jnp.arange(height) + 0.5) / height)[None, :, None, None]


def _colour(red: float, green: float, blue: float) -> jax.Array:
    return jnp.asarray([red, green, blue], jnp.float32)[None, None, None]


def _pixels(height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Columns [1, 1, w] and rows [1, h, 1] of pixel centres, in image heights."""
    columns = (jnp.arange(width) + 0.5) / height
    rows = (jnp.arange(height) + 0.5) / height
    return columns[None, None, :], rows[None, :, None]


def _lights(key: Key, n: int, height: int, width: int) -> jax.Array:
    """Street lamps and headlights: bright warm or white spots with a glow."""
    x, y = _pixels(height, width)
    u = jax.random.uniform(key, (5, n, _LIGHTS, 1))
    radius = 0.005 + 0.015 * u[0] ** 2 + 0.4 / height  # seldom less than a pixel
    warm = _colour(1.0, 0.75, 0.4)[0]
    colour = (0.5 + u[1]) * (warm + u[2] * (1 - warm))
    # A bell is a product of a row and a column: all of them are one matrix product.
    light = jnp.zeros((n, height, width, 3))
    for size, brightness in ((1, 1.0), (4, 0.12)):
        column = jnp.exp(
            -(((y.swapaxes(1, 2) - 0.2 - 0.45 * u[3]) / (size * radius)) ** 2)
        )
        across = (x - u[4] * (width / height)) / (size * radius)
        row = brightness * jnp.exp(-(across**2))
        light += jnp.einsum("nky,nkx,nkc->nyxc", column, row, colour)
    return light


def _particles(
    key: Key, snow: jax.Array, slant: jax.Array, height: int, width: int
) -> jax.Array:
    """How much of each pixel streaks of rain or flakes of snow cover, [n, h, w]."""
    x, y = _pixels(height, width)
    n = len(snow)

    def add(cover: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
        length = jnp.where(snow, 0.01, 0.04 + 0.08 * u[2])  # half, in image heights
        thickness = jnp.where(snow, 0.004 + 0.014 * u[3] ** 2, 0.003 + 0.004 * u[3])
        # What is finer than a pixel covers a part of it.
        wide = jnp.maximum(thickness, 0.6 / height)
        along = y - u[1]
        across = x - u[0] * (width / height) - slant * along
        along = jnp.maximum(jnp.abs(along) - length, 0)
        inside = jnp.maximum(1 - (across**2 + along**2) / wide**2, 0)
        return jnp.maximum(cover, inside * (thickness / wide)), None

    clear = jnp.zeros((n, height, width))
    each = jax.random.uniform(key, (_PARTICLES, 4, n, 1, 1))
    return jax.lax.scan(add, clear, each)[0]


def _blur(images: jax.Array) -> jax.Array:
    """The 3x3 binomial blur."""
    x = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = 0.25 * x[:, :-2] + 0.5 * x[:, 1:-1] + 0.25 * x[:, 2:]
    return 0.25 * x[:, :, :-2] + 0.5 * x[:, :, 1:-1] + 0.25 * x[:, :, 2:]
