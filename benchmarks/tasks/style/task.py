"""Style transfer with a dial for each scale: images, losses and the network.

The style of an image is what the responses of filters look like on average, at four
scales from fine to coarse, each a loss; its content is where the edges are. The filters
are fixed: derivatives of brightness and colour on a pyramid of blurred images, so that
nothing needs to be downloaded. Features of your own take their place::

    task = make_task(load(), features=my_features)

where ``my_features(images [n, h, w, 3])`` returns four maps [n, h', w', c], such as the
activations of four layers of a pretrained network; ``content=`` likewise returns one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_sample_image

from benchmarks.data import camvid
from benchmarks.models.vision import PATCH, normalize, shifted, to_patches
from yoto_jax.linen import FiLM

Array = jax.Array
Features = Callable[[Array], Sequence[Array]]
Losses = dict[str, Array]

SCALES = 4
STYLES = tuple(f"style{k + 1}" for k in range(SCALES))
LOSSES = ("content", *STYLES)


class Images(NamedTuple):
    """Photographs: contents to train and to test on, [h, w, 3] each, and a style."""

    train: Sequence[np.ndarray]
    test: Sequence[np.ndarray]
    style: np.ndarray


def load(folder: Path | None = None) -> Images:
    """The sample images of scikit-learn, or contents from a folder as of CamVid.

    The style is a dahlia. The content is a pagoda at a lake: a strip from the axis of
    the pagoda to the right is for testing, what is on both sides of it for training.
    """
    style = shrink(load_sample_image("flower.jpg")[96:336, 176:432], 4)
    if folder is None:
        china = shrink(load_sample_image("china.jpg"), 2)
        return Images([china[:, :104], china[:, 192:]], [china[:, 104:192]], style)
    splits = camvid.load(folder, (96, 128))
    return Images(splits["train"][0], splits["val"][0], style)


def shrink(photograph: np.ndarray, by: int) -> np.ndarray:
    """Averages over squares of pixels, float32 from 0 to 1."""
    h, w = (side // by for side in photograph.shape[:2])
    pixels = np.asarray(photograph[: h * by, : w * by], np.float32) / 255
    return pixels.reshape(h, by, w, by, 3).mean(axis=(1, 3))


def crops(images: Sequence[np.ndarray], size: int, count: int, seed: int) -> np.ndarray:
    """Squares [count, size, size, 3] from anywhere in the images, by their area."""
    rng = np.random.default_rng(seed)
    rooms = np.array([np.array(i.shape[:2]) - size + 1 for i in images])
    areas = rooms.prod(axis=1)
    taken = []
    for which in rng.choice(len(images), count, p=areas / areas.sum()):
        top, left = rng.integers(rooms[which])
        taken.append(images[which][top : top + size, left : left + size])
    return np.stack(taken)


# Features.

# Orthonormal: brightness, orange against blue, green against purple.
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], np.float32)
OPPONENT = (OPPONENT / np.linalg.norm(OPPONENT, axis=1, keepdims=True)).T
ANGLES = np.arange(4) * np.pi / 4
COLOURS = 2
EDGES = 4


def _derivatives() -> np.ndarray:
    """Filters (9, 8): along four directions, first derivatives, then second."""
    smooth, first, second = np.array([[1, 2, 1], [-1, 0, 1], [-1, 2, -1]], float)
    smooth /= 4
    first /= 2
    second /= 4
    dx, dy = np.outer(smooth, first), np.outer(first, smooth)
    dxx, dyy = np.outer(smooth, second), np.outer(second, smooth)
    dxy = np.outer(first, first)
    odd = [np.cos(a) * dx + np.sin(a) * dy for a in ANGLES]
    even = [
        np.cos(a) ** 2 * dxx + np.sin(a) ** 2 * dyy - np.sin(2 * a) * dxy
        for a in ANGLES
    ]
    return np.stack([f.ravel() for f in odd + even], axis=1).astype(np.float32)


DERIVATIVES = _derivatives()


def _halving(size: int) -> np.ndarray:
    """The matrix (size / 2, size) that blurs a line of pixels and drops every other."""
    matrix = np.zeros((size // 2, size), np.float32)
    for row in range(size // 2):
        for offset, weight in zip((-1, 0, 1, 2), (1, 3, 3, 1), strict=True):
            matrix[row, np.clip(2 * row + offset, 0, size - 1)] += weight / 8
    return matrix


def pyramid(images: Array) -> list[Array]:
    """The image at four scales, each half the size of the one before."""
    levels = [images]
    for _ in range(SCALES - 1):
        _, h, w, _ = levels[-1].shape
        halved = jnp.einsum("yh,nhwc->nywc", _halving(h), levels[-1])
        levels.append(jnp.einsum("xw,nywc->nyxc", _halving(w), halved))
    return levels


def _respond(x: Array) -> Array:
    """[n, h - 2, w - 2, c, 8] of [n, h, w, c]: no pixel looks beyond the border."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    around = [x[:, k // 3 : k // 3 + h, k % 3 : k % 3 + w] for k in range(9)]
    return jnp.stack(around, axis=-1) @ DERIVATIVES


