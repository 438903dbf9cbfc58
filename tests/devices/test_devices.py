"""Data parallelism on eight virtual devices equals a run on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

DEVICES = 8
AUTO = jax.sharding.AxisType.Auto
STEPS = 20
OPTIMIZERS = {
    "sgdw": yoto.sgdw(0.02, weight_decay=0.01, hyperparameter_decay=0.3),
    "adamw": yoto.adamw(0.02, weight_decay=0.01),
}

pytestmark = [
    pytest.mark.skipif(
        jax.device_count() < DEVICES, reason="needs eight (virtual) devices"
    ),
    pytest.mark.usefixtures("quick_compilation"),
]


def loss_fn(w, batch):
    x, y = batch
    prediction = jnp.tanh(x @ w)
    return {
        "fit": jnp.mean((prediction - y) ** 2),
        "size": jnp.sum(w**2),
        "smooth": jnp.mean(jnp.abs(prediction)),
    }


def objective(params, batch):
    return yoto.composite_loss(loss_fn(params["w"], batch), params["mu"])


def data():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (5, 2)),
        "mu": yoto.init_loss_logits({"fit": 0.0, "size": 0.0, "smooth": 0.0}, "fit"),
    }
    x = jax.random.normal(keys[1], (STEPS, 8 * DEVICES, 5))
    y = jnp.sin(x[..., :2])
    return params, (x, y)


def one_device(tx):
    params, batches = data()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[0][0])
    return run((params, tx.init(params)))


def assert_same(tree, reference):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


# Momentum takes all these ways in test_scaling.
ADAM = {
    "adamw": OPTIMIZERS["adamw"],
    "by_hypergradient": yoto.by_hypergradient(OPTIMIZERS["adamw"], 0.1),
}


@pytest.mark.parametrize("tx", ADAM.values(), ids=ADAM)
def test_pmap(tx):
    params, batches = data()
    replicas = jax.tree.map(
        lambda x: jnp.stack([x] * DEVICES), (params, tx.init(params))
    )

    @functools.partial(jax.pmap, axis_name="devices")
    def step(params, state, batch):
        grads = jax.lax.pmean(jax.grad(objective)(params, batch), "devices")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = replicas
    for k in range(STEPS):
        shards = jax.tree.map(
            lambda x: x[k].reshape(DEVICES, -1, *x.shape[2:]),
            batches,
        )
        params, state = jax.block_until_ready(step(params, state, shards))
    learned = np.asarray(params["mu"].learned)
    assert (learned == learned[0]).all(), "mu differs between replicas"
    assert_same(jax.tree.map(lambda x: x[0], params), one_device(tx))


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(tx, check_vma):
    params, batches = data()
    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec(), spec(), spec("devices")),
        out_specs=(spec(), spec()),
        check_vma=check_vma,
    )
    def step(params, state, batch):
        if check_vma:
            # The gradient of a mean over the axis with respect to replicated
            # parameters is already the sum over the axis that it has to be.
            mean = lambda p: jax.lax.pmean(objective_of(p, batch), "devices")
            grads = jax.grad(mean)(params)
        else:
            grads = jax.lax.pmean(jax.grad(objective_of)(params, batch), "devices")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    objective_of = objective
    state = tx.init(params)
    for k in range(STEPS):
        batch = jax.tree.map(lambda x: x[k], batches)
        params, state = jax.block_until_ready(step(params, state, batch))
    assert_same(params, one_device(tx))
    shards = [np.asarray(s.data) for s in params["mu"].learned.addressable_shards]
    assert all((shard == shards[0]).all() for shard in shards)


@pytest.mark.parametrize("tx", ADAM.values(), ids=ADAM)
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_jit_with_sharded_batches(tx, axis_type):
    params, batches = data()
    mesh = jax.make_mesh(
        (DEVICES,),
        ("devices",),
        axis_types=(getattr(jax.sharding.AxisType, axis_type),),
    )
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, "devices")
    )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batches = jax.device_put(batches, sharding)
    params = jax.device_put(params, replicated)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(objective)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        before = jax.tree.map(jax.typeof, (params, state))
        for k in range(STEPS):
            batch = jax.tree.map(lambda x: x[k], batches)
            params, state = jax.block_until_ready(step(params, state, batch))
        after = jax.tree.map(jax.typeof, (params, state))
    assert jax.tree.leaves(before) == jax.tree.leaves(after)
    assert params["mu"].learned.sharding.is_fully_replicated
    assert_same(params, one_device(tx))


# Runs side by side, each on a device of its own.

WITH_LOOPS = [
    *("mgda", "pcgrad", "gradvac", "cagrad", "nash_mtl", "fair_grad", "upgrad"),
    *("dual_proj", "pcd", "epo", "grap_closed_form"),
]


def side_by_side(step):
    """The step of one run, as that of all of them."""

    def run(*args):
        out = step(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[None], out)

    mesh = jax.make_mesh((DEVICES,), ("runs",), axis_types=(AUTO,))
    spec = jax.P("runs")
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize("name", WITH_LOOPS)
def test_solvers_can_be_traced_in_runs_side_by_side(name):
    """Their loops start from constants, and end with what varies over the runs."""
    method = yoto.weightings.methods()[name]
    steered = method.requires == "downstream"
    weighting = method.example("smooth" if steered else "fit")
    params, batches = data()
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    step = yoto.value_and_grad(loss_fn, weighting)
    state = weighting.init(dict.fromkeys(("fit", "size", "smooth"), 0.0))
    start = yoto.racing.start((params["w"], state), DEVICES)
    runs = side_by_side(lambda w, state: step(w, state, batch))
    _, grads, _ = jax.eval_shape(runs, *start)
    assert grads.shape == start[0].shape


@pytest.mark.parametrize("name", ["upgrad", "cagrad", "gradvac"])
def test_solutions_in_runs_side_by_side_are_those_alone(name):
    rows = jax.random.normal(jax.random.key(0), (DEVICES, 3, 4))
    gramians = jnp.einsum("rki,rli->rkl", rows, rows)
    losses = dict.fromkeys("abc", 1.0)
    weighting = yoto.weightings.methods()[name].example("a")
    state = weighting.init(losses)
    weigh = lambda gramian: weighting.update(losses, state, gramian=gramian)[0]
    found = jax.jit(side_by_side(weigh))(gramians)
    expected = jax.jit(jax.vmap(weigh))(gramians)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["equal", "upgrad"])
def test_integer_parameters(name):
    weighting = getattr(yoto.weightings, name)()
    losses = {"a": 0.0, "b": 0.0}

    def loss_fn(p, x):
        return {"a": jnp.mean((x @ p["w"]) ** 2), "b": jnp.sum(p["w"] * p["i"])}

    step = yoto.value_and_grad(loss_fn, weighting, axis_name="d")
    params = {"w": jnp.ones(3), "i": jnp.arange(3)}
    x = jax.random.normal(jax.random.key(0), (DEVICES, 3))
    spread = jax.shard_map(
        lambda p, s, x: step(p, s, x)[1],
        mesh=jax.make_mesh((DEVICES,), ("d",), axis_types=(AUTO,)),
        in_specs=(jax.P(), jax.P(), jax.P("d")),
        out_specs=jax.P(),
    )
    grads = jax.jit(spread)(params, weighting.init(losses), x)
    one = yoto.value_and_grad(loss_fn, weighting)
    _, expected, _ = one(params, weighting.init(losses), x)
    assert grads["i"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-5)


def test_gradient_norms_are_those_of_the_whole_batch():
    params, batches = data()
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    expected = yoto.racing.gradient_norms(loss_fn)(params["w"], batch)
    spread = jax.shard_map(
        yoto.racing.gradient_norms(loss_fn, axis_name="d"),
        mesh=jax.make_mesh((DEVICES,), ("d",), axis_types=(AUTO,)),
        in_specs=(jax.P(), jax.P("d")),
        out_specs=jax.P(),
    )
    chex.assert_trees_all_close(spread(params["w"], batch), expected, rtol=1e-5)


def test_axes_that_were_not_named():
    params, batches = data()
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    weighting = yoto.weightings.famo()
    state = weighting.init(dict.fromkeys(("fit", "size", "smooth"), 0.0))
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AUTO,))
    step = yoto.value_and_grad(loss_fn, weighting)
    forgotten = jax.shard_map(
        step, mesh=mesh, in_specs=(jax.P(), jax.P(), jax.P("d")), out_specs=jax.P("d")
    )
    with pytest.raises(ValueError, match="'fit' differs .* with axis_name='d' losses"):
        jax.eval_shape(forgotten, params["w"], state, batch)

    # Layers in parts, and a loss that is not summed over them.
    specs = {"axis_name": None, "param_specs": jax.P(None, "d")}
    in_parts = jax.shard_map(
        yoto.value_and_grad(lambda w: {"size": jnp.sum(w**2)}, weighting, **specs),
        mesh=mesh,
        in_specs=(jax.P(None, "d"), jax.P()),
        out_specs=jax.P("d"),
    )
    state = weighting.init({"size": 0.0})
    with pytest.raises(ValueError, match="'size' differs .* sum it over that axis"):
        jax.eval_shape(in_parts, jnp.ones((5, DEVICES)), state)


def test_a_constant_loss_of_runs_side_by_side():
    def with_constant(w):
        return {"size": jnp.sum(w**2), "none": jnp.ones(())}

    weighting = yoto.weightings.upgrad()
    step = yoto.value_and_grad(with_constant, weighting)
    w = jnp.arange(2.0 * DEVICES).reshape(DEVICES, 2)
    state = weighting.init({"size": 0.0, "none": 0.0})
    states = yoto.racing.start(state, DEVICES)
    found = jax.jit(side_by_side(step))(w, states)
    expected = jax.jit(jax.vmap(step))(w, states)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
