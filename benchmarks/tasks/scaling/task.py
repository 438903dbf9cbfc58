"""Digits, trained data-parallel in every way that JAX has.

One model, one batch a step; methods differ in how they weigh the losses, ways in how
the batch is spread over devices. Whatever the way, the run is to be that on one device.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.tasks.digits import task as digits
from yoto_jax import weightings

PyTree = Any
Batch = tuple[jax.Array, jax.Array, jax.Array]  # images, one-hot labels, stylised views
AXIS = "data"
STEERING = "downstream"
RATE = 0.05

# The model: that of the digits, in operations that know what to do with a sharded axis,
# and smooth. With ReLU, a unit whose input is 0 but for rounding may be on here and off
# there, and two runs part by some 1e-5 at such a unit, whatever the weights do.


def encoder(params: PyTree, batch: Batch) -> PyTree:
    """Features of the images and of their views."""
    images, _, views = batch
    layers = params["model"]["encoder"]
    features = lambda x: jnp.tanh(_layers(layers, x.reshape(len(x), -1)))
    return {"clean": features(images), "view": features(views)}


def _layers(layers: list[PyTree], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def heads(params: PyTree, z: PyTree, batch: Batch) -> dict[str, jax.Array]:
    """Three losses, and a fourth that may steer them: the class of the view."""
    images, labels, _ = batch
    model = params["model"]
    classify = lambda features: _layers(model["classifier"], features)
    decoded = _layers(model["decoder"], z["clean"])
    entropy = lambda logits: -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), -1))
    return {
        "ce": entropy(classify(z["clean"])),
        "invariance": jnp.mean((z["clean"] - z["view"]) ** 2),
        "reconstruction": jnp.mean((decoded - images.reshape(decoded.shape)) ** 2),
        STEERING: entropy(classify(z["view"])),
    }


def three(losses: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: losses[name] for name in digits.LOSSES}


def loss_fn(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    return three(heads(params, encoder(params, batch), batch))


# Methods.


class Carry(NamedTuple):
    """A run under way."""

    params: PyTree
    optimizer: optax.OptState
    weighting: Any


class Method(NamedTuple):
    """``step(carry, batch, axis) -> (carry, losses, weights)``; axis None under jit."""

    init: Callable[[PyTree], Carry]
    step: Callable[[Carry, Batch, str | None], tuple[Carry, PyTree, PyTree]]


def plain(rate: float = RATE) -> Method:
    """Constant weights, without this library: what all others are compared with."""
    tx = optax.sgd(rate, momentum=0.9)

    def objective(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        losses = loss_fn(params, batch)
        return sum(losses.values(), jnp.zeros(())) / len(losses), losses

    def step(carry: Carry, batch: Batch, axis: str | None) -> Any:
        grads, losses = jax.grad(objective, has_aux=True)(
            local(carry.params, axis), batch
        )
        grads = mean(grads, axis)
        updates, state = tx.update(grads, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        weights = {name: jnp.ones(()) / len(losses) for name in losses}
        return Carry(params, state, ()), losses, weights

    return Method(lambda params: Carry(params, tx.init(params), ()), step)


def learned(rate: float = RATE) -> Method:
    """YOTO as in the README: the weights are parameters."""
    tx = yoto.sgdw(rate, hyperparameter_decay=0.3)

    def init(params: PyTree) -> Carry:
        template = dict.fromkeys(digits.LOSSES, 0.0)
        mu = yoto.init_loss_logits(template, digits.PRIMARY)
        return Carry(params | {"mu": mu}, tx.init(params | {"mu": mu}), ())

    def objective(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        losses = loss_fn(params, batch)
        return yoto.composite_loss(losses, params["mu"]), losses

    def step(carry: Carry, batch: Batch, axis: str | None) -> Any:
        grads, losses = jax.grad(objective, has_aux=True)(
            local(carry.params, axis), batch
        )
        grads = mean(grads, axis)
        updates, state = tx.update(grads, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, state, ()), losses, yoto.loss_weights(carry.params["mu"])

    return Method(init, step)


def local(params: PyTree, axis: str | None) -> PyTree:
    """Each device's own parameters, so that gradients are those of its own losses."""
    if axis is None:
        return params
    return jax.lax.pcast(params, axis, to="varying")


def mean(tree: PyTree, axis: str | None) -> PyTree:
    return tree if axis is None else jax.lax.pmean(tree, axis)


