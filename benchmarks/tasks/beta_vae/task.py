"""Beta-VAEs: data, model, losses and training, for one beta or for a range of them.

A fixed model and a conditional one differ in two things only: whether beta is drawn
anew for every example, and whether FiLM layers modulate the hidden layers by it. Data,
batches, noise, initial weights of the layers that both have, optimizer and training
loop are the same. Matrix products only, so that it trains on a CPU.
"""

import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.data import camvid
from benchmarks.models.small import linear
from yoto_jax import conditional

Array = jax.Array
Key = jax.Array
Params = dict[str, Any]
Losses = dict[str, Array]

LOW, HIGH = 0.125, 512.0
BETAS = (0.125, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0)
"""Of the fixed models."""
GRID = tuple(2.0**i for i in range(-3, 10))
"""At which the conditional model is measured; every second one is in ``BETAS``."""
SUPPORT = conditional.LogUniform(
    low={"reconstruction": 1.0, "kl": LOW}, high={"reconstruction": 1.0, "kl": HIGH}
)
NORMALIZE = None  # of the loss weights; the benchmark also tries "sum", "geometric"

HALVES = ("encoder", "decoder")
LATENT = 16
HIDDEN = 32  # units of a hidden layer at width 1
TRUNK = 16  # features of beta that all FiLM layers of a model share
BATCH = 64
GROUPS = 16  # betas in a batch, each for as many images
WARM_UP = 0.2  # of training, in which the KL divergence comes to count in full
SLOPE = 0.2  # of the leaky ReLU

SAMPLES = 32  # of the posterior of every image, to measure by

_SPLIT_SEED = 0
_EVALUATION_KEY = 2020  # one posterior noise for every evaluation


# Data.


class Data(NamedTuple):
    """Images as rows [n, pixels], from 0 to 1, split by the image they come from."""

    name: str
    shape: tuple[int, int, int]
    train: Array
    validation: Array
    test: Array
    floor: float  # of the decoder's standard deviation: below, pixels are noise
    rate: float  # of Adam, which falls to zero along a cosine


def load(folder: Path | None) -> Data:
    return digits() if folder is None else patches(folder)


def digits() -> Data:
    """The UCI digits that scikit-learn carries with it; one grey level is 1/16."""
    source = load_digits()
    images = (source.images / 16.0).reshape(len(source.images), -1)
    split = functools.partial(train_test_split, random_state=_SPLIT_SEED)
    indices, classes = np.arange(len(images)), source.target
    rest, test = split(indices, test_size=0.25, stratify=classes)
    train, validation = split(rest, test_size=0.2, stratify=classes[rest])
    parts = (jnp.asarray(images[i], jnp.float32) for i in (train, validation, test))
    return Data("UCI digits", (8, 8, 1), *parts, floor=1 / 16, rate=6e-3)


SIDE = 8  # of a patch
SIZE = (60, 80)  # that street scenes are resized to
PATCHES = 40  # of an image


def patches(folder: Path) -> Data:
    """Patches of the images of a folder; its ``val/`` is the test."""
    source = camvid.load(folder, SIZE)
    images, test = source["train"][0], source["val"][0]
    generator = np.random.default_rng(_SPLIT_SEED)
    order = generator.permutation(len(images))
    held_out = len(images) // 5
    parts = (images[order[held_out:]], images[order[:held_out]], test)
    cut = [jnp.asarray(_cut(generator, part)) for part in parts]
    return Data(
        f"patches of {folder.name}", (SIDE, SIDE, 3), *cut, floor=1 / 32, rate=2e-3
    )


