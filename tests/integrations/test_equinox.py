import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

eqx = pytest.importorskip("equinox")


def test_a_filter_may_freeze_loss_logits():
    params = {"w": jnp.ones(3), "mu": yoto.init_loss_logits((0.0, 0.0), 0)}
    spec = {"w": True, "mu": jax.tree.map(lambda _: False, params["mu"])}
    trained, kept = eqx.partition(params, spec)
    tx = yoto.adamw(0.1)
    grads = jax.tree.map(jnp.ones_like, trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    new = eqx.combine(eqx.apply_updates(trained, updates), kept)
    np.testing.assert_array_equal(new["mu"].learned, params["mu"].learned)
    assert (new["w"] != params["w"]).all()


def test_loss_logits_are_a_field_of_an_equinox_module():
    class Model(eqx.Module):
        linear: eqx.nn.Linear
        mu: yoto.LossLogits
        name: str

        def __call__(self, x, y):
            prediction = jax.vmap(self.linear)(x)
            losses = {
                "fit": jnp.mean((prediction - y) ** 2),
                "size": jnp.mean(self.linear.weight**2),
            }
            return yoto.composite_loss(losses, self.mu), losses

    mu = yoto.init_loss_logits({"fit": 0.0, "size": 0.0}, "fit")
    model = Model(eqx.nn.Linear(3, 2, key=jax.random.key(0)), mu, "model")
    tx = yoto.adamw(0.02)
    state = tx.init(eqx.filter(model, eqx.is_array))
    x = jax.random.normal(jax.random.key(1), (16, 3))
    y = x[:, :2]

    @eqx.filter_jit
    def step(model, state):
        grads, losses = eqx.filter_grad(lambda m: m(x, y), has_aux=True)(model)
        params = eqx.filter(model, eqx.is_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, losses

    _, _, first = step(model, state)
    for _ in range(200):
        model, state, losses = step(model, state)
    assert losses["fit"] < 0.2 * first["fit"]
    assert optax.tree.get(state, "nu").mu.learned.shape == (1,)
    assert abs(model.mu.learned[0] - mu.learned[0]) > 0.1
    np.testing.assert_allclose(sum(yoto.loss_weights(model.mu).values()), 1, rtol=1e-6)


class Network(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.MLP  # holds functions
    name: str = "network"

    def __init__(self, key):
        self.hidden = eqx.nn.Linear(3, 4, key=key)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.out = eqx.nn.MLP(4, 2, 4, 1, key=key)

    def encode(self, x, state):
        one = lambda x, state: self.norm(self.hidden(x), state)
        axes = {"in_axes": (0, None), "out_axes": (0, None)}
        return jax.vmap(one, axis_name="batch", **axes)(x, state)


def losses_of(y):
    return {"fit": jnp.mean((y - 1) ** 2), "size": jnp.mean(jnp.abs(y))}


@pytest.mark.parametrize("way", ["direct", "select", "encoder"])
def test_a_filtered_module_and_its_state(way):
    model, model_state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (8, 3))

    def encoder(params, model_state, x):
        return eqx.combine(params, static).encode(x, model_state)

    def heads_fn(params, z, model_state, x):
        h, model_state = z
        return losses_of(jax.vmap(eqx.combine(params, static).out)(h)), model_state

    def loss_fn(params, model_state, x):
        return heads_fn(params, encoder(params, model_state, x), model_state, x)

    weighting = yoto.weightings.upgrad()
    options = {
        "select": {
            "gradients": yoto.of_parameters(select=lambda params: params.hidden)
        },
        "encoder": {"gradients": yoto.of_representation(encoder, weigh_heads=True)},
    }
    step = jax.jit(
        yoto.value_and_grad(
            heads_fn if way == "encoder" else loss_fn,
            weighting,
            has_aux=True,
            **options.get(way, {}),
        )
    )
    state = weighting.init({"fit": 0.0, "size": 0.0})
    (_, new_state), grads, state = step(params, state, model_state, x)

    def weighted(model):
        h, new_state = model.encode(x, model_state)
        losses = losses_of(jax.vmap(model.out)(h))
        return sum(
            state.loss_weights[name] * losses[name] for name in losses
        ), new_state

    expected, expected_state = eqx.filter_grad(weighted, has_aux=True)(model)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for got, wanted in ((grads, expected), (new_state, expected_state)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_module_that_is_not_filtered_is_told_how():
    model, _ = eqx.nn.make_with_state(Network)(jax.random.key(0))
    weighting = yoto.weightings.upgrad()
    state = weighting.init({"fit": 0.0, "size": 0.0})
    loss_fn = lambda model, x: losses_of(jax.vmap(model)(x))
    x = jnp.ones((8, 3))
    remedy = r"parameter '.*' is no array but a str.*eqx.partition.*eqx.combine"
    with pytest.raises(TypeError, match=remedy):
        yoto.value_and_grad(loss_fn, weighting)({"model": model}, state, x)
    with pytest.raises(TypeError, match=remedy):
        yoto.value_and_jacobian(loss_fn)(model, x)
    with pytest.raises(
        TypeError, match="'act' is no array but a function.*out of para"
    ):
        yoto.value_and_grad(loss_fn, weighting)({"act": lambda x: x}, state, x)


def test_a_module_of_arrays_is_a_tree_like_any_other():
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    weighting = yoto.weightings.equal()
    state = weighting.init({"fit": 0.0, "size": 0.0})
    loss_fn = lambda model, x: losses_of(jax.vmap(model)(x))
    x = jnp.ones((8, 3))
    _, grads, _ = yoto.value_and_grad(loss_fn, weighting)(model, state, x)
    mean = lambda model: sum(loss_fn(model, x).values()) / 2
    np.testing.assert_allclose(grads.weight, jax.grad(mean)(model).weight, rtol=1e-6)
