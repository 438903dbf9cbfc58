"""Digits under shift: data, corruptions, model, losses and training.

Fixed and learned loss weights differ in one thing only: whether the updates of the loss
logits are applied. All else (losses, seeds, optimizer, compiled loop) is one code path.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import yoto_jax as yoto
from benchmarks.harness import grids, lanes
from benchmarks.harness.grids import Outcome
from benchmarks.harness.results import Record, describe, record, values
from benchmarks.harness.terminal import say
from benchmarks.harness.training import Measured as OfLanes
from benchmarks.harness.training import Task
from yoto_jax import racing

PyTree = Any
Key = jax.Array

PRIMARY = "ce"
AUXILIARY = ("invariance", "reconstruction")
LOSSES = (PRIMARY, *AUXILIARY)
CORRUPTIONS = ("contrast", "brightness", "noise", "blur", "inversion")
UNSEEN = (*CORRUPTIONS, "all")
UNSEEN_STRENGTH = 1.3
BATCH = 128
GRID = tuple(itertools.product((0.1, 1.0, 10.0), repeat=len(AUXILIARY)))
"""Weights relative to the primary loss that a grid search tries."""

DRAWS = 4  # corrupted copies of every evaluation image, to average out the draw

_EVALUATION_KEY = 2025  # one corruption of the evaluation images for every run
_SPLIT_SEED = 0


class Split(NamedTuple):
    images: jax.Array  # float32 [n, 8, 8], from 0 to 1
    labels: jax.Array  # int32 [n]


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split


def split(
    labels: np.ndarray, seed: int = _SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stratified indices: half for the test, of the rest 20 % for validation."""
    training, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(
        training, test_size=0.2, stratify=labels[training], random_state=seed
    )
    return train, validation, test


def pool() -> Split:
    """The UCI digits that scikit-learn carries with it: no download."""
    digits = load_digits()
    return Split(
        jnp.asarray(digits.images / 16.0, jnp.float32),
        jnp.asarray(digits.target, jnp.int32),
    )


def load() -> Data:
    """All digits, split."""
    images, labels = pool()
    return Data(*(Split(images[i], labels[i]) for i in split(np.asarray(labels))))


# Corruptions.


def corrupt(key: Key, images: jax.Array, strength: jax.Array) -> jax.Array:
    """Corrupt images, each by its own amount of each corruption.

    Args:
      key: For the direction of contrast and brightness, and for the noise.
      images: [n, 8, 8].
      strength: [n, 5] in the order of ``CORRUPTIONS``: 0 is the identity, 1 the
        strongest in training.

    Returns:
      Images from 0 to 1, [n, 8, 8].
    """
    key_sign, key_noise = jax.random.split(key)
    contrast, brightness, noise, blur, inversion = strength.T[..., None, None]
    up_or_down = jax.random.rademacher(key_sign, (2, len(images), 1, 1), jnp.float32)
    x = images + 0.75 * blur * (_smooth(images) - images)
    x = 0.5 + (x - 0.5) * 3.0 ** (up_or_down[0] * contrast)
    x = x + 0.4 * up_or_down[1] * brightness
    x = x + 0.75 * inversion * (1.0 - 2.0 * x)
    x = x + 0.3 * noise * jax.random.normal(key_noise, x.shape)
    return jnp.clip(x, 0.0, 1.0)


def _smooth(images: jax.Array) -> jax.Array:
    """The 3x3 binomial blur."""
    x = jnp.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    x = 0.25 * x[:, :-2] + 0.5 * x[:, 1:-1] + 0.25 * x[:, 2:]
    return 0.25 * x[:, :, :-2] + 0.5 * x[:, :, 1:-1] + 0.25 * x[:, :, 2:]


def stylise(key: Key, images: jax.Array) -> jax.Array:
    """A random view as seen in training: every strength uniform from 0 to 1."""
    key_strength, key_corrupt = jax.random.split(key)
    strength = jax.random.uniform(key_strength, (len(images), len(CORRUPTIONS)))
    return corrupt(key_corrupt, images, strength)


def unseen_domains(images: jax.Array) -> dict[str, jax.Array]:
    """Every corruption alone and all together, stronger than ever in training."""
    key = jax.random.key(_EVALUATION_KEY)
    which = jnp.concatenate([jnp.eye(len(CORRUPTIONS)), jnp.ones((1, 5))])
    return {
        domain: corrupt(
            jax.random.fold_in(key, i),
            images,
            jnp.tile(UNSEEN_STRENGTH * which[i], (len(images), 1)),
        )
        for i, domain in enumerate(UNSEEN)
    }