def _cut(generator: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Patches at random places, as rows."""
    _, height, width, _ = images.shape
    n = len(images) * PATCHES
    rows = generator.integers(0, height - SIDE + 1, n)
    columns = generator.integers(0, width - SIDE + 1, n)
    places = zip(np.repeat(np.arange(len(images)), PATCHES), rows, columns, strict=True)
    cut = [images[i, y : y + SIDE, x : x + SIDE].ravel() for i, y, x in places]
    return np.stack(cut).astype(np.float32)


# The model.


def _widths(pixels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "encoder": (pixels, hidden, hidden, 2 * LATENT),
        "decoder": (LATENT, hidden, hidden, 2 * pixels),
    }


def init(
    seed: int, pixels: int, hidden: int, conditioned: bool, biases: bool = True
) -> Params:
    """Encoder and decoder of three dense layers; the same with and without FiLM.

    A conditional model can do without ``biases`` of its layers: the shifts of FiLM have
    biases themselves, and whatever it can be with both, it can be with those alone.
    """
    widths = _widths(pixels, hidden)
    # NumPy draws them, because programs that draw many arrays compile for seconds.
    generator = np.random.default_rng(seed)
    params: Params = {
        half: [_dense(generator, *pair) for pair in itertools.pairwise(of_half)]
        for half, of_half in widths.items()
    }
    if conditioned:
        size = conditional.encoding_size(SUPPORT)
        modulated = sum(sum(of_half[1:]) for of_half in widths.values())
        zeros = jnp.zeros((TRUNK, 2 * modulated), jnp.float32)
        params["trunk"] = _dense(generator, size, TRUNK)
        params["film"] = {"w": zeros, "b": zeros[0]}  # changes nothing at the start
    if not biases:
        for half in HALVES:
            params[half] = [{"w": layer["w"]} for layer in params[half]]
    return params


def _dense(
    generator: np.random.Generator, inputs: int, outputs: int
) -> dict[str, Array]:
    w = generator.normal(0, 1 / np.sqrt(inputs), (inputs, outputs))
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(outputs, jnp.float32)}


def _modulations(params: Params, c: Array | None) -> dict[str, list[Any]]:
    """Scale and shift for every layer, of all layers in one matrix product."""
    if c is None:
        return {half: [None] * len(params[half]) for half in HALVES}
    sizes = [layer["w"].shape[1] for half in HALVES for layer in params[half]]
    features = jnp.tanh(linear(params["trunk"], c))
    ends = np.cumsum(np.repeat(sizes, 2))[:-1]
    parts = iter(jnp.split(linear(params["film"], features), ends, axis=-1))
    pairs = iter([(scale, next(parts)) for scale in parts])
    return {half: [next(pairs) for _ in params[half]] for half in HALVES}


def _half(layers: list[Params], modulations: list[Any], x: Array) -> Array:
    for i, (layer, modulation) in enumerate(zip(layers, modulations, strict=True)):
        x = linear(layer, x) if "b" in layer else x @ layer["w"]
        if modulation is not None:
            x = conditional.modulate(x, *modulation)
        if i < len(layers) - 1:
            x = jax.nn.leaky_relu(x, SLOPE)
    return x


class Codec(NamedTuple):
    """A model that has been told its weights."""

    params: Params
    modulations: dict[str, list[Any]]
    floor: float

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the posterior."""
        out = _half(self.params["encoder"], self.modulations["encoder"], x)
        mean, raw = jnp.split(out, 2, axis=-1)
        return mean, jax.nn.softplus(raw) + 1e-6

    def decode(self, z: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of every pixel."""
        out = _half(self.params["decoder"], self.modulations["decoder"], z)
        mean, raw = jnp.split(out, 2, axis=-1)
        return mean, jax.nn.softplus(raw) + self.floor

    def reconstruct(self, x: Array) -> Array:
        """Mean of the pixels at the mean of the posterior: what a user calls."""
        return self.decode(self.encode(x)[0])[0]


def codec(params: Params, c: Array | None, floor: float) -> Codec:
    """A model for encoded weights.

    Args:
      params: Of the model.
      c: [n, E] for images [n, ..., pixels], [E] if all have the same weights, ``None``
        for a fixed model.
      floor: Of the decoder's standard deviation.
    """
    return Codec(params, _modulations(params, c), floor)


def losses_of(model: Codec, x: Array, noise: Array) -> Losses:
    """Both losses of each example [...], with one posterior sample.

    Args:
      model: For all of them, or for the first axis.
      x: Images [..., pixels].
      noise: Standard normal [..., LATENT].
    """
    mean, deviation = model.encode(x)
    pixels, spread = model.decode(mean + deviation * noise)
    error = 0.5 * ((x - pixels) / spread) ** 2 + jnp.log(spread)
    divergence = 0.5 * (mean**2 + deviation**2 - 1) - jnp.log(deviation)
    return {
        "reconstruction": jnp.sum(error + 0.5 * np.log(2 * np.pi), axis=-1),
        "kl": jnp.sum(divergence, axis=-1),
    }


# Training.


class Setting(NamedTuple):
    """What a run needs to know beyond its seed and its beta."""

    hidden: int
    steps: int
    normalize: str | None = NORMALIZE
    groups: int = GROUPS


class Trained(NamedTuple):
    params: Params  # stacked: [seeds, ...], with one beta each [seeds, betas, ...]
    seconds: float
    compile_seconds: float


def weights_of(beta: Array) -> Losses:
    return {"reconstruction": jnp.ones_like(beta), "kl": beta}


def optimizer(setting: Setting, data: Data) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(data.rate, setting.steps))


def training_step(setting: Setting, data: Data, beta: Array | None) -> Any:
    """A step of a run, with a key, a carry and its number: for one beta, or ``None``.

    The KL divergence comes to count over the first steps, for all models. Without
    that, a conditional model can forget its latent code before it has learned that some
    betas need it.
    """
    groups = setting.groups
    tx = optimizer(setting, data)

    def step(key: Key, carry: Any, i: Array) -> Any:
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        rows = jax.random.randint(
            keys[0], (groups, BATCH // groups), 0, len(data.train)
        )
        x, noise = data.train[rows], jax.random.normal(keys[1], (*rows.shape, LATENT))
        if beta is None:
            weights = SUPPORT.sample(keys[2], groups, method="stratified")
            c = conditional.encode(weights, SUPPORT)
        else:
            weights, c = weights_of(jnp.full(groups, beta)), None
        ramp = jnp.minimum(1.0, i / (WARM_UP * setting.steps))

        def objective(params: Params) -> Array:
            losses = losses_of(codec(params, c, data.floor), x, noise)
            of_group = jax.tree.map(lambda loss: loss.mean(axis=-1), losses)
            risen = of_group | {"kl": ramp * of_group["kl"]}
            return conditional.conditional_loss(
                risen, weights, normalize=setting.normalize
            )

        updates, state = tx.update(jax.grad(objective)(params), state)
        return optax.apply_updates(params, updates), state

    return step


def train(setting: Setting, data: Data, seeds: int, betas: Array | None) -> Trained:
    """All seeds, and with ``betas`` all of these, side by side in one program."""

    def run(seed: Array, params: Params, beta: Array | None) -> Params:
        step = functools.partial(
            training_step(setting, data, beta), jax.random.key(seed)
        )
        one = lambda carry, i: (step(carry, i), None)
        carry = (params, optimizer(setting, data).init(params))
        return jax.lax.scan(one, carry, jnp.arange(1, setting.steps + 1))[0][0]

    pixels = data.train.shape[1]
    first = [init(seed, pixels, setting.hidden, betas is None) for seed in range(seeds)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)
    across_seeds = lambda run: jax.vmap(run, (0, 0, None))
    across_betas = jax.vmap(run, (None, None, 0))
    program = jax.jit(across_seeds(run if betas is None else across_betas))
    inputs = (jnp.arange(seeds), stacked, betas)
    start = time.perf_counter()
    compiled = program.lower(*inputs).compile()
    middle = time.perf_counter()
    params = jax.block_until_ready(compiled(*inputs))
    return Trained(params, time.perf_counter() - middle, middle - start)


# Measuring.


def measure(
    params: Params, images: Array, weights: Losses | None, floor: float
) -> Losses:
    """Mean losses over the images, with many posterior samples from one fixed noise.

    Args:
      params: Of one model.
      images: [n, pixels].
      weights: Scalars that a conditional model is asked for, ``None`` for a fixed one.
      floor: Of the decoder's standard deviation.
    """
    c = None if weights is None else conditional.encode(weights, SUPPORT)
    keys = jax.random.split(jax.random.key(_EVALUATION_KEY), SAMPLES)

    def one(key: Key) -> Losses:
        noise = jax.random.normal(key, (len(images), LATENT))
        return losses_of(codec(params, c, floor), images, noise)

    return jax.tree.map(jnp.mean, jax.lax.map(one, keys))


@jax.jit
def measure_fixed(params: Params, images: Array, floor: float) -> Losses:
    """Losses [seeds, betas] of stacked fixed models."""
    one = lambda params: measure(params, images, None, floor)
    return jax.vmap(lambda params: jax.lax.map(one, params))(params)


@jax.jit
def measure_conditional(
    params: Params, images: Array, betas: Array, floor: float
) -> Losses:
    """Losses [seeds, betas] of stacked conditional models."""

    def across(params: Params) -> Losses:
        one = lambda weights: measure(params, images, weights, floor)
        return conditional.sweep(one, weights_of(betas), batch_size=1)

    return jax.vmap(across)(params)
