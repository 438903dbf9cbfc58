"""Self-supervised pretraining with VICReg: data, views, model, training and probes.

An encoder learns from two random views of unlabelled images. How good it is shows in
how well a linear classifier does on its frozen representation, given few labels.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.image import imread
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    cross_val_score,
    train_test_split,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import yoto_jax as yoto
from benchmarks.harness import grids
from benchmarks.harness.grids import Outcome
from benchmarks.harness.options import UsageError

PyTree = Any
Key = jax.Array

LOSSES = ("invariance", "variance", "covariance")
PUBLISHED = (25.0, 25.0, 1.0)
DOWNSTREAM = "classification"

LABELLED = 0.1  # share of the training images whose labels are known
UNLABELLED = -1
NEIGHBOURS = 5
DECAY = 0.01  # of the classifier; that of the probe is one over the number of labels

_SPLIT_SEED = 0
_PATCH = 16  # pixels, of which the label is that of the middle
_MIDDLE = 4
_MAJORITY = 0.35  # least share of the patch that has the label of its middle
_STRIDE = 8
_VOID = 11
_PATCHES = {"train": 512, "val": 350}  # of each class


# Data.


@dataclasses.dataclass(frozen=True)
class Views:
    """How far a view may be from its image.

    Attributes:
      zoom: Largest factor by which height and width shrink or grow, each by its own.
      shift: Largest shift as a share of height and width.
      contrast: Largest factor.
      brightness: Largest offset, of pixels from 0 to 1.
      tint: Largest offset of each colour, apart from that of all.
      noise: Largest standard deviation.
      blur: Largest share of the blurred image.
      cutout: Largest share of height and width that is cut out.
      flip: Whether to mirror half of the views.
      border: Whether to repeat the border outside of the image, or take 0.
    """

    zoom: float = 1.1
    shift: float = 0.1
    contrast: float = 1.2
    brightness: float = 0.1
    tint: float = 0.0
    noise: float = 0.1
    blur: float = 0.5
    cutout: float = 0.25
    flip: bool = False
    border: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What belongs to a data set.

    Attributes:
      name: Of the data.
      views: See there.
      patch: Side of the squares that the first layer sees one by one, 0 for all pixels.
      widths: Of the encoder; the last is that of the representation.
      projector: Widths of the projector.
      batch: Number of images, each of which has two views.
      labelled: How many of them come from the labelled ones, at least.
      learning_rate: Of the encoder and everything on it, at its highest.
    """

    name: str
    views: Views
    patch: int = 0
    widths: tuple[int, ...] = (128, 64)
    projector: tuple[int, ...] = (128, 128)
    batch: int = 96
    labelled: int = 24
    learning_rate: float = 4e-3


DIGITS = Task("digits", Views())
CAMVID = Task(
    "camvid",
    Views(contrast=1.5, tint=0.1, noise=0.05, blur=1.0, flip=True, border=True),
    patch=4,
    widths=(16, 128, 64),
)


class Data(NamedTuple):
    """Images [n, height, width, colours] from 0 to 1 and labels [n], NumPy arrays."""

    images: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray  # indices of the training images whose labels are known
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """The labels that training may see, ``UNLABELLED`` for the others."""
        known = np.full_like(self.labels, UNLABELLED)
        known[self.labelled] = self.labels[self.labelled]
        return known

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def load(folder: Path | None) -> tuple[Task, Data]:
    """The UCI digits that scikit-learn carries with it, or patches of a folder."""
    return (DIGITS, _digits()) if folder is None else (CAMVID, _patches(folder))


def _digits() -> Data:
    digits = load_digits()
    images = np.asarray(digits.images[..., None] / 16.0, np.float32)
    labels = np.asarray(digits.target, np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=_SPLIT_SEED
    )
    return _with_few_labels(images[train], labels[train], images[test], labels[test])


def _with_few_labels(images: Any, labels: Any, *test: Any) -> Data:
    labelled, _ = train_test_split(
        np.arange(len(labels)),
        train_size=LABELLED,
        stratify=labels,
        random_state=_SPLIT_SEED,
    )
    return Data(images, labels, np.sort(labelled), *test)