def validation_domains(split: Split) -> dict[str, Split]:
    """Clean, and stylised as in training: all that a selection may look at."""
    many = repeat(split)
    stylised = stylise(jax.random.key(_EVALUATION_KEY), many.images)
    return {"clean": split, "stylised": Split(stylised, many.labels)}


def test_domains(split: Split) -> dict[str, Split]:
    many = repeat(split)
    unseen = unseen_domains(many.images)
    return {"clean": split} | {
        domain: Split(images, many.labels) for domain, images in unseen.items()
    }


def repeat(split: Split) -> Split:
    return Split(*(jnp.repeat(x, DRAWS, axis=0) for x in split))


# Model and losses.


def init_model(key: Key) -> PyTree:
    """Encoder 64-128-64, classifier 64-10, decoder 64-128-64."""
    sizes = {"encoder": (64, 128, 64), "classifier": (64, 10), "decoder": (64, 128, 64)}
    keys = jax.random.split(key, len(sizes))
    return {
        name: [
            {
                "w": jax.nn.initializers.he_normal()(layer_key, (m, n)),
                "b": jnp.zeros(n),
            }
            for layer_key, m, n in zip(
                jax.random.split(k, len(widths) - 1), widths, widths[1:], strict=False
            )
        ]
        for (name, widths), k in zip(sizes.items(), keys, strict=True)
    }


def _mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def features(model: PyTree, images: jax.Array) -> jax.Array:
    return jax.nn.relu(_mlp(model["encoder"], images.reshape(len(images), -1)))


def classify(model: PyTree, images: jax.Array) -> jax.Array:
    return _mlp(model["classifier"], features(model, images))


def losses(
    model: PyTree, images: jax.Array, labels: jax.Array, view: jax.Array
) -> dict[str, jax.Array]:
    """The three losses of a batch and a stylised view of it."""
    both = encode(model, (images, labels, view))
    return losses_of_features(model, both, images, labels)


def encode(model: PyTree, batch: tuple[jax.Array, ...]) -> jax.Array:
    """Features of the images of a batch, and then of their views."""
    images, _, view = batch
    return features(model, jnp.concatenate([images, view]))