def filter_bank(images: Array) -> list[Array]:
    """At each scale how strongly the filters respond, and the colours.

    The colours are three of many channels, and the eye looks at them first: they count
    several times.
    """
    maps = []
    for level in pyramid(images @ OPPONENT):
        responses = _respond(level)
        strengths = jnp.abs(responses.reshape(*responses.shape[:3], -1))
        colours = [level[:, 1:-1, 1:-1]] * COLOURS
        maps.append(jnp.concatenate([strengths, *colours], axis=-1))
    return maps


def layout(images: Array) -> Array:
    """On the second of the four scales, where edges are, and the colours."""
    level = pyramid(images @ OPPONENT)[1]
    slopes = _respond(level[..., :1])[..., 0, : 2 * len(ANGLES) : 2]
    return jnp.concatenate([EDGES * slopes, level[:, 1:-1, 1:-1]], axis=-1)


# Losses.


class Task(NamedTuple):
    """What is learned.

    Attributes:
      train: Contents [n, size, size, 3].
      test: Likewise, from elsewhere.
      losses: Of images [n, h, w, 3] and their contents: each loss (n,). Each style loss
        is 1 for contents as they are, content is 1 for a uniform grey, on average.
      images: Where all of it comes from.
    """

    train: np.ndarray
    test: np.ndarray
    losses: Callable[[Array, Array], Losses]
    images: Images


def make_task(
    images: Images,
    size: int = 48,
    features: Features = filter_bank,
    content: Callable[[Array], Array] = layout,
    counts: tuple[int, int] = (512, 24),
) -> Task:
    """The task on these images.

    Args:
      images: Where contents and style come from.
      size: Height and width of the contents that are cut from the images.
      features: From images [n, h, w, 3], 0 to 1, to four maps [n, h', w', c] with a
        style loss each. Constants of it, such as weights, are not trained.
      content: From images to one map, of which the content loss is the mean square
        difference.
      counts: How many contents to train and to test on.
    """
    train = crops(images.train, size, counts[0], seed=0)
    test = crops(images.test, size, counts[1], seed=1)
    maps = jax.jit(features)(images.style[None])
    scales = [jnp.sqrt(jnp.mean(m**2, (0, 1, 2), keepdims=True)) + 1e-6 for m in maps]
    wanted = [gram(m / s) for m, s in zip(maps, scales, strict=True)]

    def unscaled(made: Array, contents: Array) -> Losses:
        values = [jnp.mean((content(made) - content(contents)) ** 2, (1, 2, 3))]
        for m, s, g in zip(features(made), scales, wanted, strict=True):
            values.append(jnp.mean((gram(m / s) - g) ** 2, (1, 2)))
        return dict(zip(LOSSES, values, strict=True))

    @jax.jit
    def at_the_start(some: Array) -> Losses:
        losses = unscaled(some, some)
        losses["content"] = unscaled(jnp.full_like(some, 0.5), some)["content"]
        return jax.tree.map(jnp.mean, losses)

    units = at_the_start(train[:64])
    losses = lambda made, contents: jax.tree.map(
        jnp.divide, unscaled(made, contents), units
    )
    return Task(train, test, losses, images)


