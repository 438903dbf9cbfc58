"""The layers, in the training loops that Flax users write."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx, serialization
from flax.training import train_state

from yoto_jax import linen as yoto_linen
from yoto_jax import nnx as yoto_nnx

X = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
Y = np.sin(3 * X)
STEPS = 60


def losses_of(prediction):
    return {
        "fit": jnp.mean((prediction - Y) ** 2),
        "size": jnp.mean(jnp.abs(prediction)),
    }


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(16, name="hidden")(x))
        prediction = nn.Dense(1, name="out")(hidden)
        losses = losses_of(prediction)
        return yoto_linen.CompositeLoss("fit", name="composite")(losses), losses


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)
        self.composite = yoto_nnx.CompositeLoss({"fit": 0.0, "size": 0.0}, "fit")

    def __call__(self, x):
        losses = losses_of(self.out(jnp.tanh(self.hidden(x))))
        return self.composite(losses), losses


def plain_run(w):
    """The same training with the pure functions, from the weights of the layers."""
    params = {"w": w, "mu": yoto.init_loss_logits({"fit": 0.0, "size": 0.0}, "fit")}
    tx = yoto.adamw(0.02, weight_decay=0.01)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def objective(params):
            (a, b), (c, d) = params["w"]
            losses = losses_of(jnp.tanh(X @ a + b[None]) @ c + d[None])
            return yoto.composite_loss(losses, params["mu"])

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params


def test_linen_train_state():
    model = LinenModel()
    variables = model.init(jax.random.key(0), X)
    mu = variables["params"]["composite"]["loss_logits"]
    assert isinstance(mu, yoto.LossLogits)
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=yoto.adamw(0.02, weight_decay=0.01),
    )

    @jax.jit
    def step(state):
        def objective(params):
            (loss, losses), logs = state.apply_fn(
                {"params": params}, X, mutable="intermediates"
            )
            (weights,) = logs["intermediates"]["composite"]["loss_weights"]
            return loss, (losses, weights)

        grads, (losses, weights) = jax.grad(objective, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), losses, weights

    for _ in range(STEPS):
        state, losses, weights = step(state)
    assert set(weights) == set(losses) == {"fit", "size"}
    np.testing.assert_allclose(sum(weights.values()), 1.0, rtol=1e-6)

    dense = [variables["params"][name] for name in ("hidden", "out")]
    expected = plain_run([(layer["kernel"], layer["bias"]) for layer in dense])
    learned = state.params["composite"]["loss_logits"].learned
    np.testing.assert_allclose(learned, expected["mu"].learned, rtol=1e-5)
    assert abs(learned[0] - mu.learned[0]) > 0.1


def test_nnx_optimizer():
    model = NNXModel(nnx.Rngs(0))
    start = [
        (layer.kernel.get_value(), layer.bias.get_value())
        for layer in (model.hidden, model.out)
    ]
    optimizer = nnx.Optimizer(model, yoto.adamw(0.02, weight_decay=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads, losses = nnx.grad(lambda m: m(X), has_aux=True)(model)
        optimizer.update(model, grads)
        return losses

    for _ in range(STEPS):
        step(model, optimizer)
    expected = plain_run(start)
    learned = model.composite.loss_logits.get_value().learned
    np.testing.assert_allclose(learned, expected["mu"].learned, rtol=1e-5)
    weights = model.composite.loss_weights
    np.testing.assert_allclose(sum(weights.values()), 1.0, rtol=1e-6)

    graph, state = nnx.split(model)
    again = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    np.testing.assert_array_equal(again(X)[0], model(X)[0])


CHAIN = optax.chain(
    yoto.add_hyperparameter_decay(0.1), optax.lion(1e-2), optax.ema(0.5)
)
PARTITION = optax.partition(
    {"model": optax.adam(0.02), "loss_logits": yoto.adamw(0.02)},
    yoto.label_loss_logits,
)


@pytest.mark.parametrize(
    "tx",
    [
        yoto.sgdw(0.02),
        yoto_nnx.unwrap_loss_logits(CHAIN),
        yoto_nnx.unwrap_loss_logits(PARTITION),
        yoto_nnx.unwrap_loss_logits(optax.MultiSteps(yoto.adamw(0.02), 2)),
    ],
    ids=["sgdw", "chain", "partition", "multi_steps"],
)
def test_nnx_optimizer_with_other_transformations(tx):
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    (first, _), before = model(X), model.composite.loss_logits.get_value().learned

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: m(X)[0])(model))

    for _ in range(30):
        step(model, optimizer)
    assert model(X)[0] < first
    assert model.composite.loss_logits.get_value().learned[0] != before[0]


@pytest.mark.parametrize("tx", [yoto.sgdw(0.02), yoto.adamw(0.02)])
def test_nnx_without_its_optimizer(tx):
    """The functional way: Optax on the split-off state, variables and all."""
    graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    state = tx.init(params)
    loss = lambda p: nnx.merge(graph, p, rest)(X)[0]
    first = loss(params)
    for _ in range(30):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < first


def test_linen_state_survives_the_serialization_of_flax():
    layer = yoto_linen.CompositeLoss("fit", epsilon=0.3)
    losses = {"fit": 1.0, "size": 2.0}
    variables = layer.init(jax.random.key(0), losses)
    blank = yoto_linen.CompositeLoss("fit").init(jax.random.key(0), losses)
    restored = serialization.from_bytes(blank, serialization.to_bytes(variables))
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    np.testing.assert_array_equal(
        layer.apply(restored, losses), layer.apply(variables, losses)
    )
    other = yoto_linen.CompositeLoss("a").init(
        jax.random.key(0), {"a": 1.0, "b": 1.0, "c": 1.0}
    )
    with pytest.raises(ValueError, match="mu must hold 2 logits"):
        serialization.from_bytes(other, serialization.to_bytes(variables))


def test_nnx_layer_takes_rngs_like_any_other():
    layer = yoto_nnx.CompositeLoss({"a": 0.0, "b": 0.0}, "a", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer({"a": 1.0, "b": 1.0}), 1.0, rtol=1e-6)


@pytest.mark.parametrize("primary", ["fit", None])
def test_layers_report_wrong_losses(primary):
    layer = yoto_linen.CompositeLoss(primary)
    variables = layer.init(jax.random.key(0), {"fit": 1.0, "size": 2.0})
    with pytest.raises(ValueError, match="missing: 'size'"):
        layer.apply(variables, {"fit": 1.0})
    with pytest.raises(ValueError, match="missing: 'size'"):
        yoto_nnx.CompositeLoss({"fit": 1.0, "size": 2.0}, primary)({"fit": 1.0})


def test_weights_that_are_sown_are_those_of_the_batch():
    layer = yoto_linen.CompositeLoss(primary="a", epsilon=0.25)
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    present = {"a": jnp.asarray(True), "b": jnp.asarray(False), "c": jnp.asarray(True)}
    variables = layer.init(jax.random.key(0), losses)
    loss, logs = layer.apply(
        variables, losses, present=present, mutable="intermediates"
    )
    (weights,) = logs["intermediates"]["loss_weights"]
    np.testing.assert_allclose(list(weights.values()), [0.8, 0.0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(loss, 0.8 * 1.0 + 0.2 * 3.0, rtol=1e-6)