def _patches(folder: Path) -> Data:
    """Patches of street scenes: as many of each class that has enough of them."""
    parts = {part: _cut(folder, part) for part in _PATCHES}
    counts = [
        np.bincount(labels, minlength=_VOID) >= _PATCHES[part]
        for part, (_, labels) in parts.items()
    ]
    classes = np.flatnonzero(np.all(counts, axis=0))
    if len(classes) < 2:
        raise UsageError(f"too few labelled patches of two classes in {folder.name}")
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for part, (images, labels) in parts.items():
        of_classes = [
            rng.choice(np.flatnonzero(labels == c), _PATCHES[part], replace=False)
            for c in classes
        ]
        chosen += [
            images[np.concatenate(of_classes)],
            np.repeat(np.arange(len(classes), dtype=np.int32), _PATCHES[part]),
        ]
    return _with_few_labels(*chosen)


def _cut(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """All patches of a part whose middle stands for them, and their labels."""
    images, labels = [], []
    for path in sorted((folder / part).glob("*.png")):
        image = imread(path)[..., :3]
        # Class numbers are stored as grey values of 8 bits, which are read as shares.
        annotation = np.rint(255 * imread(folder / f"{part}annot" / path.name))
        annotation = annotation[..., 0] if annotation.ndim == 3 else annotation
        windows = _windows(annotation.astype(int))
        off = (_PATCH - _MIDDLE) // 2
        middle = windows[:, off : off + _MIDDLE, off : off + _MIDDLE]
        shares = _shares(windows)
        label = _shares(middle).argmax(axis=-1)
        clear = (label < _VOID) & (
            np.take_along_axis(shares, label[:, None], axis=-1)[:, 0] >= _MAJORITY
        )
        images.append(_windows(image)[clear])
        labels.append(label[clear])
    if not images:
        raise UsageError(f"no images in {folder.name}/{part}")
    return np.concatenate(images), np.concatenate(labels)


def _windows(image: np.ndarray) -> np.ndarray:
    view = np.lib.stride_tricks.sliding_window_view(image, (_PATCH, _PATCH), (0, 1))
    view = view[::_STRIDE, ::_STRIDE]
    flat = view.reshape(-1, *view.shape[2:])
    return np.moveaxis(flat, 1, -1) if image.ndim == 3 else flat


def _shares(windows: np.ndarray) -> np.ndarray:
    return np.stack([(windows == c).mean(axis=(1, 2)) for c in range(_VOID + 1)], -1)


# Views.


def view(key: Key, images: jax.Array, views: Views) -> jax.Array:
    """A random view of every image.

    Args:
      key: Of all that is random.
      images: [n, height, width, colours] from 0 to 1.
      views: How far a view may be from its image.

    Returns:
      Images of the same shape, from 0 to 1.
    """
    n, height, width, colours = images.shape
    # One draw for all: each costs seconds of compilation.
    key_uniform, key_normal = jax.random.split(key)
    draws = iter(jax.random.uniform(key_uniform, (13 + colours, n)))

    def uniform(low: float, high: float, *shape: int) -> jax.Array:
        numbers = jnp.stack([next(draws) for _ in range(math.prod(shape))], axis=-1)
        return low + (high - low) * numbers.reshape(n, *shape)

    def around(reach: float, *shape: int) -> jax.Array:
        return uniform(-reach, reach, *shape)

    def factor(most: float, *shape: int) -> jax.Array:
        return jnp.exp(around(float(np.log(most)), *shape))

    def resample(size: int, scale: jax.Array) -> jax.Array:
        """Linear interpolation along one axis as a matrix [n, size, size]."""
        middle = (size - 1) / 2
        shift = size * around(views.shift)
        at = (jnp.arange(size) - middle) * scale[:, None] + middle + shift[:, None]
        if views.border:
            at = jnp.clip(at, 0, size - 1)
        return jax.nn.relu(1 - jnp.abs(at[:, :, None] - jnp.arange(size)))

    def cut(size: int) -> jax.Array:
        """Whether a pixel is within a random interval, [n, size]."""
        start = uniform(-0.5 * views.cutout, 1, 1) * size
        length = uniform(0, views.cutout, 1) * size
        at = jnp.arange(size)
        return (at >= start) & (at < start + length)

    mirror = jnp.where((uniform(0, 1) < 0.5) & views.flip, -1, 1)
    rows = resample(height, factor(views.zoom))
    columns = resample(width, factor(views.zoom) * mirror)
    x = jnp.einsum("nij,njkc->nikc", rows, images)
    x = jnp.einsum("nkl,nilc->nikc", columns, x)
    x = x + uniform(0, views.blur, 1, 1, 1) * (_smooth(x) - x)
    x = 0.5 + (x - 0.5) * factor(views.contrast, 1, 1, 1)
    x = x + around(views.brightness, 1, 1, 1) + around(views.tint, 1, 1, colours)
    hole = cut(height)[:, :, None] & cut(width)[:, None, :]
    x = jnp.where(hole[..., None], 0.5, x)
    spread = uniform(0, views.noise, 1, 1, 1)
    x = x + spread * jax.random.normal(key_normal, x.shape)
    return jnp.clip(x, 0, 1)


def _smooth(x: jax.Array) -> jax.Array:
    """The 3x3 binomial blur."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = 0.25 * x[:, :-2] + 0.5 * x[:, 1:-1] + 0.25 * x[:, 2:]
    return 0.25 * x[:, :, :-2] + 0.5 * x[:, :, 1:-1] + 0.25 * x[:, :, 2:]


class Batch(NamedTuple):
    views: jax.Array  # [2 n, height, width, colours], the first views come first
    labels: jax.Array  # [n], UNLABELLED where none is known


def draw_batch(task: Task, images: jax.Array, known: jax.Array, key: Key) -> Batch:
    """A batch, of the same composition for every method."""
    key_batch, key_view = jax.random.split(key)
    # A few images with labels in every batch, so that none is without: they come first.
    order = jnp.argsort(known == UNLABELLED)
    number = jnp.where(
        jnp.arange(task.batch) < task.labelled,
        jnp.sum(known != UNLABELLED),
        len(known),
    )
    place = jax.random.uniform(key_batch, (task.batch,)) * number
    chosen = order[place.astype(jnp.int32)]
    twice = jnp.concatenate([images[chosen]] * 2)
    return Batch(view(key_view, twice, task.views), known[chosen])


# Model and losses.


def init_model(key: Key, task: Task, image: tuple[int, int, int], classes: int) -> Any:
    """Encoder, projector and classifier, all of dense layers.

    With ``patch``, the first layer is a convolution whose stride is its width: the
    squares of the image as rows of a matrix, which takes no slow convolution.
    """
    height, width, colours = image
    side = task.patch
    squares = (height // side) * (width // side) if side else 1
    pixels = height * width * colours // squares
    first, *rest = task.widths
    sizes = [(pixels, first)]
    sizes += zip([first * squares, *rest], rest, strict=False)
    representation = task.widths[-1]
    projector = [representation, *task.projector]
    keys = iter(jax.random.split(key, len(sizes) + len(projector)))

    def dense(m: int, n: int) -> dict[str, jax.Array]:
        w = jax.nn.initializers.he_normal()(next(keys), (m, n))
        return {"w": w, "b": jnp.zeros(n)}

    return {
        "encoder": [dense(*size) for size in sizes],
        "projector": [dense(*size) for size in itertools.pairwise(projector)],
        "classifier": {
            "w": jnp.zeros((representation, classes)),
            "b": jnp.zeros(classes),
        },
    }


def _mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def encode(model: PyTree, images: jax.Array, patch: int) -> jax.Array:
    """The representations [n, width] of images."""
    n, height, width, colours = images.shape
    layers = model["encoder"]
    if patch:
        across = width // patch
        x = images.reshape(n, height // patch, patch, across, patch, colours)
        x = x.swapaxes(2, 3).reshape(n, -1, patch * patch * colours)
        x = jax.nn.relu(x @ layers[0]["w"] + layers[0]["b"])
        layers = layers[1:]
    else:
        x = images
    return _mlp(layers, x.reshape(n, -1))


def vicreg(model: PyTree, z: jax.Array) -> dict[str, jax.Array]:
    """The three losses of VICReg, Eqs. 1 to 6, each without its weight.

    Args:
      model: Of which only the projector is used.
      z: Representations [2 n, width], those of the first views first.

    Returns:
      The losses by name.
    """
    first, second = jnp.split(_mlp(model["projector"], z), 2)
    n, width = first.shape

    def variance(x: jax.Array) -> jax.Array:
        deviation = jnp.sqrt(x.var(axis=0, ddof=1) + 1e-4)
        return jax.nn.relu(1 - deviation).mean()

    def covariance(x: jax.Array) -> jax.Array:
        x = x - x.mean(axis=0)
        matrix = x.T @ x / (n - 1)
        off_diagonal = jnp.sum(matrix**2) - jnp.sum(jnp.diagonal(matrix) ** 2)
        return off_diagonal / width

    return {
        "invariance": jnp.mean((first - second) ** 2),
        "variance": (variance(first) + variance(second)) / 2,
        "covariance": covariance(first) + covariance(second),
    }


def classification(model: PyTree, z: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of a linear classifier on the labelled representations.

    The classifier is that of the probe: its inputs are standardised, its weights decay.
    """
    labels = jnp.concatenate([labels] * (len(z) // len(labels)))
    known = labels != UNLABELLED
    z = (z - z.mean(axis=0)) / jnp.sqrt(z.var(axis=0) + 1e-4)
    layer = model["classifier"]
    each = optax.softmax_cross_entropy_with_integer_labels(
        z @ layer["w"] + layer["b"], jnp.where(known, labels, 0)
    )
    decay = 0.5 * DECAY * jnp.sum(layer["w"] ** 2)
    return jnp.sum(known * each) / jnp.maximum(1, known.sum()) + decay


# Training.


class Method(NamedTuple):
    """How the weights come about (hashable: a compiled program is kept for each).

    Attributes:
      weighting: ``weighting(w) -> LossWeighting``, given constant weights [3] to use.
      shared: Whether the weighting looks at gradients of the representation. All others
        get their one gradient without a detour.
      downstream: Whether the losses of training include the classification.
      weigh_heads: Whether the projector follows the weights as the encoder does.
    """

    weighting: Callable[[jax.Array], yoto.LossWeighting]
    shared: bool = False
    downstream: bool = False
    weigh_heads: bool = True


def _named(weights: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(LOSSES, weights, strict=True))


FIXED = Method(lambda weights: yoto.weightings.static(_named(weights)))


class _Run(NamedTuple):
    model: PyTree
    optimizer: optax.OptState
    weighting: Any


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Runs of one method with constant weights to use."""

    task: Task
    method: Method
    shape: tuple[int, ...]  # of an image
    classes: int
    steps: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.task.learning_rate, self.steps // 20 + 1, self.steps + 1
        )
        return optax.adam(schedule)

    def init(self, seed: jax.Array, weights: jax.Array) -> _Run:
        names = LOSSES + ((DOWNSTREAM,) if self.method.downstream else ())
        model = init_model(jax.random.key(seed), self.task, self.shape, self.classes)
        state = self.method.weighting(weights).init(dict.fromkeys(names, 0.0))
        return _Run(model, self.optimizer.init(model), state)

    def draw(self, data: tuple[jax.Array, jax.Array], key: Key) -> Batch:
        return draw_batch(self.task, *data, key)

    def step(
        self, run: _Run, weights: jax.Array, batch: Batch
    ) -> tuple[_Run, tuple[PyTree, PyTree]]:
        weighting = self.method.weighting(weights)

        def encoder(model: PyTree, batch: Batch) -> jax.Array:
            return encode(model, batch.views, self.task.patch)

        def heads(model: PyTree, z: jax.Array, batch: Batch) -> dict[str, jax.Array]:
            losses = vicreg(model, z)
            if self.method.downstream:
                losses[DOWNSTREAM] = classification(model, z, batch.labels)
            return losses

        def everything(model: PyTree, batch: Batch) -> dict[str, jax.Array]:
            return heads(model, encoder(model, batch), batch)

        if self.method.shared:
            value_and_grad = yoto.value_and_grad(
                heads,
                weighting,
                gradients=yoto.of_representation(
                    encoder, weigh_heads=self.method.weigh_heads
                ),
            )
        else:
            value_and_grad = yoto.value_and_grad(everything, weighting)
        losses, grads, state = value_and_grad(run.model, run.weighting, batch)
        updates, optimizer = self.optimizer.update(grads, run.optimizer)
        model = optax.apply_updates(run.model, updates)
        used = optax.tree.get(state, "loss_weights")
        return _Run(model, optimizer, state), (used, losses)

    def model(self, run: _Run) -> PyTree:
        return run.model


def train(
    task: Task, data: Data, method: Method, weights: Any, steps: int, description: str
) -> Outcome:
    """Train with all seeds and weights [seeds, runs, 3], see :func:`grids.train`."""
    grid, arrays, weights = _prepare(task, data, method, weights, steps)
    return grids.train(grid, arrays, weights, steps, description)


def _prepare(
    task: Task, data: Data, method: Method, weights: Any, steps: int
) -> tuple[_Grid, tuple[jax.Array, jax.Array], jax.Array]:
    """What is trained, on what, with which weights."""
    grid = _Grid(task, method, data.images.shape[1:], data.classes, steps)
    arrays = (jnp.asarray(data.images), jnp.asarray(data.known))
    return grid, arrays, jnp.asarray(weights, jnp.float32)


def step_seconds(
    task: Task,
    data: Data,
    methods: dict[str, Method],
    seeds: int,
    steps: int,
    rounds: int,
) -> Iterator[dict[str, float]]:
    """Seconds per step of all seeds together, of one method after the other, in turns.

    The programs are those that ``train`` has compiled, if it had as many seeds.
    """
    weights = np.ones((seeds, 1, len(LOSSES)))
    programs, carries = {}, {}
    for name, method in methods.items():
        made = _prepare(task, data, method, weights, steps)
        program, arguments = grids.prepare(*made, grids.stretch(steps))
        programs[name] = program, arguments
        carries[name] = program.init(*arguments[1:])
    for warmed_up in [False] + [True] * rounds:
        seconds = {}
        for name, (program, arguments) in programs.items():
            started = time.perf_counter()
            carries[name], _ = program(carries[name], *arguments)
            seconds[name] = (time.perf_counter() - started) / grids.stretch(steps)
        if warmed_up:
            yield seconds


# Evaluation.


@functools.partial(jax.jit, static_argnums=(2,))
def _encode_all(models: PyTree, images: jax.Array, patch: int) -> jax.Array:
    of_one = lambda model: encode(model, images, patch)
    return jax.lax.map(lambda seed: jax.lax.map(of_one, seed), models)


def classifier() -> Any:
    """The linear probe: multinomial logistic regression on standardised inputs."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))


def probe(task: Task, data: Data, models: PyTree) -> dict[str, np.ndarray]:
    """What the frozen representations are worth, [seeds, runs] by metric.

    ``validation`` is the accuracy of the linear probe under cross-validation on the few
    labelled images: all that a selection may look at. All others are on the test half.
    """
    train = np.asarray(_encode_all(models, data.images, task.patch), np.float64)
    test = np.asarray(_encode_all(models, data.test_images, task.patch), np.float64)
    runs = train.shape[:2]
    with threadpool_limits(1):  # The matrices are small: threads would only wait.
        measured = [probe_one(data, train[i], test[i]) for i in np.ndindex(runs)]
    return {
        metric: np.array([m[metric] for m in measured]).reshape(runs)
        for metric in measured[0]
    }


def probe_one(data: Data, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """The metrics of one run, from its representations [n, width]."""
    few, labels = train[data.labelled], data.labels[data.labelled]
    neighbours = KNeighborsClassifier(NEIGHBOURS, metric="cosine")
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=2, random_state=_SPLIT_SEED)
    return {
        "probe": classifier().fit(few, labels).score(test, data.test_labels),
        "knn": float(neighbours.fit(few, labels).score(test, data.test_labels)),
        "probe all": classifier().fit(train, data.labels).score(test, data.test_labels),
        "validation": cross_val_score(classifier(), few, labels, cv=folds).mean(),
    }