def gram(maps: Array) -> Array:
    """Means of products of channels (n, c + 1, c + 1), and of channels alone."""
    n, h, w, _ = maps.shape
    maps = jnp.concatenate([maps, jnp.ones((n, h, w, 1), maps.dtype)], axis=-1)
    flat = maps.reshape(n, h * w, -1)
    return jnp.einsum("npc,npd->ncd", flat, flat) / (h * w)


# The network.


class Shift(nn.Module):
    """As ``vision.ShiftConv``, without looking beyond the border: h - 2, w - 2.

    With zeros around, the network would know where the border is, and paint it.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features)(shifted(x))


def widen(x: Array, margin: int) -> Array:
    """The border goes on as it ends."""
    around = (margin, margin)
    return jnp.pad(x, ((0, 0), around, around, (0, 0)), mode="edge")


class Block(nn.Module):
    """Residual, with a modulation between its layers."""

    @nn.compact
    def __call__(self, x: Array, code: Array) -> tuple[Array, None]:
        width = x.shape[-1]
        y = Shift(width)(widen(normalize(x), 1))
        y = nn.gelu(FiLM(hidden=())(y, code))
        return x + Shift(width)(widen(y, 1)), None


class Transfer(nn.Module):
    """Images [n, h, w, 3] in the style, from contents, noise and encoded weights.

    Coarse strokes come from patches of 4x4 pixels, enlarged smoothly, fine ones from
    layers at full size: what patches alone would paint shows their grid.
    """

    width: int
    blocks: int

    @nn.compact
    def __call__(self, contents: Array, noise: Array, encoded: Array) -> Array:
        code = nn.gelu(nn.Dense(2 * self.width)(encoded))
        code = nn.gelu(nn.Dense(2 * self.width)(code))
        pixels = jnp.concatenate([4 * contents - 2, noise], axis=-1)
        blocks = nn.scan(  # one program for all of them: quicker to compile
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.blocks,
        )
        x, _ = blocks()(nn.Dense(self.width)(to_patches(pixels)), code)
        fine = self.width // 2
        x = enlarge(nn.Dense(fine)(normalize(x)), margin=2)
        x = x + nn.Dense(fine)(widen(pixels, 2))
        x = Shift(fine)(nn.gelu(FiLM(hidden=())(x, code)))
        x = Shift(3)(nn.gelu(FiLM(hidden=())(x, code)))
        change = FiLM(hidden=())(x, code)  # how much of it is up to the weights
        inside = jnp.clip(contents, 0.02, 0.98)
        return nn.sigmoid(jnp.log(inside) - jnp.log1p(-inside) + change)


NOISE = 3  # channels: without them, a uniform sky could get no strokes


def draw_noise(key: Array, contents: Array) -> Array:
    return jax.random.normal(key, (*contents.shape[:3], NOISE))


def enlarge(x: Array, margin: int) -> Array:
    """[n, h, w, c] to [n, 4 h + 2 margin, ...], linear between middles of patches."""
    _, h, w, _ = x.shape
    x = jnp.einsum("yh,nhwc->nywc", _enlarging(h, margin), x)
    return jnp.einsum("xw,nywc->nyxc", _enlarging(w, margin), x)


def _enlarging(size: int, margin: int) -> np.ndarray:
    places = (np.arange(-margin, size * PATCH + margin) + 0.5) / PATCH - 0.5
    places = np.clip(places, 0, size - 1)
    nodes = np.arange(size)
    return np.maximum(0, 1 - np.abs(places[:, None] - nodes)).astype(np.float32)
