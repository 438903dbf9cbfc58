"""Choices on eight virtual devices equal those on one, and all devices agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

DEVICES = 8
STEPS = 8
BRANCHES = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sine": jnp.sin}

pytestmark = [
    pytest.mark.skipif(
        jax.device_count() < DEVICES, reason="needs eight (virtual) devices"
    ),
    pytest.mark.usefixtures("quick_compilation"),
]
tx = yoto.adamw(0.05, choice_decay=optax.linear_schedule(2.0, -2.0, STEPS))


def start():
    params = {
        "w": jax.random.normal(jax.random.key(0), (5, 2)),
        "kind": yoto.init_choice_logits(BRANCHES),
    }
    return params, tx.init(params)


def data():
    x = jax.random.normal(jax.random.key(1), (STEPS, 4 * DEVICES, 5))
    return x, jnp.sin(3 * x[..., :2])


def loss(method, params, batch, key):
    x, y = batch
    decided = yoto.choose(key, params, 0.5, method=method)
    out = yoto.apply_choice(decided["kind"], BRANCHES, x @ decided["w"])
    return jnp.mean((out - y) ** 2)


def steps(gradient):
    """All steps, given the gradient of one: (params, batch, key)."""

    def step(carry, inputs):
        number, batch = inputs
        params, state = carry
        grads = gradient(params, batch, jax.random.fold_in(jax.random.key(2), number))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return lambda carry, batches: jax.lax.scan(
        step, carry, (jnp.arange(STEPS), batches)
    )[0][0]


def assert_same(params, reference):
    for x, y in zip(*map(jax.tree.leaves, (params, reference)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    shards = [np.asarray(s.data) for s in params["kind"].logits.addressable_shards]
    assert len(shards) == DEVICES
    assert all((shard == shards[0]).all() for shard in shards)
    assert yoto.harden(params)["kind"].option == yoto.harden(reference)["kind"].option


@pytest.mark.parametrize("method", ["softmax", "straight_through"])
def test_eight_devices_equal_one(method):
    alone = jax.jit(steps(jax.grad(functools.partial(loss, method))))
    reference = alone(start(), data())
    assert np.abs(reference["kind"].logits).max() > 0.05

    def averaged(params, batch, key):
        of_all = lambda p: jax.lax.pmean(loss(method, p, batch, key), "data")
        return jax.grad(of_all)(params)

    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=kind)
    spec = jax.sharding.PartitionSpec
    shared = jax.shard_map(
        steps(averaged),
        mesh=mesh,
        in_specs=(spec(), spec(None, "data")),
        out_specs=spec(),
    )
    assert_same(jax.jit(shared)(start(), data()), reference)

    place = lambda *axes: jax.sharding.NamedSharding(mesh, spec(*axes))
    carry = jax.device_put(start(), place())
    batches = jax.device_put(data(), place(None, "data"))
    assert_same(alone(carry, batches), reference)
