"""Semantic segmentation under a shift of conditions: CISS's losses for the source.

The primary loss is the cross-entropy on clean images. The auxiliary one asks the
encoder for the same features of an image and of a stylised view of it: its
low-frequency amplitudes come from an unlabelled image of a target condition. Labels of
target conditions are for the test alone.
"""

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import camvid, scenes
from benchmarks.data import conditions as styles
from benchmarks.harness.options import UsageError
from benchmarks.harness.training import Measured, Size, Task
from benchmarks.models.vision import Decoder, Encoder
from benchmarks.tasks.segmentation import metrics

PyTree = Any
Key = jax.Array

PRIMARY = "ce"
AUXILIARY = ("invariance",)
CLEAN = "clean"
UNSEEN = tuple(styles.CONDITIONS)
BAND = (0.01, 0.1)  # of the amplitudes that are swapped, relative to the smaller side

_DATA_KEY = 2026
_HELD_OUT = 0.2  # of the training images of a folder, for validation


SIZES = {
    "quick": Size(10, 24, 32, 32, 32, 4, 8, 1, 3),
    "cpu": Size(600, 48, 64, 1000, 200, 8, 32, 2, 3),
    "gpu": Size(6000, 96, 128, 10_000, 1000, 16, 96, 4, 13),
}
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.01


class Images(NamedTuple):
    images: jax.Array  # [n, h, w, 3]
    labels: jax.Array  # [n, h, w]


class Data(NamedTuple):
    """What training sees: the targets have no labels."""

    train: Images
    targets: jax.Array  # [m, h, w, 3], in target conditions
    validation: Images


class Source(NamedTuple):
    """Images, their labels, and what the labels mean."""

    name: str
    train: Images
    validation: Images
    tests: dict[str, Images]  # by condition
    targets: jax.Array
    classes: tuple[str, ...]
    void: int | None


class SegmentationNet(nn.Module):
    features: int
    blocks: int
    classes: int

    def setup(self) -> None:
        self.encoder = Encoder(self.features, self.blocks)
        self.decoder = Decoder(self.classes)

    def encode(self, images: jax.Array) -> jax.Array:
        return self.encoder(images)

    def logits(self, z: jax.Array) -> jax.Array:
        return self.decoder(z)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(self.encode(images))


class Batch(NamedTuple):
    images: jax.Array  # [n, h, w, 3]
    styled: jax.Array  # [n, h, w, 3]
    labels: jax.Array  # [n, h, w]


def draw(images: Images, targets: jax.Array, batch: int, key: Key) -> Batch:
    """Random images, some mirrored, and their stylised views."""
    key_choice, key_target, *keys = jax.random.split(key, 4)
    chosen = jax.random.randint(key_choice, (batch,), 0, len(images.images))
    target = jax.random.randint(key_target, (batch,), 0, len(targets))
    few = Images(images.images[chosen], images.labels[chosen])
    return views(few, targets[target], *keys)


def views(images: Images, targets: jax.Array, key_mirror: Key, key_style: Key) -> Batch:
    """Images, some mirrored, and their views in the style of as many targets."""
    mirror = jax.random.bernoulli(key_mirror, shape=(len(targets), 1, 1))
    x, labels = images
    x = jnp.where(mirror[..., None], x[:, :, ::-1], x)
    labels = jnp.where(mirror, labels[:, :, ::-1], labels)
    return Batch(x, stylise(key_style, x, targets), labels)


def stylise(key: Key, images: jax.Array, targets: jax.Array) -> jax.Array:
    """Fourier domain adaptation with a band of random width."""
    low, high = BAND
    band = jax.random.uniform(key, (len(images),), minval=low, maxval=high)
    return jnp.clip(styles.fda(images, targets, band), 0, 1)


# Data.


def load(size: Size, folder: Path | None) -> Source:
    if folder is None:
        return _from_scenes(size)
    return _from_folder(size, folder)


def _from_scenes(size: Size) -> Source:
    key = jax.random.key(_DATA_KEY)

    def render(number: int, images: int) -> scenes.Scenes:
        domain = scenes.DOMAINS["train"]
        own = jax.random.fold_in(key, number)
        return scenes.render(own, images, domain, size.height, size.width)

    train = render(0, size.train_images)
    validation, test, others = (render(i, size.test_images) for i in (1, 2, 3))
    as_images = lambda s: Images(s.images, s.labels)
    tests = {
        condition: Images(x, test.labels)
        for condition, x in conditioned(key, test.images, test.depth).items()
    }
    targets = jnp.concatenate(
        list(conditioned(jax.random.key(1), others.images, others.depth).values())[1:]
    )
    return Source(
        "scenes",
        as_images(train),
        as_images(validation),
        tests,
        targets,
        scenes.CLASSES,
        None,
    )


def _from_folder(size: Size, folder: Path) -> Source:
    """Without a test split of its own, the validation split is the test."""
    try:
        splits = camvid.load(folder, (size.height, size.width))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    train = Images(*map(jnp.asarray, splits["train"]))
    order = np.random.default_rng(0).permutation(len(train.images))
    if "test" in splits:
        validation = Images(*map(jnp.asarray, splits["val"]))
        test = Images(*map(jnp.asarray, splits["test"]))
    else:
        cut = round(_HELD_OUT * len(order))
        held_out, order = order[:cut], order[cut:]
        validation = Images(*(x[held_out] for x in train))
        test = Images(*map(jnp.asarray, splits["val"]))
    if len(order) < 2:
        raise UsageError(f"{folder} has too few training images: {len(train.images)}")
    # One half lends its images, without labels, to the target conditions.
    half = len(order) // 2
    lent, order = order[:half], order[half:]
    key = jax.random.key(_DATA_KEY)
    conditions = conditioned(jax.random.key(1), train.images[lent])
    return Source(
        "camvid",
        Images(*(x[order] for x in train)),
        validation,
        {
            condition: Images(x, test.labels)
            for condition, x in conditioned(key, test.images).items()
        },
        jnp.concatenate([conditions[c] for c in UNSEEN]),
        camvid.CLASSES,
        camvid.VOID,
    )