def losses_of_features(
    model: PyTree, both: jax.Array, images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """The same of the features of images and views."""
    clean, stylised = jnp.split(both, 2)
    logits = _mlp(model["classifier"], clean)
    decoded = _mlp(model["decoder"], clean)
    return {
        "ce": optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        "invariance": jnp.mean((clean - stylised) ** 2),
        "reconstruction": jnp.mean((decoded - images.reshape(decoded.shape)) ** 2),
    }


# Training.


class Configurations(NamedTuple):
    """What differs between the runs of one sweep, on leading axes [seeds, runs]."""

    epsilon: jax.Array  # [seeds, runs, 2], initial weights relative to the primary loss
    rho: jax.Array  # [seeds, runs]
    learn: jax.Array  # [seeds, runs], 1 to learn the weights, 0 to keep them


def learned(pairs: Sequence[tuple[float, float]], seeds: int) -> Configurations:
    """Runs with these pairs of epsilon and rho, the same for every seed."""
    epsilon, rho = jnp.tile(jnp.asarray(pairs, jnp.float32).T[:, None], (1, seeds, 1))
    epsilon = jnp.repeat(epsilon[..., None], len(AUXILIARY), axis=-1)
    return Configurations(epsilon, rho, jnp.ones_like(rho))


def fixed(ratios: jax.Array, seeds: int) -> Configurations:
    """Runs with fixed weights in these ratios [runs, 2] or [seeds, runs, 2]."""
    epsilon = jnp.broadcast_to(ratios, (seeds, *ratios.shape[-2:]))
    zeros = jnp.zeros(epsilon.shape[:-1])
    return Configurations(epsilon, zeros, zeros)


def describe_ratios(epsilon: Iterable[float]) -> str:
    """Fixed weights relative to the primary loss, as text."""
    return describe(**dict(zip(AUXILIARY, epsilon, strict=True)))


Transformation = Callable[[jax.Array], optax.GradientTransformation]
"""Optimizer of model and loss logits, given rho (which may be traced).

Sweeps of one size and transformation (the same object) share a compiled program.
"""


class _Run(NamedTuple):
    params: PyTree
    state: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Weights that are learned or stay, by a transformation."""

    transformation: Transformation

    def init(self, seed: jax.Array, configuration: Configurations) -> _Run:
        epsilon = dict(zip(AUXILIARY, configuration.epsilon, strict=True))
        mu = yoto.init_loss_logits(dict.fromkeys(LOSSES, 0.0), PRIMARY, epsilon=epsilon)
        params = {"model": init_model(jax.random.key(seed)), "mu": mu}
        return _Run(params, self.transformation(configuration.rho).init(params))

    def draw(self, data: Split, key: Key) -> tuple[jax.Array, ...]:
        return draw(data, key)

    def step(
        self, run: _Run, configuration: Configurations, batch: tuple[jax.Array, ...]
    ) -> tuple[_Run, tuple[PyTree, PyTree]]:
        def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
            terms = losses(params["model"], *batch)
            return yoto.composite_loss(terms, params["mu"]), terms

        grads, terms = jax.grad(objective, has_aux=True)(run.params)
        transformation = self.transformation(configuration.rho)
        updates, state = transformation.update(grads, run.state, run.params)
        updates["mu"] = optax.tree.scale(configuration.learn, updates["mu"])
        weights = yoto.loss_weights(run.params["mu"])
        params = optax.apply_updates(run.params, updates)
        return _Run(params, state), (weights, terms)

    def model(self, run: _Run) -> PyTree:
        return run.params["model"]


def train(
    data: Split,
    transformation: Transformation,
    configurations: Configurations,
    steps: int,
    description: str,
    devices: lanes.Devices | None = None,
) -> Outcome:
    """Train all configurations with all seeds, see :func:`grids.train`."""
    grid = _Grid(transformation)
    return grids.train(grid, data, configurations, steps, description, devices)


def draw(
    split: Split, key: Key, rows: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """A batch: images, labels and stylised views of them; of these rows alone."""
    key_batch, key_view = jax.random.split(key)
    count = len(split.labels if rows is None else rows)
    chosen = jax.random.randint(key_batch, (BATCH,), 0, count)
    chosen = chosen if rows is None else rows[chosen]
    images = split.images[chosen]
    return images, split.labels[chosen], stylise(key_view, images)


@jax.jit
def _accuracy(models: PyTree, split: Split) -> jax.Array:
    def of_one(model: PyTree) -> jax.Array:
        predicted = jnp.argmax(classify(model, split.images), axis=-1)
        return jnp.mean(predicted == split.labels)

    # One model after the other: side by side, their activations would fill the memory.
    return jax.lax.map(lambda seed: jax.lax.map(of_one, seed), models)


def accuracy(models: PyTree, domains: dict[str, Split]) -> dict[str, np.ndarray]:
    """Accuracy of every run in every domain, [seeds, runs] each."""
    return {name: np.asarray(_accuracy(models, d)) for name, d in domains.items()}


def race(
    data: Data,
    transformation: Transformation,
    configurations: Configurations,
    plan: racing.Plan,
    description: str,
) -> tuple[Outcome, Configurations]:
    """Train all configurations side by side, and the best of them to the end.

    Each seed cuts its own lanes, by the accuracy on stylised validation images.

    Returns:
      The runs that win, one for each seed, with the history of the last rung; and their
      configurations.
    """
    started = time.perf_counter()
    judged = {"stylised": validation_domains(data.validation)["stylised"]}
    grid, one = _Grid(transformation), jax.local_devices()[:1]
    carry, history, seconds = None, None, 0.0
    for rung in plan.rungs:
        program, arguments = grids.prepare(
            grid, data.train, configurations, rung.steps, one
        )
        begun = time.perf_counter()
        carry = program.init(*arguments[1:]) if carry is None else carry
        carry, history = program(carry, *arguments)
        scores = jnp.asarray(accuracy(grid.model(carry.run), judged)["stylised"])
        carry, configurations = _cut((carry, configurations), scores, rung.keep)
        seconds += time.perf_counter() - begun
    weights, curves = jax.tree.map(lambda x: np.moveaxis(x, 0, -1), history)
    say(f"{description}: {plan.runs:.1f} runs for each seed in {seconds:.1f} s")
    outcome = Outcome(
        jax.device_get(grid.model(carry.run)),
        weights,
        curves,
        run_seconds=seconds,
        compile_seconds=time.perf_counter() - started - seconds,
    )
    return outcome, configurations


@functools.partial(jax.jit, static_argnums=2)
def _cut(lanes: PyTree, scores: jax.Array, number: int) -> PyTree:
    """Of the lanes [seeds, runs] of each seed the best ones by their scores."""
    keep = lambda lanes, scores: racing.keep(lanes, scores, number).lanes
    return jax.vmap(keep)(lanes, scores)


# The same as a task that one conditional model can be trained on.


def held_out_loss(
    model: PyTree, z: jax.Array, batch: tuple[jax.Array, ...]
) -> jax.Array:
    """The cross-entropy of stylised views."""
    _, labels, view = batch
    logits = classify(model, view)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def as_task(data: Data, steps: int, seeds: int, learning_rate: float) -> Task:
    """Digits for rules of training: one lane for each seed."""
    validation = validation_domains(data.validation)
    tests = test_domains(data.test)

    def of_lanes(models: PyTree, domains: dict[str, Split]) -> dict[str, np.ndarray]:
        one_run = jax.tree.map(lambda x: x[:, None], models)
        return {name: x[:, 0] for name, x in accuracy(one_run, domains).items()}

    def test(models: PyTree) -> OfLanes:
        measured: OfLanes = {
            ("accuracy", d): x for d, x in of_lanes(models, tests).items()
        }
        for domain, x in of_lanes(models, validation).items():
            measured["accuracy", f"validation {domain}"] = x
        return measured

    def validate(models: PyTree) -> np.ndarray:
        domain = {"stylised": validation["stylised"]}
        return of_lanes(models, domain)["stylised"]

    return Task(
        name="digits",
        settings={"steps": steps, "learning_rate": learning_rate, "batch": BATCH},
        primary=PRIMARY,
        auxiliary=AUXILIARY,
        data=(data.train, data.validation),
        init=init_model,
        draw=lambda splits, key: draw(splits[0], key),
        draw_held_out=lambda splits, key: draw(splits[1], key),
        encode=encode,
        losses=lambda model, z, batch: losses_of_features(model, z, *batch[:2]),
        downstream=held_out_loss,
        validate=validate,
        test=test,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=1e-4,  # the default of AdamW, as in the other runs
        lanes=seeds,
    )


# Records.


def regulariser_records(entropy: Literal["all", "auxiliary"]) -> list[Record]:
    """The weights that the regulariser alone would choose."""
    mu = yoto.init_loss_logits(dict.fromkeys(LOSSES, 0.0), PRIMARY)
    slope = jax.grad(lambda mu: yoto.regularizer(mu, entropy=entropy))
    mu = jax.lax.fori_loop(
        0, 2000, lambda _, mu: jax.tree.map(lambda m, g: m - g, mu, slope(mu)), mu
    )
    return [
        record(
            "regulariser", f"weight:{name}", w, config=f"entropy={entropy}", compute=0
        )
        for name, w in yoto.loss_weights(mu).items()
    ]


Measured = dict[tuple[str, str | None], np.ndarray]
"""Values [seeds, runs] by metric and domain."""


def run_records(
    method: str, config: str, seed: int, i: int, measured: Measured, compute: float = 1
) -> list[Record]:
    """All that was measured of one run."""
    return [
        record(
            method,
            metric,
            of_runs[seed, i],
            config=config,
            seed=seed,
            domain=domain,
            unseen=domain in UNSEEN,
            compute=compute,
        )
        for (metric, domain), of_runs in measured.items()
    ]


def mean_of(records: list[Record], what: str) -> dict[str, float]:
    """The ``"weight"`` or the ``"loss"`` of each loss after training, over seeds."""
    return {
        name: float(values(records, metric=f"{what}:{name}").mean()) for name in LOSSES
    }


def distance(weights: dict[str, float], others: dict[str, float]) -> tuple[str, float]:
    """The loss whose weight differs by the largest factor, and that factor."""
    factors = {
        name: max(weights[name] / others[name], others[name] / weights[name])
        for name in weights
    }
    furthest = max(factors, key=lambda name: factors[name])
    return furthest, factors[furthest]
