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