def conditioned(
    key: Key, images: jax.Array, depth: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The images, clean and in every target condition."""
    return {CLEAN: images} | {
        name: jax.jit(condition)(jax.random.fold_in(key, i), images, depth)
        for i, (name, condition) in enumerate(styles.CONDITIONS.items())
    }


# The task.


def name_of(source: Source) -> str:
    """Of the result: that of the procedural scenes has the plain name."""
    suffix = "" if source.name == "scenes" else f"_{source.name}"
    return f"segmentation{suffix}"


@dataclasses.dataclass(frozen=True)
class Model:
    """The network as functions of its parameters."""

    net: SegmentationNet
    void: int | None

    def init(self, key: Key, images: jax.Array) -> PyTree:
        return self.net.init(key, images)["params"]

    def _apply(self, params: PyTree, method: Any, *arguments: Any) -> Any:
        return self.net.apply({"params": params}, *arguments, method=method)

    def encode(self, params: PyTree, batch: Batch) -> jax.Array:
        both = jnp.concatenate([batch.images, batch.styled])
        return self._apply(params, SegmentationNet.encode, both)

    def logits(self, params: PyTree, z: jax.Array) -> jax.Array:
        return self._apply(params, SegmentationNet.logits, z)

    def losses(
        self, params: PyTree, z: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        clean, styled = jnp.split(z, 2)
        return {
            "ce": cross_entropy(self.logits(params, clean), batch.labels, self.void),
            "invariance": jnp.mean((clean - styled) ** 2),
        }

    def downstream(self, params: PyTree, z: jax.Array, batch: Batch) -> jax.Array:
        """The cross-entropy on stylised views of held-out images."""
        _, styled = jnp.split(z, 2)
        return cross_entropy(self.logits(params, styled), batch.labels, self.void)


def make(size: Size, source: Source) -> tuple[Task, Any]:
    """The task, and the network."""
    data = Data(source.train, source.targets, source.validation)
    net = SegmentationNet(size.features, size.blocks, len(source.classes))
    model = Model(net, source.void)
    views = validation_views(source)
    task = Task(
        name=name_of(source),
        settings={
            "size": size._asdict(),
            "learning_rate": LEARNING_RATE,
            "data": source.name,
            "labels": zlib.crc32(np.asarray(source.train.labels)),
        },
        primary=PRIMARY,
        auxiliary=AUXILIARY,
        data=data,
        init=lambda key: model.init(key, source.train.images[:1]),
        draw=lambda data, key: draw(data.train, data.targets, size.batch, key),
        draw_held_out=lambda data, key: draw(
            data.validation, data.targets, max(1, size.batch // 4), key
        ),
        encode=model.encode,
        losses=model.losses,
        downstream=model.downstream,
        validate=lambda models: validate(model, models, views),
        test=lambda models: test(model, models, source.tests),
        steps=size.steps,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lanes=size.lanes,
    )
    return task, net


# Metrics.


def validation_views(source: Source) -> tuple[Images, Images]:
    """All that a selection may look at: no labelled image of a target condition."""
    validation = source.validation
    key = jax.random.key(_DATA_KEY)
    drawn = jax.random.randint(key, (len(validation.images),), 0, len(source.targets))
    styled = stylise(key, validation.images, source.targets[drawn])
    return validation, Images(styled, validation.labels)


def validate(model: Model, models: PyTree, views: tuple[Images, Images]) -> np.ndarray:
    clean, shifted = (evaluate(model, models, images) for images in views)
    return np.asarray((clean + shifted) / 2)


def test(model: Model, models: PyTree, tests: dict[str, Images]) -> Measured:
    return {
        ("mIoU", domain): np.asarray(evaluate(model, models, images))
        for domain, images in tests.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model: Model, models: PyTree, images: Images) -> jax.Array:
    """Mean IoU of every model, in percent."""

    def of_one(params: PyTree) -> jax.Array:
        predicted = jnp.argmax(model.net.apply({"params": params}, images.images), -1)
        classes = model.net.classes
        counts = metrics.confusion(predicted, images.labels, classes, model.void)
        return 100 * metrics.mean_iou(counts)

    return jax.lax.map(of_one, models)


def cross_entropy(logits: jax.Array, labels: jax.Array, void: int | None) -> jax.Array:
    """Mean over the pixels that have a class."""
    counted = jnp.ones(labels.shape, bool) if void is None else labels != void
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(counted, labels, 0)
    )
    return jnp.sum(jnp.where(counted, each, 0)) / jnp.maximum(jnp.sum(counted), 1)


def constant(source: Source) -> dict[str, float]:
    """Mean IoU of the most frequent class of each pixel, whatever the image shows."""
    one_hot = jax.nn.one_hot(source.train.labels, len(source.classes))
    usual = jnp.argmax(jnp.sum(one_hot, axis=0), axis=-1)
    found = {}
    for domain, images in source.tests.items():
        predicted = jnp.broadcast_to(usual, images.labels.shape)
        counts = metrics.confusion(
            predicted, images.labels, len(source.classes), source.void
        )
        found[domain] = float(100 * metrics.mean_iou(counts))
    return found
