"""Weightings as a link of an Optax chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import yoto_jax as yoto
from yoto_jax import make_weighting, weightings
from yoto_jax.gradients._statistics import statistics_of

X = jax.random.normal(jax.random.key(0), (16, 3))


def inverse_norms():
    def update(losses, inner, spec, *, gramian):
        return 1 / jnp.sqrt(jnp.diagonal(gramian)), inner

    return make_weighting(lambda spec: (), update, needs=("gramian",))


def losses_of(y):
    return {"fit": jnp.mean((y - 1) ** 2), "size": jnp.mean(jnp.abs(y)) + 0.1}


def loss_fn(params, x):
    return losses_of(jnp.tanh(x @ params["w"]) @ params["v"])


PARAMS = {"w": jnp.eye(3), "v": jnp.ones(3), "nothing": None}
NEEDING_LOSSES = ["famo", "uncertainty", "scale_invariant", "yoto"]


def make(name):
    return weightings.yoto("fit") if name == "yoto" else getattr(weightings, name)()


@pytest.mark.parametrize("name", ["gramian", *NEEDING_LOSSES])
def test_the_chain_equals_the_engine(name):
    weighting = inverse_norms() if name == "gramian" else make(name)
    like = dict.fromkeys(("fit", "size"), 0.0)
    tx = optax.chain(yoto.aggregate(weighting, like), optax.adam(0.1))
    plain = optax.adam(0.1)
    engine = yoto.value_and_grad(loss_fn, weighting)
    params = expected = PARAMS
    opt_state, state, reference = tx.init(params), weighting.init(like), None
    reference = plain.init(params)
    for _ in range(4):
        losses, jacobian = yoto.value_and_jacobian(loss_fn)(params, X)
        updates, opt_state = tx.update(jacobian, opt_state, params, losses=losses)
        params = optax.apply_updates(params, updates)
        _, grads, state = engine(expected, state, X)
        updates, reference = plain.update(grads, reference, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(params, expected, rtol=1e-4)
    chex.assert_trees_all_close(opt_state[0], state, rtol=1e-4)
    weights = optax.tree.get(opt_state, "loss_weights")
    assert set(weights) == {"fit", "size"}


def test_gradient_accumulation_after_it_sees_aggregated_gradients():
    inner = optax.MultiSteps(optax.sgd(0.1), 2)
    tx = optax.chain(
        yoto.aggregate(inverse_norms(), 2), inner.gradient_transformation()
    )
    state = tx.init(PARAMS)
    batches = jnp.stack([X[:8], X[8:]])
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    for x in batches:
        _, jacobian = yoto.value_and_jacobian(loss_fn)(PARAMS, x)
        updates, state = tx.update(jacobian, state, PARAMS)
        link = yoto.aggregate(inverse_norms(), 2)
        alone, _ = link.update(jacobian, link.init(PARAMS))
        total = jax.tree.map(jnp.add, total, alone)
    expected = jax.tree.map(lambda g: -0.1 * g / 2, total)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert int(state[0].num_updates) == 2


def test_nnx_optimizer_passes_the_losses_on():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    like = dict.fromkeys(("fit", "size"), 0.0)
    tx = optax.chain(yoto.aggregate(weightings.famo(), like), optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        graph, params = nnx.split(model)
        f = lambda params: losses_of(nnx.merge(graph, params)(x))
        losses, jacobian = yoto.value_and_jacobian(f)(params)
        optimizer.update(model, jacobian, losses=losses)
        return losses

    first = step(model, optimizer, X)
    for _ in range(20):
        last = step(model, optimizer, X)
    assert last["fit"] < first["fit"]
    assert int(optimizer.opt_state[0].num_updates[...]) == 21
    np.testing.assert_allclose(
        sum(float(w[...]) for w in optimizer.opt_state[0].loss_weights.values()),
        1.0,
        rtol=1e-5,
    )


class WeighingTrainState(TrainState):
    """Hands the losses to the optimizer, which ``TrainState`` does not."""

    def apply_gradients(self, *, grads, losses, **changes):
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, losses=losses
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **changes
        )


@pytest.mark.parametrize("needs_losses", [False, True])
def test_linen_train_state(needs_losses):
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), X)["params"]
    weighting = weightings.famo() if needs_losses else inverse_norms()
    tx = optax.chain(
        yoto.aggregate(weighting, {"fit": 0.0, "size": 0.0}), optax.sgd(0.1)
    )
    kind = WeighingTrainState if needs_losses else TrainState
    state = kind.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x):
        f = lambda params: losses_of(state.apply_fn({"params": params}, x))
        losses, jacobian = yoto.value_and_jacobian(f)(state.params)
        extra = {"losses": losses} if needs_losses else {}
        return state.apply_gradients(grads=jacobian, **extra), losses

    _, first = step(state, X)
    for _ in range(20):
        state, last = step(state, X)
    assert last["fit"] < first["fit"]
    assert int(state.opt_state[0].num_updates) == 20


def test_an_array_of_losses_is_refused_with_a_way_out():
    """See *Per example* in the recipes."""
    losses = {"fit": jnp.ones(4), "size": jnp.ones(())}
    message = r"loss 'fit' must be a scalar, got shape \(4,\).*jnp.unstack"
    for call in (
        lambda: yoto.aggregate(weightings.upgrad(), losses).init(jnp.ones(2)),
        lambda: yoto.value_and_jacobian(lambda w: losses)(jnp.ones(2)),
        lambda: weightings.famo().init(losses),
        lambda: yoto.composite_loss(losses, yoto.init_loss_logits(losses, "size")),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_deviation_of_entries_is_not_lost_to_rounding():
    rng = np.random.default_rng(0)
    entries = np.float32(1000 + 0.01 * rng.normal(size=(2, 500)))
    rows = {"w": entries[:, :300].reshape(2, 30, 10), "b": entries[:, 300:]}
    found = statistics_of(jax.tree.map(jnp.asarray, rows), ["std"])["std"]
    np.testing.assert_allclose(found, np.float64(entries).std(1), rtol=2e-3)
    one = statistics_of(jnp.float32([[3.7], [1e4]]), ["std"])["std"]
    np.testing.assert_array_equal(one, 0)


def test_statistics_of_every_kind_and_downstream_losses():
    _, jacobian = yoto.value_and_jacobian(loss_fn)(PARAMS, X)
    flat = np.concatenate(
        [np.reshape(r, (2, -1)) for r in jax.tree.leaves(jacobian)], 1
    )
    expected = {
        "norms": np.linalg.norm(flat, axis=1),
        "max_abs": np.abs(flat).max(1),
        "mean_abs": np.abs(flat).mean(1),
        "std": flat.std(1),
        "alignment": flat @ flat[1],
        "anything": np.array([3.0, 4.0]),
    }
    for name, value in expected.items():
        weighting = make_weighting(
            lambda spec: (),
            lambda losses, inner, spec, **seen: (*seen.values(), inner),
            needs=(name,),
            downstream="size",
        )
        tx = yoto.aggregate(weighting, {"fit": 0.0, "size": 0.0})
        _, state = tx.update(jacobian, tx.init(PARAMS), anything=jnp.array([3.0, 4.0]))
        got = [state.loss_weights["fit"], state.loss_weights["size"]]
        np.testing.assert_allclose(got, value, rtol=1e-5)


def test_every_holds_in_a_chain():
    tx = yoto.aggregate(weightings.every(inverse_norms(), 2), 2)
    state = tx.init(PARAMS)
    _, jacobian = yoto.value_and_jacobian(loss_fn)(PARAMS, X)
    weights = []
    for scale in (1.0, 2.0, 4.0):
        scaled = jax.tree.map(lambda g: g * scale, jacobian)
        _, state = tx.update(scaled, state)
        weights.append(optax.tree.get(state, "loss_weights")[0])
    np.testing.assert_allclose(weights, weights[0] * np.array([1, 1, 0.25]), rtol=1e-5)


def test_updates_keep_their_dtype_and_unknown_extras_are_tolerated():
    tx = yoto.aggregate(inverse_norms(), 2)
    updates = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((2,), jnp.float32)}
    new, _ = tx.update(updates, tx.init(None), unknown=3)
    assert new["a"].dtype == jnp.bfloat16
    assert new["a"].shape == (3,)
    assert new["b"].shape == ()


def test_loss_logits_among_the_parameters():
    mu = yoto.init_loss_logits({"fit": 0.0, "size": 0.0}, "fit")
    params = {"mu": mu, "w": jnp.ones(2)}
    f = lambda p: (p["mu"].learned[0] ** 2, jnp.sum(p["w"] ** 2))
    _, jacobian = yoto.value_and_jacobian(f)(params)
    tx = optax.chain(yoto.aggregate(weightings.equal(), 2), yoto.adamw(0.1))
    losses = (1.0, 2.0)
    updates, _ = tx.update(jacobian, tx.init(params), params, losses=losses)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_wide_weights_of_narrow_gradients_under_strict_promotion():
    rows = {"w": jnp.ones((2, 3)), "c": jnp.ones((2, 2), jnp.complex64)}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tx = yoto.aggregate(weightings.mgda(), 2)  # Of a number alone: float64.
        updates, state = tx.update(rows, tx.init(None))
        assert state.loss_weights[0].dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(
        updates, jax.tree.map(lambda x: x[0], rows)
    )


def test_errors_name_what_is_wrong():
    tx = yoto.aggregate(inverse_norms(), {"fit": 0.0, "size": 0.0})
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"update\['v'\].*length 2.*'fit', 'size'.*\(3,"
    ):
        tx.update({"v": jnp.ones((3, 2))}, state)
    tx = yoto.aggregate(weightings.famo(), 2)
    with pytest.raises(ValueError, match="needs the losses: call update"):
        tx.update(jnp.ones((2, 2)), tx.init(None))
    with pytest.raises(ValueError, match="do not match"):
        tx.update(jnp.ones((2, 2)), tx.init(None), losses={"a": 1.0, "b": 2.0})


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_on_eight_devices_averages_come_first():
    tx = yoto.aggregate(inverse_norms(), 2)
    x = jax.random.normal(jax.random.key(1), (32, 3))
    state = tx.init(PARAMS)
    losses, jacobian = yoto.value_and_jacobian(loss_fn)(PARAMS, x)
    expected = losses, *tx.update(jacobian, state)

    def one(x, state):
        step = yoto.value_and_jacobian(loss_fn, axis_name="d")
        losses, jacobian = step(PARAMS, x)
        return losses, *tx.update(jacobian, state)

    got = jax.pmap(one, axis_name="d", in_axes=(0, None))(x.reshape(8, 4, 3), state)
    got = jax.tree.map(lambda y: y[3], got)
    chex.assert_trees_all_close(got, expected, rtol=1e-4)
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for check in (True, False):
        shard = jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(spec("d"), spec()),
            out_specs=spec(),
            check_vma=check,
        )
        chex.assert_trees_all_close(jax.jit(shard)(x, state), expected, rtol=1e-4)
