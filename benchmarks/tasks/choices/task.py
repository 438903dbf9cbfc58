"""MNIST-1D by small networks that are put together by choices.

An architecture is one option of each choice: which view of the signal the network sees,
which activation, which normalisation, with or without skip connections. The network is
written once, on choices; with one-hot weights it is one architecture, and all of them
are lanes of one program.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.data import mnist1d

PyTree = Any
Key = jax.Array

CHOICES = {
    "view": ("signal", "spectrum", "differences"),
    "activation": ("relu", "tanh", "sine"),
    "normalisation": ("none", "layer"),
    "skip": ("without", "with"),
}
ARCHITECTURES = tuple(itertools.product(*CHOICES.values()))
WEIGHT_DECAY = 1e-4
DRAWS = 8  # of architectures, over which what is random is averaged in evaluations

_POOL_SEED = 2026


class Size(NamedTuple):
    """What a preset decides."""

    train: int
    validation: int
    test: int
    steps: int
    batch: int
    width: int
    blocks: int
    learning_rate: float
    points: int  # of curves


class Part(NamedTuple):
    """Signals, seen in all ways, and their classes."""

    views: dict[str, jax.Array]  # [n, features]
    label: jax.Array  # [n]


class Data(NamedTuple):
    train: Part
    validation: Part
    test: Part


def data_of(size: Size) -> Data:
    """The same signals for all seeds; every view has mean 0 and variance 1."""
    total = size.train + size.validation + size.test
    pool = mnist1d.generate(total, _POOL_SEED)
    views = {
        "signal": pool.x,
        "spectrum": np.abs(np.fft.rfft(pool.x)),
        "differences": np.diff(pool.x),
    }
    seen = np.arange(size.train)  # What is subtracted comes from these alone.
    views = {name: (x - x[seen].mean(0)) / x[seen].std() for name, x in views.items()}
    ends = np.cumsum([0, size.train, size.validation, size.test])
    parts = [
        Part(
            {name: jnp.asarray(x[a:b], jnp.float32) for name, x in views.items()},
            jnp.asarray(pool.label[a:b]),
        )
        for a, b in itertools.pairwise(ends)
    ]
    return Data(*parts)


# The network.


def init_model(key: Key, size: Size) -> PyTree:
    """Parameters of all options; only the first layers differ from view to view."""
    wide = size.width
    features = {"signal": 40, "spectrum": 21, "differences": 39}
    keys = iter(jax.random.split(key, len(features) + size.blocks + 1))
    dense = lambda m, n: {
        "w": jax.random.normal(next(keys), (m, n)) / m**0.5,
        "b": jnp.zeros(n),
    }
    norm = {"scale": jnp.ones(wide), "shift": jnp.zeros(wide)}
    return {
        "views": {name: dense(n, wide) for name, n in features.items()},
        "blocks": [dense(wide, wide) for _ in range(size.blocks)],
        "norms": [norm for _ in range(size.blocks + 1)],
        "head": dense(wide, mnist1d.CLASSES),
    }


ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sine": jnp.sin}


def predict(model: PyTree, choices: PyTree, views: dict[str, jax.Array]) -> jax.Array:
    """Logits of the classes [n, 10], by choices that are decided, softly or not."""
    dense = lambda layer, x: x @ layer["w"] + layer["b"]

    def bent(norm: PyTree, h: jax.Array) -> jax.Array:
        norms = {"none": lambda h: h, "layer": functools.partial(_layer_norm, norm)}
        h = yoto.apply_choice(choices["normalisation"], norms, h)
        return yoto.apply_choice(choices["activation"], ACTIVATIONS, h)

    first = {
        name: functools.partial(dense, model["views"][name], views[name])
        for name in CHOICES["view"]
    }
    h = bent(model["norms"][0], yoto.apply_choice(choices["view"], first))
    for layer, norm in zip(model["blocks"], model["norms"][1:], strict=True):
        new = bent(norm, dense(layer, h))
        ways = {"without": lambda _, new: new, "with": lambda h, new: h + new}
        h = yoto.apply_choice(choices["skip"], ways, h, new)
    return dense(model["head"], h)


def _layer_norm(norm: PyTree, h: jax.Array) -> jax.Array:
    centred = h - h.mean(-1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return norm["scale"] * centred / spread + norm["shift"]


def cross_entropy(model: PyTree, choices: PyTree, part: Part) -> jax.Array:
    logits = predict(model, choices, part.views)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, part.label)
    return losses.mean()


def accuracy(model: PyTree, choices: PyTree, part: Part) -> jax.Array:
    """In per cent."""
    logits = predict(model, choices, part.views)
    return 100 * jnp.mean(jnp.argmax(logits, -1) == part.label)


def init_choices(fixed: dict[str, str] | None = None) -> dict[str, Any]:
    """No preference, but for options that are given."""
    fixed = fixed or {}
    return {
        name: yoto.HardChoice(options.index(fixed[name]), options)
        if name in fixed
        else yoto.init_choice_logits(options)
        for name, options in CHOICES.items()
    }


def one_hot(architectures: Any = ARCHITECTURES) -> dict[str, yoto.ChoiceWeights]:
    """Architectures as weights of choices, stacked on a leading axis."""
    return {
        name: yoto.ChoiceWeights(
            jnp.array(
                [[float(a[k] == o) for o in options] for a in architectures],
                jnp.float32,
            ),
            options,
        )
        for k, (name, options) in enumerate(CHOICES.items())
    }


def decided(choices: dict[str, Any]) -> dict[str, Any]:
    """The mixture at temperature 1."""
    return yoto.choose(None, choices)


def balanced() -> list[tuple[str, ...]]:
    """Few architectures, in which each option of a choice is as frequent."""
    places = [(k % 3, k % 3, k % 2, k // 3) for k in range(6)]
    return [
        tuple(options[k] for k, options in zip(row, CHOICES.values(), strict=True))
        for row in places
    ]


def hard(architecture: tuple[str, ...]) -> dict[str, yoto.HardChoice]:
    """An architecture whose other options are left out of the program."""
    return {
        name: yoto.HardChoice(options.index(option), options)
        for (name, options), option in zip(CHOICES.items(), architecture, strict=True)
    }


def place_of(indices: dict[str, jax.Array]) -> jax.Array:
    """Place among the architectures, by the index of the option of each choice."""
    place = jnp.int32(0)
    for name, options in CHOICES.items():
        place = place * len(options) + indices[name]
    return place


# Training.


class Trained(NamedTuple):
    """What is measured of one run."""

    architecture: jax.Array  # place among the architectures
    before: dict[str, jax.Array]  # accuracy by part, as trained, in per cent
    after: dict[str, jax.Array]  # as one architecture, with the same parameters
    curve: jax.Array  # [points], accuracy on validation
    probabilities: dict[str, jax.Array]  # [points, options] by choice


def train_one(
    size: Size, data: Data, seed: jax.Array, choices: dict[str, yoto.ChoiceWeights]
) -> Trained:
    """Train one architecture: choices that are one-hot."""
    optimizer = optax.adamw(_rate(size), weight_decay=WEIGHT_DECAY)
    key_init, key_train = jax.random.split(jax.random.key(seed))
    model = init_model(key_init, size)

    def step(carry: PyTree, number: jax.Array) -> tuple[PyTree, None]:
        model, state = carry
        batch = _batch(data.train, jax.random.fold_in(key_train, number), size)
        grads = jax.grad(cross_entropy)(model, choices, batch)
        updates, state = optimizer.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), None

    def look(carry: PyTree, number: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        del number
        weights = {name: choice.weights for name, choice in choices.items()}
        return accuracy(carry[0], choices, data.validation), weights

    (model, _), seen = _scan(size, step, look, (model, optimizer.init(model)))
    found = _by_part(lambda part: accuracy(model, choices, part), data)
    indices = {name: jnp.argmax(choice.weights) for name, choice in choices.items()}
    return Trained(place_of(indices), found, found, *seen)


def search(
    size: Size,
    data: Data,
    source: str,
    way: Any,
    seed: jax.Array,
    temperature: jax.Array,
    decay: jax.Array,
    fixed: dict[str, str] | None = None,
) -> Trained:
    """Train a network and its choices by one optimizer.

    Args:
      size: Of network and training.
      data: All of it.
      source: The loss that the logits descend, "training" or "held-out".
      way: Method of ``yoto.choose``.
      seed: Of everything.
      temperature: At the end, from 1 at the start, geometrically.
      decay: Strength of the decay of the choices at the start, minus that at the end.
      fixed: Options that are given, by choice.
    """
    optimizer = yoto.adamw(
        _rate(size),
        weight_decay=WEIGHT_DECAY,
        hyperparameter_decay=0.0,
        choice_decay=lambda count: decay * (1 - 2 * count / size.steps),
    )
    key_init, key_train = jax.random.split(jax.random.key(seed))
    params = {"model": init_model(key_init, size), "choices": init_choices(fixed)}
    tau = lambda number: temperature ** (number / size.steps)

    def loss(params: PyTree, part: Part, key: Key, number: jax.Array) -> jax.Array:
        choices = yoto.choose(key, params["choices"], tau(number), method=way)
        return cross_entropy(params["model"], choices, part)

    def step(carry: PyTree, number: jax.Array) -> tuple[PyTree, None]:
        params, state = carry
        key = jax.random.fold_in(key_train, number)
        keys = jax.random.split(jax.random.fold_in(key, 1), 3)
        batch = _batch(data.train, key, size)  # That of the architectures alone.
        grads = jax.grad(loss)(params, batch, keys[0], number)
        if source == "held-out":
            batch = _batch(data.validation, keys[1], size)
            held_out = jax.grad(loss)(params, batch, keys[2], number)
            grads = yoto.steer_choices(grads, held_out)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def as_trained(params: PyTree, part: Part, number: Any, draws: int) -> jax.Array:
        """A mixture, or the mean over architectures that are drawn."""

        def one(key: Key) -> jax.Array:
            choices = yoto.choose(key, params["choices"], tau(number), method=way)
            return accuracy(params["model"], choices, part)

        keys = jax.random.split(jax.random.key(0), draws)
        return one(keys[0]) if way == "softmax" else jnp.mean(jax.lax.map(one, keys))

    def look(carry: PyTree, number: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, _ = carry
        learned = {
            name: choice
            for name, choice in params["choices"].items()
            if isinstance(choice, yoto.ChoiceLogits)
        }
        p = {name: yoto.choose(None, a).weights for name, a in learned.items()}
        return as_trained(params, data.validation, number, 1), p

    start = (params, optimizer.init(params))
    (params, _), seen = _scan(size, step, look, start)
    hard = yoto.harden(params["choices"])
    place = place_of({name: choice.index for name, choice in hard.items()})
    weights = jax.tree.map(lambda x: x[place], one_hot())
    return Trained(
        place,
        _by_part(lambda part: as_trained(params, part, size.steps, DRAWS), data),
        _by_part(lambda part: accuracy(params["model"], weights, part), data),
        *seen,
    )


def _rate(size: Size) -> optax.Schedule:
    return optax.cosine_decay_schedule(size.learning_rate, size.steps)


def _batch(part: Part, key: Key, size: Size) -> Part:
    rows = jax.random.randint(key, (size.batch,), 0, len(part.label))
    return jax.tree.map(lambda x: x[rows], part)


def _by_part(measure: Callable[[Part], jax.Array], data: Data) -> dict[str, jax.Array]:
    return {name: measure(part) for name, part in data._asdict().items()}


def _scan(
    size: Size, step: Callable[..., Any], look: Callable[..., Any], start: PyTree
) -> tuple[PyTree, Any]:
    """All steps, with a look after each of the points."""
    numbers = jnp.arange(size.steps).reshape(size.points, -1)

    def stretch(carry: PyTree, numbers: jax.Array) -> tuple[PyTree, Any]:
        carry, _ = jax.lax.scan(step, carry, numbers)
        return carry, look(carry, numbers[-1] + 1)

    return jax.lax.scan(stretch, start, numbers)
