"""What a type checker sees; ``assert_type`` does nothing at run time."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp

import yoto_jax as yoto

Losses = dict[str, jax.Array]
W, X = jnp.ones(3), jnp.arange(3.0)


def loss_fn(w: jax.Array, x: jax.Array) -> Losses:
    return {"fit": jnp.sum((w - x) ** 2), "size": jnp.sum(w**2)}


def aux_fn(w: jax.Array, x: jax.Array) -> tuple[Losses, int]:
    return loss_fn(w, x), 3


def test_losses_and_gradients_have_the_types_of_the_loss_function():
    weighting = yoto.weightings.equal()
    state = weighting.init(loss_fn(W, X))
    losses, grads, _ = yoto.value_and_grad(loss_fn, weighting)(W, state, X)
    assert_type(losses, Losses)
    assert_type(grads, jax.Array)
    assert losses["size"] == 3


def test_auxiliary_output_keeps_its_type():
    weighting = yoto.weightings.equal()
    state = weighting.init(loss_fn(W, X))
    step = yoto.value_and_grad(aux_fn, weighting, has_aux=True)
    (losses, aux), grads, _ = step(W, state, X)
    assert_type(losses, Losses)
    assert_type(aux, int)
    assert_type(grads, jax.Array)
    assert aux == 3


def test_a_state_keeps_its_type():
    weighting = yoto.weightings.famo()
    state: yoto.WeightingState = weighting.init(loss_fn(W, X))
    _, _, after = yoto.value_and_grad(loss_fn, weighting)(W, state, X)
    assert_type(after, yoto.WeightingState)
    inner: Any = after.inner
    assert inner is not None
