"""Learned image compression: data, transforms, an entropy model, and training.

Blocks of 8x8 pixels are transformed by their principal components and a network that
sees the blocks around, scaled channel by channel, and rounded. What is rounded is coded
in three passes; each predicts mean and scale of what comes next from what is already
known, as the decoder can. Everything depends on the weight of the distortion: the
initial step size by high-rate theory, and whatever is learned on top, in conditional
models by FiLM, in fixed models because each has a weight of its own.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.data import camvid
from benchmarks.models.vision import from_patches, to_patches
from yoto_jax import conditional

Params = dict[str, Any]
Key = jax.Array

BLOCK = 8
PIXELS = BLOCK**2
COLORS = 3
CROP = 48  # pixels, of the images in training

LOW, HIGH = 0.002, 0.128  # weights of the distortion; MSE on the scale of 0 to 255
SUPPORT = conditional.LogUniform(
    low={"distortion": LOW, "rate": 1.0}, high={"distortion": HIGH, "rate": 1.0}
)


class Size(NamedTuple):
    """What a preset decides."""

    steps: int
    batch: int  # crops in a step
    width: int  # of the networks
    channels: int  # of the blocks' code
    crops: int  # that training draws from
    test_images: int  # at most
    points: int  # weights that the conditional model is measured at
    apart: int  # a fixed model at every so many of them
    learning_rate: float = 3e-3


SIZES = {
    "quick": Size(100, 4, 16, 24, 64, 1, 3, 2),
    "cpu": Size(2000, 8, 64, 96, 4096, 8, 9, 2),
    "gpu": Size(40_000, 32, 192, 128, 16_384, 64, 17, 4, 1e-3),
}


# Data.


class Source(NamedTuple):
    """Crops to train on and images to compress, uint8, all from 0 to 255."""

    name: str
    crops: np.ndarray  # [n, CROP, CROP, 3]
    test: np.ndarray  # [n, h, w, 3], sides multiples of BLOCK


def load(size: Size, folder: Path | None) -> Source:
    if folder is not None:
        splits = camvid.load(folder)
        train, test = (_bytes(splits[split][0]) for split in ("train", "val"))
        pick = np.linspace(0, len(test) - 1, min(size.test_images, len(test)))
        test = test[pick.round().astype(int)]
        name = folder.resolve().name
        return Source(name, draw_crops(list(train), size.crops), whole_blocks(test))
    train, test = [], []
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph)
        split = int(0.7 * image.width)
        # The gap keeps what is tested out of what is trained on, at every scale.
        left = image.crop((0, 0, split - 2 * BLOCK, image.height))
        right = np.asarray(image.crop((split, 0, *image.size)).reduce(2))
        for scale in (1, 1.5, 2):  # the photographs were JPEGs: tests are halved
            shape = (round(left.width / scale), round(left.height / scale))
            train.append(np.asarray(left.resize(shape, Image.Resampling.BOX)))
        middle = right.shape[0] // 2 // BLOCK * BLOCK
        test += [right[:middle], right[middle : 2 * middle]]
    test = whole_blocks(np.stack(test))[: size.test_images]
    return Source("photographs", draw_crops(train, size.crops), test)


def _bytes(images: np.ndarray) -> np.ndarray:
    return np.round(255 * images).astype(np.uint8)


def whole_blocks(images: np.ndarray) -> np.ndarray:
    h, w = (side // BLOCK * BLOCK for side in images.shape[1:3])
    return images[:, :h, :w]


def draw_crops(images: list[np.ndarray], n: int) -> np.ndarray:
    """Random crops, each flipped and turned at random; larger images give more."""
    rng = np.random.default_rng(0)
    area = np.array([image.shape[0] * image.shape[1] for image in images], float)
    crops = []
    for i in rng.choice(len(images), n, p=area / area.sum()):
        y, x = (rng.integers(side - CROP + 1) for side in images[i].shape[:2])
        crop = images[i][y : y + CROP, x : x + CROP]
        crop = crop[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        crops.append(crop.transpose(1, 0, 2) if rng.integers(2) else crop)
    return np.stack(crops)


# [n, h, w, 3] to [n, h / 8, w / 8, 192], and back.
to_blocks = functools.partial(to_patches, patch=BLOCK)
from_blocks = functools.partial(from_patches, patch=BLOCK)


class Statistics(NamedTuple):
    """Principal components of the blocks of the training images."""

    mean: np.ndarray  # [192]
    basis: np.ndarray  # [192, channels], orthonormal
    deviation: np.ndarray  # [channels], standard deviations in grey levels


def statistics(crops: np.ndarray, channels: int) -> Statistics:
    blocks = np.asarray(to_blocks(np.asarray(crops, np.float64))).reshape(-1, 192)
    mean = blocks.mean(axis=0)
    variances, basis = np.linalg.eigh(np.cov(blocks.T))
    largest = np.argsort(variances)[::-1][:channels]
    deviation = np.sqrt(np.maximum(variances[largest], 1.0))
    parts = (mean, basis[:, largest], deviation)
    return Statistics(*(part.astype(np.float32) for part in parts))


# The model.


class Condition(NamedTuple):
    """What depends on nothing but the weight of the distortion."""

    weight: jax.Array  # [n]
    features: jax.Array | None  # [n, TRUNK], for conditional models
    gain: jax.Array  # [n, 1, 1, channels], what coefficients are multiplied by


TRUNK = 32
CONTEXT = 60
BEFORE = ((1, 0), (0, 0), (0, 1), (0, 2))  # left, and the three above, once padded


def groups(channels: int) -> list[tuple[int, int]]:
    """Channels [start, stop) of each pass: about 8 %, 25 % and 67 % of them."""
    first, second = channels // 12, channels // 3
    return [(0, first), (first, second), (second, channels)]


def init(seed: int, stats: Statistics, width: int, conditioned: bool) -> Params:
    channels = len(stats.deviation)
    rng = np.random.default_rng(seed)
    inputs = len(stats.mean)

    def film(size: int) -> Params | None:
        if not conditioned:
            return None
        return conditional.init_film(jax.random.key(0), TRUNK, size, hidden=())

    def network(inputs: int) -> Params:
        """Three layers; the second sees the blocks around."""
        return {
            "first": _dense(rng, inputs, width),
            "second": _dense(rng, width // 5 * 5, width),
            "film": [film(width), film(width)],
        }

    def head(size: int) -> Params | None:
        return _dense(None, TRUNK, size) if conditioned else None

    passes = []
    for start, stop in groups(channels):
        known = 4 * (stop + 1) if start == 0 else CONTEXT
        one = {"base": jnp.zeros(2 * (stop - start)), "head": head(2 * (stop - start))}
        if start:
            one["embed"] = _dense(rng, start, CONTEXT)
        one |= {
            "hidden": _dense(rng, known, width),
            "film": film(width),
            "out": _dense(None, width + known, 2 * (stop - start)),
        }
        passes.append(one)
    trunk = None
    if conditioned:
        size = conditional.encoding_size(SUPPORT)
        trunk = [_dense(rng, size, TRUNK), _dense(rng, TRUNK, TRUNK)]
    return {
        "trunk": trunk,
        "gain": {"base": jnp.zeros(channels), "head": head(channels)},
        "ungain": {"base": jnp.zeros(channels), "head": head(channels)},
        "analysis": network(inputs) | {"out": _dense(None, width, channels)},
        "synthesis": network(channels) | {"out": _dense(None, width, inputs)},
        "into": jnp.asarray(stats.basis),
        "back": jnp.asarray(stats.basis.T),
        "passes": passes,
    }


def _dense(rng: np.random.Generator | None, inputs: int, outputs: int) -> Params:
    """A layer that starts at random, or at zero without a generator."""
    kernel = np.zeros((inputs, outputs), np.float32)
    if rng is not None:  # NumPy's numbers: JAX would compile a program for each shape
        kernel = rng.normal(0, inputs**-0.5, kernel.shape).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(outputs)}


def _apply(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def condition(params: Params, weight: jax.Array) -> Condition:
    x = None
    if params["trunk"] is not None:
        weights = {"distortion": weight, "rate": jnp.ones_like(weight)}
        x = conditional.encode(weights, SUPPORT)
        for layer in params["trunk"]:
            x = jax.nn.gelu(_apply(layer, x))
    gain = jnp.exp(_table(params["gain"], x)) / step_size(weight)
    return Condition(weight, x, gain)


def _film(film: Params | None, x: jax.Array, c: Condition) -> jax.Array:
    return x if film is None else conditional.film(film, x, c.features)


def _table(table: Params, features: jax.Array | None) -> jax.Array:
    """Numbers [n or 1, 1, 1, size] for the weights that the features stand for."""
    if features is None:
        return table["base"][None, None, None]
    return (table["base"] + _apply(table["head"], features))[:, None, None]


def step_size(weight: jax.Array) -> jax.Array:
    """Where high-rate theory has the least rate + weight * distortion, [n, 1, 1, 1].

    Three colours a pixel, each of log2(1 / step) bits and an error of step^2 / 12.
    """
    return jnp.sqrt(18 / (math.log(2) * weight))[:, None, None, None]


def around(x: jax.Array) -> jax.Array:
    """A fifth of the channels from the block itself and each of its four neighbours."""
    h, w, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = channels // 5
    shifted = [
        padded[:, y : y + h, x : x + w, k * size : (k + 1) * size]
        for k, (y, x) in enumerate(((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)))
    ]
    return jnp.concatenate(shifted, axis=-1)


def before(x: jax.Array) -> jax.Array:
    """The blocks to the left and above, all channels and whether there is a block."""
    h, w = x.shape[1:3]
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, y : y + h, x : x + w] for y, x in BEFORE], axis=-1
    )


def _network(net: Params, x: jax.Array, c: Condition) -> jax.Array:
    first, second = net["film"]
    x = jax.nn.gelu(_film(first, _apply(net["first"], x), c))
    y = _apply(net["second"], around(x))
    return _apply(net["out"], x + jax.nn.gelu(_film(second, y, c)))


def analysis(
    params: Params, stats: Statistics, c: Condition, images: jax.Array
) -> jax.Array:
    """The code [n, h / 8, w / 8, channels] before rounding."""
    x = to_blocks(images) - stats.mean
    detail = _network(params["analysis"], x / 64, c)
    return c.gain * (x @ params["into"] + stats.deviation * detail)


def synthesis(
    params: Params, stats: Statistics, c: Condition, code: jax.Array
) -> jax.Array:
    """Images from 0 to 255, neither clipped nor rounded."""
    signal, noise = stats.deviation**2, step_size(c.weight) ** 2 / 12
    shrink = signal / (signal + noise)  # Wiener's, against the noise of rounding
    scale = shrink * jnp.exp(_table(params["ungain"], c.features)) / c.gain
    detail = _network(params["synthesis"], code * scale / stats.deviation, c)
    return from_blocks((code * scale) @ params["back"] + 32 * detail + stats.mean)


SMALLEST, LARGEST = 0.05, 64.0  # scales of logistic distributions


def unit(stats: Statistics, c: Condition) -> jax.Array:
    """Standard deviations of the code, [n, 1, 1, channels]."""
    return c.gain * stats.deviation


def predict(
    params: Params, stats: Statistics, c: Condition, known: jax.Array, p: int
) -> tuple[jax.Array, jax.Array]:
    """Means and scales of the channels of a pass.

    Args:
      params: Of the model.
      stats: Of the training images.
      c: Condition.
      known: In pass 0, :func:`before` of the code of this pass in units; later the code
        [n, h, w, channels], of which the channels of earlier passes are looked at.
      p: Number of the pass.
    """
    start, stop = groups(len(stats.deviation))[p]
    mean, scale = _context(params, stats, c, known, p)
    return _distribution(mean, scale, unit(stats, c)[..., start:stop])


def _context(
    params: Params, stats: Statistics, c: Condition, known: jax.Array, p: int
) -> tuple[jax.Array, jax.Array]:
    """What the network of a pass says: means in units, logarithms of scales."""
    net, (start, _) = params["passes"][p], groups(len(stats.deviation))[p]
    if p:
        known = known[..., :start] / unit(stats, c)[..., :start]
        known = around(_apply(net["embed"], known))
    y = jax.nn.gelu(_film(net["film"], _apply(net["hidden"], known), c))
    y = _apply(net["out"], jnp.concatenate([y, known], axis=-1))
    mean, scale = jnp.split(y + _table(net, c.features), 2, axis=-1)
    return mean, scale


def _distribution(
    mean: jax.Array, scale: jax.Array, unit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    scale = jnp.hypot(SMALLEST, 0.55 * unit * jnp.exp(scale))
    return unit * mean, jnp.minimum(scale, LARGEST)


def bits(difference: jax.Array, scale: jax.Array) -> jax.Array:
    """Of a logistic distribution, integrated over an interval of length 1."""
    # In logarithms throughout, or the gradient would vanish in the tails: with
    # l = (|d| - 1/2) / s and h = (|d| + 1/2) / s it is
    # (1 - exp(-1 / s)) / ((1 + exp(l)) (1 + exp(-h))).
    distance, sharpness = jnp.abs(difference), 1 / scale
    low, high = (distance - 0.5) * sharpness, (distance + 0.5) * sharpness
    ratio = (1 + jnp.exp(-jnp.abs(low))) * (1 + jnp.exp(-high))
    ratio = ratio / (1 - jnp.exp(-sharpness))
    return (jnp.maximum(low, 0) + jnp.log(ratio)) / math.log(2)


def rate(params: Params, stats: Statistics, c: Condition, code: jax.Array) -> jax.Array:
    """Bits per pixel of each image."""
    size = unit(stats, c)
    (_, first), *rest = groups(code.shape[-1])
    known = before(code[..., :first] / size[..., :first])
    found = [_context(params, stats, c, known, 0)]
    found += [_context(params, stats, c, code, p) for p in range(1, 1 + len(rest))]
    # All passes at once from here: fewer operations compile faster.
    mean, scale = (jnp.concatenate(x, axis=-1) for x in zip(*found, strict=True))
    mean, scale = _distribution(mean, scale, size)
    pixels = PIXELS * code.shape[1] * code.shape[2]
    return jnp.sum(bits(code - mean, scale), axis=(1, 2, 3)) / pixels


def losses(
    params: Params, stats: Statistics, weight: jax.Array, images: jax.Array, key: Key
) -> dict[str, jax.Array]:
    """Rate and distortion of each image, with noise in place of rounding."""
    c = condition(params, weight)
    code = analysis(params, stats, c, images)
    code = code + jax.random.uniform(key, code.shape, minval=-0.5, maxval=0.5)
    error = synthesis(params, stats, c, code) - images
    distortion = jnp.mean(error**2, axis=(1, 2, 3))
    return {"distortion": distortion, "rate": rate(params, stats, c, code)}


def penalty(c: Condition) -> jax.Array:
    """Bits that an error of 1 in the code is worth, [n, 1, 1, channels].

    The components are orthonormal, and the mean squared error is over three colours.
    """
    return c.weight[:, None, None, None] / (COLORS * c.gain**2)


# Training.


# For so few steps that they do not make up for the time of optimising a program.
HASTY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
Run = Callable[[int, float | None], tuple[Params, np.ndarray]]


def trainer(source: Source, stats: Statistics, size: Size, fixed: bool) -> Run:
    """A function that trains a model, compiled when it is first called.

    Runs go one after the other: side by side under ``vmap``, batched matrix products
    take two to three times as long on a CPU.

    Args:
      source: Images.
      stats: Of the training images.
      size: Of the model and of the training.
      fixed: Whether to train for one weight of the distortion.

    Returns:
      A function of a seed and the weight of the distortion, None for a conditional
      model, that returns the parameters and the objective at every step.
    """
    schedule = optax.cosine_decay_schedule(size.learning_rate, size.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    crops = jnp.asarray(source.crops)
    start = lambda seed: init(seed, stats, size.width, conditioned=not fixed)
    # All parameters in one vector: updates leaf by leaf take longer to compile.
    _, unravel = ravel_pytree(start(0))

    def objective(flat: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
        which, weight, key = batch
        images = crops[which].astype(jnp.float32)
        found = losses(unravel(flat), stats, weight, images, key)
        weights = {"distortion": weight, "rate": jnp.ones_like(weight)}
        return conditional.conditional_loss(found, weights)

    @functools.partial(jax.jit, compiler_options=HASTY if size.steps <= 100 else None)
    def run(flat: jax.Array, batches: tuple[jax.Array, ...]) -> Any:
        def step(carry: Any, batch: tuple[jax.Array, ...]) -> Any:
            flat, state = carry
            value, gradient = jax.value_and_grad(objective)(flat, batch)
            updates, state = tx.update(gradient, state, flat)
            return (flat + updates, state), value

        return jax.lax.scan(step, (flat, tx.init(flat)), batches)

    def train(seed: int, weight: float | None) -> tuple[Params, np.ndarray]:
        shape, key = (size.steps, size.batch), jax.random.key(seed)
        draws, noise = jax.random.split(key)
        which = np.random.default_rng(seed).integers(len(crops), size=shape)
        weights = np.full(shape, weight, np.float32) if fixed else draw(draws, *shape)
        batches = (which, weights, jax.random.split(noise, size.steps))
        flat, _ = ravel_pytree(start(seed))
        (flat, _), values = run(flat, batches)
        return unravel(flat), np.asarray(values)  # waits until it is done

    return train


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: Key, steps: int, batch: int) -> jax.Array:
    """Weights of the distortion [steps, batch], evenly spread within each batch."""
    sample = lambda key: SUPPORT.sample(key, batch, method="stratified")
    return jax.vmap(sample)(jax.random.split(key, steps))["distortion"]


def grid(n: int) -> np.ndarray:
    """Weights of the distortion, from the least to the largest."""
    return np.asarray(SUPPORT.grid(n)["distortion"])


def count(stats: Statistics, size: Size, conditioned: bool) -> int:
    """The number of parameters."""
    return optax.tree.size(init(0, stats, size.width, conditioned))


# Measures.


def psnr(images: np.ndarray, reconstructed: np.ndarray) -> float:
    """Peak signal to noise ratio in dB, of the error over all pixels."""
    return 10 * math.log10(255**2 / mse(images, reconstructed))


def mse(images: np.ndarray, reconstructed: np.ndarray) -> float:
    error = images.astype(np.float64) - reconstructed.astype(np.float64)
    return float(np.mean(error**2))