def weighted(
    weighting: yoto.LossWeighting, rate: float = RATE, gradients: Any = None
) -> Method:
    """Any weighting; one that looks at gradients gets those of the features.

    With ``gradients``, such as ``yoto.of_parameters()``, it gets those instead.
    """
    tx = optax.sgd(rate, momentum=0.9)
    steered = weighting.downstream is not None
    pick = (lambda losses: losses) if steered else three
    losses_of = lambda params, z, batch: pick(heads(params, z, batch))
    f: Any = losses_of
    if gradients is None and weighting.needs != ("losses",):
        gradients = yoto.of_representation(encoder)
    else:
        f = lambda params, batch: losses_of(params, encoder(params, batch), batch)

    def init(params: PyTree) -> Carry:
        names = (*digits.LOSSES, STEERING) if steered else digits.LOSSES
        state = weighting.init(dict.fromkeys(names, 0.0))
        return Carry(params, tx.init(params), state)

    def step(carry: Carry, batch: Batch, axis: str | None) -> Any:
        value_and_grad = yoto.value_and_grad(
            f, weighting, gradients=gradients, axis_name=axis
        )
        losses, grads, state = value_and_grad(carry.params, carry.weighting, batch)
        updates, optimizer = tx.update(grads, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        weights = optax.tree.get(state, "loss_weights")
        return Carry(params, optimizer, state), losses, weights

    return Method(init, step)


METHODS: dict[str, Callable[[], Method]] = {
    "plain": plain,
    "yoto": learned,
    "famo": lambda: weighted(weightings.famo()),
    "gradnorm": lambda: weighted(weightings.gradnorm()),
    "upgrad": lambda: weighted(weightings.upgrad()),
    "grap": lambda: weighted(weightings.grap(STEERING)),
}
COMPARED = tuple(name for name in METHODS if name != "plain")


# Ways.


class Way(NamedTuple):
    """How a step runs on some devices."""

    step: Callable[[Carry, Batch], tuple[Carry, PyTree]]  # and the weights
    place: Callable[[Carry], Carry]
    spread: Callable[[Batch], Batch]  # [B, ...] over the devices
    mesh: Any  # to be set around all of it
    stacked: bool = False  # whether replicas are an axis of their own, as with pmap


def one_device(method: Method) -> Way:
    same = lambda x: x
    return Way(jax.jit(silent(method, None)), same, same, contextlib.nullcontext())


def silent(method: Method, axis: str | None) -> Callable[[Carry, Batch], Any]:
    """A step that does not report its losses: it need not average them."""

    def step(carry: Carry, batch: Batch) -> tuple[Carry, PyTree]:
        carry, _, weights = method.step(carry, batch, axis)
        return carry, weights

    return step


def on_pmap(method: Method, devices: Sequence[Any]) -> Way:
    count = len(devices)
    cut = lambda x: x.reshape(count, -1, *x.shape[1:])
    return Way(
        jax.pmap(silent(method, AXIS), axis_name=AXIS, devices=devices),
        lambda carry: jax.tree.map(lambda x: jnp.stack([x] * count), carry),
        lambda batch: jax.tree.map(cut, batch),
        contextlib.nullcontext(),
        stacked=True,
    )


def on_shard_map(method: Method, devices: Sequence[Any], check: bool) -> Way:
    mesh = mesh_of(devices, "Auto")
    everywhere, shared = jax.P(), jax.P(AXIS)
    mapped = jax.shard_map(
        silent(method, AXIS),
        mesh=mesh,
        in_specs=(everywhere, shared),
        out_specs=everywhere,
        check_vma=check,
    )
    return Way(jax.jit(mapped), *on_mesh(mesh), contextlib.nullcontext())


def on_jit(method: Method, devices: Sequence[Any], axis_type: str) -> Way:
    mesh = mesh_of(devices, axis_type)
    return Way(jax.jit(silent(method, None)), *on_mesh(mesh), jax.set_mesh(mesh))


def mesh_of(devices: Sequence[Any], axis_type: str) -> jax.sharding.Mesh:
    kind = getattr(jax.sharding.AxisType, axis_type)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(kind,), devices=devices)


def on_mesh(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """How a carry and how a batch come to lie on the devices."""
    place = lambda spec: (
        lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    )
    return place(jax.P()), place(jax.P(AXIS))


WAYS: dict[str, Callable[[Method, Sequence[Any]], Way]] = {
    "pmap": on_pmap,
    "shard_map": functools.partial(on_shard_map, check=True),
    "shard_map, unchecked": functools.partial(on_shard_map, check=False),
    "jit, Auto": functools.partial(on_jit, axis_type="Auto"),
    "jit, Explicit": functools.partial(on_jit, axis_type="Explicit"),
}


# Runs.


def batches(steps: int, size: int) -> list[Batch]:
    """The batches of a run, drawn once, so that all runs see the same."""
    data = digits.load().train
    drawn = []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        images, labels, views = digits.draw(data, key)
        onehot = jax.nn.one_hot(labels, 10)
        drawn.append(jax.tree.map(lambda x: x[:size], (images, onehot, views)))
    return drawn


class Outcome(NamedTuple):
    """What a run came to."""

    params: PyTree  # NumPy arrays
    weights: np.ndarray  # [steps, K]
    identical: bool  # whether every device holds the same weights, bit for bit


def run(way: Way, method: Method, drawn: Sequence[Batch]) -> Outcome:
    params = {"model": digits.init_model(jax.random.key(0))}
    history, identical = [], True
    with way.mesh:
        carry = way.place(method.init(params))
        for batch in drawn:
            carry, weights = way.step(carry, way.spread(batch))
            parts = [copies(x, way.stacked) for x in jax.tree.leaves(weights)]
            identical &= all((part == part[0]).all() for part in parts)
            history.append([part[0] for part in parts])
    final = jax.tree.map(lambda x: copies(x, way.stacked)[0], carry.params)
    if carry.params.get("mu") is not None:
        every = copies(carry.params["mu"].learned, way.stacked)
        identical &= bool((every == every[0]).all())
    return Outcome(final, np.array(history), identical)


def copies(x: jax.Array, stacked: bool = False) -> np.ndarray:
    """What every device holds of a replicated array, on a leading axis."""
    if stacked:
        return np.asarray(x)
    return np.stack([np.asarray(part.data) for part in x.addressable_shards])


def difference(outcome: Outcome, reference: Outcome) -> float:
    """The largest difference of a parameter or a weight, relative to those above 1."""
    pairs = zip(
        jax.tree.leaves((outcome.params, outcome.weights)),
        jax.tree.leaves((reference.params, reference.weights)),
        strict=True,
    )
    return max(distance(a, b) for a, b in pairs)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b)), initial=0.0))
