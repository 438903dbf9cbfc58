"""Monocular depth with an unknown camera: UniDepth's losses on procedural scenes.

The primary loss is that of the depth. The camera loss trains the head that tells where
the rays of the pixels point, which the depth is decoded with; the geometric invariance
asks two views of an image for the same features. Tests are zero-shot: on a lens, on a
family of scenes, and on both, that were never trained on.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import cameras, scenes
from benchmarks.harness.training import Measured, Size, Task
from benchmarks.models.vision import PATCH, Decoder, Encoder, from_patches
from benchmarks.tasks.depth import metrics
from benchmarks.tasks.depth.losses import camera, invariance, silog
from benchmarks.tasks.depth.views import (
    Warp,
    random_warp,
    warp_angles,
    warp_depth,
    warp_directions,
    warp_images,
)

PyTree = Any
Key = jax.Array

PRIMARY = "silog"
AUXILIARY = ("camera", "invariance")
EXTRA = ("gradient", "reconstruction", "noise", "constant", "shuffled", "collapse")
"""Further losses: two that may help, two useless ones, two harmful ones."""
SEEN = "train"
UNSEEN = ("lens", "room", "both")

_DATA_KEY = 2025  # the same scenes for every run
_TYPICAL_DEPTH = 8.0  # metres; the head starts near it


SIZES = {
    "quick": Size(10, 24, 32, 32, 32, 4, 8, 1, 3),
    "cpu": Size(800, 32, 48, 4000, 256, 8, 32, 2, 3),
    "gpu": Size(6000, 96, 144, 40_000, 1000, 16, 96, 4, 15),
}
ZOOM = (1.0, 1.25)
ANGLE = math.radians(10)  # the unit of the camera loss: about the spread of angles
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.01


class DepthNet(nn.Module):
    """Features, a camera head, and a depth head that is told the camera."""

    features: int
    blocks: int

    def setup(self) -> None:
        self.encoder = Encoder(self.features, self.blocks)
        self.glance = nn.Dense(self.features)
        self.pinhole = nn.Dense(3, kernel_init=nn.initializers.zeros)
        self.prompt = nn.Dense(self.features)
        self.decoder = Decoder(1)
        self.reconstruction = nn.Dense(3 * PATCH**2)
        self.noise = nn.Dense(1)

    def encode(self, images: jax.Array) -> jax.Array:
        return self.encoder(images)

    def directions(self, z: jax.Array) -> jax.Array:
        """Directions of the pixels: a pinhole anywhere, of any focal length."""
        glance = jnp.mean(nn.gelu(self.glance(z)), axis=(1, 2))
        raw = self.pinhole(glance)
        height, width = z.shape[1] * PATCH, z.shape[2] * PATCH
        view = Warp(jnp.exp(raw[:, 0]), raw[:, 1:])
        return warp_directions(jnp.ones(len(z)), view, height, width)

    def log_depth(self, z: jax.Array, directions: jax.Array) -> jax.Array:
        """As in UniDepth, the depth does not train the camera that it is told.

        What is decoded is the depth that the image would show through a lens of focal
        length 1: the longer the lens, the farther is what looks the same.
        """
        directions = jax.lax.stop_gradient(directions)
        angles = cameras.angles_of(directions)
        at_patches = angles[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        x = self.decoder(z + self.prompt(at_patches))
        across = directions[:, 0, -1, 0] - directions[:, 0, 0, 0]
        return x[..., 0] + jnp.log(_TYPICAL_DEPTH / across)[:, None, None]

    def decode(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log depth [n, h, w] and directions [n, h, w, 3]."""
        directions = self.directions(z)
        return self.log_depth(z, directions), directions

    def pixels(self, z: jax.Array) -> jax.Array:
        """The image, as far as the features of a patch tell."""
        return from_patches(self.reconstruction(z))

    def guess(self, z: jax.Array) -> jax.Array:
        """A number for each patch."""
        return self.noise(z)[..., 0]

    def everything(self, images: jax.Array) -> None:
        """Call every head, to initialise it."""
        z = self.encode(images)
        self(images), self.pixels(z), self.guess(z)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log depth [n, h, w] and directions [n, h, w, 3]."""
        return self.decode(self.encode(images))


class Batch(NamedTuple):
    """Two views of each of n images, the first views first."""

    images: jax.Array  # [2 n, h, w, 3]
    depth: jax.Array  # [2 n, h, w]
    angles: jax.Array  # [2 n, h, w, 2]
    views: tuple[Warp, Warp]
    noise: jax.Array  # [2 n, h / 4, w / 4]


def draw(data: scenes.Scenes, batch: int, key: Key) -> Batch:
    """Two geometric and photometric views of random images."""
    key_choice, *keys = jax.random.split(key, 6)
    chosen = jax.random.randint(key_choice, (batch,), 0, len(data.images))
    return two_views(jax.tree.map(lambda x: x[chosen], data), keys)


def two_views(data: scenes.Scenes, keys: Sequence[Key]) -> Batch:
    """Two views of each image, by five keys."""
    images, depth, focal = data.images, data.depth, data.focal
    batch, height, width = depth.shape
    key_noise, *keys = keys
    views = [random_warp(k, batch, ZOOM) for k in keys[:2]]
    seen = [
        jitter(k, warp_images(images, v)) for k, v in zip(keys[2:], views, strict=True)
    ]
    return Batch(
        jnp.concatenate(seen),
        jnp.concatenate([warp_depth(depth, v) for v in views]),
        jnp.concatenate([warp_angles(focal, v, height, width) for v in views]),
        (views[0], views[1]),
        jax.random.normal(key_noise, (2 * batch, height // PATCH, width // PATCH)),
    )


def jitter(key: Key, images: jax.Array) -> jax.Array:
    """Contrast, brightness and tint of each image changed at random."""
    key_contrast, key_shift = jax.random.split(key)
    shape = (len(images), 1, 1, 1)
    contrast = jnp.exp(0.2 * jax.random.normal(key_contrast, shape))
    shift = 0.06 * jax.random.normal(key_shift, (len(images), 1, 1, 3))
    return jnp.clip(0.5 + contrast * (images - 0.5) + shift, 0, 1)


def vignette(data: scenes.Scenes) -> scenes.Scenes:
    """Images darker towards the corners, by the fourth power of the cosine.

    So are those of real lenses, the wider the more: it is how a camera can be told.
    """
    rays = scenes.ray_directions(data.focal, *data.depth.shape[1:])
    cosine = 1 / jnp.linalg.norm(rays, axis=-1, keepdims=True)
    return data._replace(images=data.images * cosine**4)


def gradients(log_depth: jax.Array, depth: jax.Array) -> jax.Array:
    """Mean absolute error of the differences between neighbours in log depth."""
    truth = jnp.log(jnp.where(depth > 0, depth, 1))
    total, count = 0.0, 0.0
    for axis in (1, 2):
        valid = depth > 0
        cut = lambda x, first, axis=axis: jax.lax.slice_in_dim(
            x, first, x.shape[axis] - 1 + first, axis=axis
        )
        both = cut(valid, 0) & cut(valid, 1)
        error = jnp.diff(log_depth, axis=axis) - jnp.diff(truth, axis=axis)
        total += jnp.sum(jnp.where(both, jnp.abs(error), 0))
        count += jnp.sum(both)
    return total / jnp.maximum(count, 1)


class Splits(NamedTuple):
    """Scenes to train on, to select by, and to test on by domain."""

    train: scenes.Scenes
    validation: scenes.Scenes
    tests: dict[str, scenes.Scenes]


def render(size: Size) -> Splits:
    """The scenes, the same for every run."""
    key = jax.random.key(_DATA_KEY)

    def split(number: int, domain: str, images: int) -> scenes.Scenes:
        own = jax.random.fold_in(key, number)
        look = scenes.DOMAINS[domain]
        return vignette(scenes.render(own, images, look, size.height, size.width))

    return Splits(
        split(0, SEEN, size.train_images),
        split(1, SEEN, size.test_images),
        {
            domain: split(2 + i, domain, size.test_images)
            for i, domain in enumerate((SEEN, *UNSEEN))
        },
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """The network as functions of its parameters, with some of the further losses."""

    net: DepthNet
    further: tuple[str, ...]

    def init(self, key: Key, images: jax.Array) -> PyTree:
        method = DepthNet.everything if self.further else None
        return self.net.init(key, images, method=method)["params"]

    def _apply(self, params: PyTree, method: Any, *arguments: Any) -> Any:
        return self.net.apply({"params": params}, *arguments, method=method)

    def encode(self, params: PyTree, batch: Batch) -> jax.Array:
        return self._apply(params, DepthNet.encode, batch.images)

    def predict(self, params: PyTree, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._apply(params, DepthNet.decode, z)

    def losses(
        self, params: PyTree, z: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        log_depth, directions = self.predict(params, z)
        first, second = jnp.split(z, 2)
        further = {
            "gradient": lambda: gradients(log_depth, batch.depth),
            "reconstruction": lambda: jnp.mean(
                (self._apply(params, DepthNet.pixels, z) - batch.images) ** 2
            ),
            "noise": lambda: jnp.mean(
                (self._apply(params, DepthNet.guess, z) - batch.noise) ** 2
            ),
            "constant": lambda: jnp.float32(0.5),
            "shuffled": lambda: silog(log_depth, jnp.roll(batch.depth, 1, axis=0)),
            "collapse": lambda: jnp.mean(jnp.var(z, axis=0)),
        }
        return {
            "silog": silog(log_depth, batch.depth),
            "camera": camera(
                cameras.angles_of(directions) / ANGLE, batch.angles / ANGLE
            ),
            "invariance": invariance(first, second, *batch.views),
        } | {name: further[name]() for name in self.further}

    def downstream(self, params: PyTree, z: jax.Array, batch: Batch) -> jax.Array:
        return silog(self.predict(params, z)[0], batch.depth)


def make(size: Size, extra: int = 0) -> tuple[Task, dict[str, scenes.Scenes], DepthNet]:
    """The task, the scenes of the tests by domain, and the network.

    Args:
      size: How large.
      extra: How many of the further losses to add.
    """
    train, validation, tests = render(size)
    model = Model(DepthNet(size.features, size.blocks), EXTRA[:extra])
    auxiliary = (*AUXILIARY, *model.further)
    task = Task(
        name="depth",
        settings={
            "size": size._asdict(),
            "learning_rate": LEARNING_RATE,
            "auxiliary": auxiliary,
        },
        primary=PRIMARY,
        auxiliary=auxiliary,
        data=(train, validation),
        init=lambda key: model.init(key, train.images[:1]),
        draw=lambda data, key: draw(data[0], size.batch, key),
        draw_held_out=lambda data, key: draw(data[1], max(1, size.batch // 4), key),
        encode=model.encode,
        losses=model.losses,
        downstream=model.downstream,
        validate=lambda models: np.asarray(score(model.net, models, validation)),
        test=lambda models: test(model.net, models, tests),
        steps=size.steps,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lanes=size.lanes,
    )
    return task, tests, model.net


# Metrics.


def test(net: DepthNet, models: PyTree, tests: dict[str, scenes.Scenes]) -> Measured:
    """All metrics of every model, by metric and domain."""
    measured: Measured = {}
    for domain, data in tests.items():
        of_domain = evaluate(net, models, data)
        measured |= {(m, domain): np.asarray(x) for m, x in of_domain.items()}
    return measured


@functools.partial(jax.jit, static_argnums=0)
def evaluate(
    net: DepthNet, models: PyTree, data: scenes.Scenes
) -> dict[str, jax.Array]:
    return jax.lax.map(lambda model: measure_model(net, model, data), models)


@functools.partial(jax.jit, static_argnums=0)
def score(net: DepthNet, models: PyTree, data: scenes.Scenes) -> jax.Array:
    """One metric: those of point clouds, which take longest, are left out."""
    return jax.lax.map(lambda model: measure_model(net, model, data)["delta1"], models)


def measure_model(
    net: DepthNet, model: PyTree, data: scenes.Scenes
) -> dict[str, jax.Array]:
    log_depth, directions = net.apply({"params": model}, data.images)
    return measure_images(jnp.exp(log_depth), directions, data)


def measure_images(
    depth: jax.Array, directions: jax.Array, data: scenes.Scenes
) -> dict[str, jax.Array]:
    """The seven metrics, averaged over images; shares in percent."""
    truth = scenes.ray_directions(data.focal, *data.depth.shape[1:])
    found = metrics.depth_metrics(depth, directions, data.depth, truth)
    means = metrics.mean_metrics(found, data.depth)
    percent = {name: 100 * means[name] for name in ("A.Rel", "delta1")}
    return means | percent


def constant(train: scenes.Scenes, data: scenes.Scenes) -> dict[str, float]:
    """Metrics of the best that ignores the image: the usual depth of each pixel."""
    log = jnp.log(jnp.where(train.depth > 0, train.depth, jnp.nan))
    usual = jnp.exp(jnp.nan_to_num(jnp.nanmedian(log, axis=0), nan=jnp.log(40.0)))
    n = len(data.images)
    focal = jnp.broadcast_to(jnp.median(train.focal), (n,))
    directions = scenes.ray_directions(focal, *usual.shape)
    depth = jnp.broadcast_to(usual, data.depth.shape)
    found = measure_images(depth, directions, data)
    return {name: float(value) for name, value in found.items()}
