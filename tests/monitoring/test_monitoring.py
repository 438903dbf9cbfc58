"""Recording on the device, reading on the host, and what is said of it."""

import functools
import importlib
import itertools
import re
import sys
import types
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.devices.test_devices import data, loss_fn
from tests.oracles import paper
from yoto_jax import make_weighting, monitoring, weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES = 8
NAMES = ("fit", "size", "smooth")
SPEC = jax.sharding.PartitionSpec
needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs eight (virtual) devices"
)


def rho(step):
    return 0.3 + 0.1 * step


def gradients(params, batch):
    def objective(params):
        losses = loss_fn(params["w"], batch)
        return yoto.composite_loss(losses, params["mu"]), losses

    return jax.grad(objective, has_aux=True)(params)


def make_step(tx, axis=None):
    def step(params, state, batch):
        grads, losses = gradients(params, batch)
        if axis is not None:
            grads, losses = jax.lax.pmean((grads, losses), axis)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def problem():
    return jax.device_get(data())


def start():
    return jax.tree.map(jnp.array, problem()[0])


def batch_at(k):
    return jax.tree.map(lambda x: x[k], problem()[1])


def chained(**options):
    record = monitoring.record(**{"length": 8, "hyperparameter_decay": rho, **options})
    return optax.chain(record, optax.sgd(0.02))


def assert_like_list(seen, steps, weights, losses):
    """A history against plain lists with one entry for every step of the run."""
    np.testing.assert_array_equal(seen.steps, steps)
    for got, expected in ((seen.loss_weights, weights), (seen.losses, losses)):
        assert set(got) == set(expected[0])
        for name, values in got.items():
            plain = [float(expected[k][name]) for k in steps]
            np.testing.assert_allclose(values, plain, rtol=2e-6)


@pytest.fixture(scope="module")
def plain():
    """Twenty steps without any recording, everything written down in lists."""
    tx = optax.sgd(0.02)

    def step(carry, batch):
        params, state = carry
        grads, losses = gradients(params, batch)
        updates, state = tx.update(grads, state, params)
        seen = {
            "params": params,
            "weights": yoto.loss_weights(params["mu"]),
            "losses": losses,
            "slopes": jnp.linalg.norm(grads["mu"].learned),
            "pulls": jnp.linalg.norm(jax.grad(yoto.regularizer)(params["mu"]).learned),
        }
        return (optax.apply_updates(params, updates), state), seen

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, tx.init(params)), batches)

    params, batches = problem()
    (last, _), seen = jax.device_get(run(params, batches))
    each = [jax.tree.map(lambda x: x[k], seen) for k in range(20)]
    return {name: [x[name] for x in each] for name in seen} | {"last": last}


# Recording with the optimizer.


def test_rows_equal_plain_lists_and_the_run_is_the_same(plain):
    tx = chained()
    step = jax.jit(chex.assert_max_traces(make_step(tx), 1), donate_argnums=(0, 1))
    params = start()
    state = tx.init(params)
    kinds = [jax.typeof(x) for x in jax.tree.leaves(state)]
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    for k in range(20):
        given, (params, state) = state, step(params, state, batch_at(k))
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert [jax.typeof(x) for x in jax.tree.leaves(state)] == kinds
    # Written in place: the ring is still where it was.
    (ring,) = [x for x in jax.tree.leaves(state) if x.shape == (9, 12)]
    assert ring.unsafe_buffer_pointer() in pointers
    chex.assert_trees_all_close(params, plain["last"], rtol=1e-6)

    seen = monitoring.history(state)
    assert_like_list(seen, np.arange(12, 20), plain["weights"], plain["losses"])
    np.testing.assert_allclose(seen.data_gradient, plain["slopes"][12:], rtol=2e-6)
    pulls = [rho(k) * plain["pulls"][k] for k in range(12, 20)]
    np.testing.assert_allclose(seen.prior_gradient, pulls, rtol=2e-6)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_every_and_wrapping_around(every, plain):
    tx = monitoring.record(length=5, every=every)
    params = start()
    state = tx.init(params)
    assert monitoring.history(state).steps.size == 0
    seen = [(plain["params"][k], plain["losses"][k]) for k in range(20)]
    seen = jax.tree.map(lambda *x: np.stack(x), *seen)

    def step(state, seen):
        params, losses = seen
        updates, state = tx.update(params, state, params, losses=losses)
        return state, (state, updates)

    _, (states, updates) = jax.jit(lambda s: jax.lax.scan(step, s, seen))(state)
    chex.assert_trees_all_equal(updates, seen[0])
    for k in range(20):  # The history after each step.
        steps = np.arange(0, k + 1, every)[-5:]
        after = monitoring.history(states, index=k)
        assert_like_list(after, steps, plain["weights"], plain["losses"])


def test_vmap_over_runs_and_reading_one_of_them(plain):
    tx = monitoring.record(length=3)
    params, losses = start(), [plain["losses"][k] for k in range(4)]
    losses = jax.tree.map(lambda *x: np.stack(x), *losses)

    def run(scale):
        scaled = jax.tree.map(lambda x: scale * x, losses)
        step = lambda s, x: (tx.update(params, s, params, losses=x)[1], None)
        return jax.lax.scan(step, tx.init(params), scaled)[0]

    states = jax.jit(jax.vmap(run))(jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"leading axes \(2,\): give index= with 1"):
        monitoring.history(states)
    for index, scale in enumerate((1.0, 2.0)):
        seen = monitoring.history(states, index=index)
        assert seen.steps.tolist() == [1, 2, 3]
        np.testing.assert_allclose(seen.losses["fit"], scale * losses["fit"][1:])
    with pytest.raises(ValueError, match=r"leading axes \(\): leave out index="):
        monitoring.history(tx.init(params), index=0)


def test_nothing_leaves_the_device_inside_a_step():
    tx = chained(length=100, every=10)
    params = start()
    state = tx.init(params)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    batch = jax.device_put(batch_at(0))
    compiled = step.lower(params, state, batch).compile()
    text = compiled.as_text() or ""
    assert "dynamic-update-slice" in text
    for word in ("custom-call", "callback", "infeed", "outfeed", " send(", " recv("):
        assert word not in text
    # No second copy of the ring either: it is written in place.
    assert not re.search(r"f32\[101,9\]\S* copy\(", text)
    with jax.transfer_guard("disallow"):
        state = compiled(params, state, batch)[1]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@needs_devices
def test_replicas_of_pmap_are_identical(plain):
    tx = chained()
    params = start()
    replicate = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tree)
    params, state = jax.jit(replicate)((params, tx.init(params)))
    step = jax.pmap(make_step(tx, "devices"), axis_name="devices")
    split = lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
    for k in range(10):
        batch = jax.tree.map(lambda x: split(x[k]), problem()[1])
        params, state = step(params, state, batch)
    first = monitoring.history(state, index=0)
    for replica in range(1, DEVICES):
        chex.assert_trees_all_equal(
            monitoring.history(state, index=replica)[:5], first[:5]
        )
    assert_like_list(first, np.arange(2, 10), plain["weights"], plain["losses"])


class Elsewhere:
    """An array that is on the devices of other processes too."""

    is_fully_addressable = False

    def __init__(self, value, replicated):
        self.value, self.is_fully_replicated = value, replicated

    def addressable_data(self, index):
        return self.value if index == 0 else None


def test_of_several_processes_each_reads_its_own_copy():
    state = monitoring.record(length=3).init(start())
    elsewhere = lambda replicated: jax.tree.map(
        lambda x: Elsewhere(x, replicated), state
    )
    seen = monitoring.history(elsewhere(True))
    assert (seen.steps.size, list(seen.loss_weights)) == (0, list(NAMES))
    with pytest.raises(ValueError, match="spread over several processes: gather"):
        monitoring.history(elsewhere(False))


@needs_devices
def test_shard_map_equals_one_device(plain):
    tx = chained()
    params = start()
    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(SPEC(), SPEC(), SPEC("devices")),
        out_specs=(SPEC(), SPEC()),
    )
    def step(params, state, batch):
        def objective(params):
            losses = jax.lax.pmean(loss_fn(params["w"], batch), "devices")
            return yoto.composite_loss(losses, params["mu"]), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for k in range(10):
        params, state = step(params, state, batch_at(k))
    for leaf in jax.tree.leaves(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])
    seen = monitoring.history(state)
    assert_like_list(seen, np.arange(2, 10), plain["weights"], plain["losses"])


def test_in_multi_steps_a_row_is_an_optimizer_step(plain):
    params = start()
    tx = optax.MultiSteps(chained(length=4), 3)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(7):
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = update(grads, state, params, losses=plain["losses"][k])
    seen = monitoring.history(state)
    np.testing.assert_array_equal(seen.steps, [0, 1])
    np.testing.assert_allclose(seen.losses["fit"], _of(plain, "losses", "fit", [2, 5]))
    np.testing.assert_allclose(seen.data_gradient, np.sqrt(2), rtol=1e-6)


def _of(plain, kind, name, steps):
    return [float(plain[kind][k][name]) for k in steps]


def test_in_front_of_multi_steps_a_row_is_a_batch():
    params = start()
    tx = optax.chain(monitoring.record(length=4), optax.MultiSteps(optax.sgd(0.1), 3))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = update(grads, state, params)
    assert monitoring.history(state).steps.tolist() == [1, 2, 3, 4]


def test_inject_hyperparams(plain):
    static = ("length", "entropy")
    make = optax.inject_hyperparams(monitoring.record, static_args=static)
    params = start()
    tx = make(length=4, every=2, hyperparameter_decay=0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        _, state = update(optax.tree.ones_like(params), state, params)
    seen = monitoring.history(state)
    np.testing.assert_array_equal(seen.steps, [0, 2, 4])
    np.testing.assert_allclose(seen.prior_gradient, 0.5 * plain["pulls"][0], rtol=1e-6)
    assert seen.losses == {}
    with pytest.raises(TypeError, match="length must be an integer.*static_args"):
        optax.inject_hyperparams(monitoring.record)(length=4).init(params)


def test_numbers_without_rho_losses_or_a_whole_regulariser():
    params = start()
    grads = optax.tree.ones_like(params)

    def seen(**options):
        tx = monitoring.record(length=4, **options)
        with jax.debug_nans(True):  # What is not there is not NaN on the device.
            _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        return monitoring.history(state)

    assert seen().prior_gradient is None
    assert seen().prior_weights == ()
    assert seen(hyperparameter_decay=0.0).prior_weights == ()
    assert seen(hyperparameter_decay=0.0).prior_gradient.tolist() == [0.0]
    auxiliary = seen(hyperparameter_decay=1.0, entropy="auxiliary")
    assert auxiliary.prior_weights == ()
    logits = np.array([0.0, *np.asarray(params["mu"].learned)], np.float64)
    learned = np.array([False, True, True])
    pull = paper.regularizer_gradient(logits, learned, "auxiliary")
    np.testing.assert_allclose(auxiliary.prior_gradient, [np.linalg.norm(pull)], 1e-6)


@pytest.mark.parametrize("count", [2, 3, 6, 40])
def test_prior_weights_are_those_of_the_regulariser_alone(count):
    def alone(primary):
        mu = yoto.init_loss_logits([0.0] * count, primary, epsilon=0.2)
        state = monitoring.record(length=4, hyperparameter_decay=1.0).init(mu)
        (weights,) = monitoring.history(state).prior_weights
        assert list(weights) == [str(k) for k in range(count)]
        return np.array(list(weights.values()))

    np.testing.assert_allclose(alone(None), 1 / count)
    weights = alone(1)
    assert weights.sum() == pytest.approx(1)
    mu, learned = np.log(weights / weights[1]), np.arange(count) != 1
    np.testing.assert_allclose(paper.regularizer_gradient(mu, learned), 0, atol=1e-9)
    assert mu[0] == pytest.approx(paper.minimise_regularizer(count - 1), abs=1e-6)


# Losses of every kind.


@pytest.mark.parametrize("count", [1, 40])
def test_one_loss_and_forty(count):
    losses = tuple(np.arange(count, dtype=np.float32)) if count > 1 else np.float32(0)
    primary = 0 if count > 1 else None
    params = {"mu": yoto.init_loss_logits(losses, primary, epsilon=0.1)}
    tx = monitoring.record(length=3, hyperparameter_decay=1.0)
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params, losses=losses)
    seen = monitoring.history(state)
    names = [str(k) for k in range(count)] if count > 1 else ["loss"]
    assert list(seen.loss_weights) == names
    total = 1 + 0.1 * (count - 1)
    for k, name in enumerate(names):
        weight = (0.1 if k else 1.0) / total
        np.testing.assert_allclose(seen.loss_weights[name], [weight], rtol=1e-6)
        assert seen.losses[name].tolist() == [float(k)]


def test_losses_in_bfloat16_and_of_nan():
    losses = {"a": jnp.bfloat16(1.5), "b": jnp.float16(jnp.nan)}
    params = {"mu": yoto.init_loss_logits(losses, "a")}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = monitoring.record(length=3)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params, losses=losses)
    assert updates["mu"].learned.dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    seen = monitoring.history(after)
    assert seen.losses["a"].tolist() == [1.5]
    assert np.isnan(seen.losses["b"]).all()
    assert np.isfinite([*seen.loss_weights.values(), seen.data_gradient]).all()


def test_several_loss_logits_are_all_recorded():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a", epsilon=0.5)
    nu = yoto.init_loss_logits([0.0, 0.0], 0, epsilon=0.25)
    params = {"near": {"mu": mu}, "far": nu, "none": None, "w": jnp.ones(3)}
    tx = monitoring.record(length=3, hyperparameter_decay=2.0)
    losses = [[1.0, 2.0], {"a": 3.0, "b": 4.0}]
    grads = optax.tree.ones_like(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, losses=losses)
    seen = monitoring.history(state)
    assert list(seen.losses) == ["far/0", "far/1", "near/mu/a", "near/mu/b"]
    weights = np.concatenate(list(seen.loss_weights.values()))
    np.testing.assert_allclose(weights, [0.8, 0.2, 2 / 3, 1 / 3], rtol=1e-6)
    assert np.concatenate(list(seen.losses.values())).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(seen.data_gradient, np.sqrt(2), rtol=1e-6)
    logits = [np.array([0.0, np.log(x)]) for x in (0.5, 0.25)]
    learned = np.array([False, True])
    slopes = [paper.regularizer_gradient(x, learned)[1] for x in logits]
    np.testing.assert_allclose(seen.prior_gradient, 2 * np.hypot(*slopes), rtol=1e-6)
    assert [set(group) for group in seen.prior_weights] == [
        {"far/0", "far/1"},
        {"near/mu/a", "near/mu/b"},
    ]
    with pytest.raises(ValueError, match="2 LossLogits: losses= must be a sequence"):
        tx.update(grads, state, params, losses={"a": 3.0, "b": 4.0})


# Recording with a weighting.

STEPS = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 1.0}]


@pytest.mark.parametrize(
    "make",
    [
        weightings.scale_invariant,
        lambda: weightings.normalize(weightings.dwa()),
        lambda: weightings.every(weightings.smooth(weightings.uncertainty()), 2),
    ],
)
def test_a_recorded_weighting_is_the_same_weighting(make):
    inner = make()
    outer = monitoring.recorded(inner, length=2)
    stacked = jax.tree.map(lambda *x: np.float32(x), *STEPS)

    def run(weighting):
        step = lambda state, losses: weighting.update(losses, state)[::-1]
        return jax.lax.scan(step, weighting.init(STEPS[0]), stacked)

    (plain, weights), (state, same) = jax.jit(lambda: (run(inner), run(outer)))()
    chex.assert_trees_all_equal(same, weights)
    chex.assert_trees_all_equal(state.inner, plain)
    # Wrappers and users find the weights by their name.
    chex.assert_trees_all_equal(
        optax.tree.get(state, "loss_weights"), optax.tree.get(plain, "loss_weights")
    )
    seen = monitoring.history(state)
    each = [jax.tree.map(lambda x: np.asarray(x)[k], weights) for k in range(3)]
    assert_like_list(seen, [1, 2], each, STEPS)
    assert seen.data_gradient is None
    assert seen.prior_gradient is None


def from_gradients():
    """Weights from a Gramian alone, with all that a weighting may ask for."""
    count = lambda state, spec, **_: state + 1.0
    return make_weighting(
        lambda spec: jnp.zeros((), spec.dtype),
        lambda losses, inner, spec, *, gramian: (jnp.diagonal(gramian), inner),
        needs=("gramian",),
        downstream="b",
        observe=count,
        observe_step=lambda losses, inner, spec: inner + 10.0,
    )


def test_recorded_passes_on_what_a_weighting_asks_for():
    inner = weightings.every(from_gradients(), 2)
    outer = monitoring.recorded(inner)
    assert (outer.downstream, outer.needs) == ("b", ("losses", "gramian"))
    state, update = outer.init(STEPS[0]), jax.jit(outer.update)
    due = []
    for losses in STEPS:
        due.append(bool(outer.due(state)))
        _, state = update(losses, state, gramian=jnp.eye(2))
        state = outer.observe(state, cotangent_norm=1.0, gradient_norm=1.0)
        state = outer.observe_step(losses, state)
    assert due == [True, False, True]
    assert float(state.inner.inner.inner) == 33.0
    seen = monitoring.history(state)
    assert seen.downstream == "b"
    assert seen.steps.tolist() == [0, 1, 2]
    silent = monitoring.recorded(weightings.equal())
    assert (silent.due, silent.observe, silent.observe_step) == (None, None, None)


def test_recorded_in_the_engine():
    weighting = monitoring.recorded(weightings.imtl_g(), length=3)
    functions = lambda w, x: {"fit": jnp.mean((x @ w - 1) ** 2), "size": jnp.sum(w**2)}
    engine = yoto.value_and_grad(functions, weighting)
    w, x = np.float32([0.5, -1.0]), np.eye(2, dtype=np.float32)
    state = jax.jit(weighting.init)(jax.eval_shape(functions, w, x))
    step = jax.jit(chex.assert_max_traces(engine, 1), donate_argnums=1)
    weights, each = [], []
    for k in range(4):
        losses, _, state = step(w * (k + 1), state, x)
        weights.append(jax.device_get(optax.tree.get(state, "loss_weights")))
        each.append(losses)
    assert_like_list(monitoring.history(state), [1, 2, 3], weights, each)


def test_a_bad_batch_is_a_row_with_the_weights_that_were_held():
    weighting = monitoring.recorded(weightings.scale_invariant(), length=5)
    state, update = weighting.init(STEPS[0]), jax.jit(weighting.update)
    for a in (2.0, np.nan):
        losses = {"a": np.float32(a), "b": jnp.bfloat16(a == 2.0)}
        _, state = update(losses, state)
    seen = monitoring.history(state)
    assert np.isnan(seen.losses["a"]).tolist() == [False, True]
    assert seen.losses["b"].tolist() == [1.0, 0.0]
    assert seen.loss_weights["a"].tolist() == [0.5, 0.5]


def test_recorded_in_a_chain_wants_the_losses():
    tx = yoto.aggregate(monitoring.recorded(from_gradients()), STEPS[0])
    w = jnp.ones(3)
    jacobian = jnp.ones((2, 3))
    state = tx.init(w)
    with pytest.raises(ValueError, match="needs the losses"):
        tx.update(jacobian, state, w)
    _, state = jax.jit(tx.update)(jacobian, state, w, losses=STEPS[0])
    assert monitoring.history((state,)).losses["b"].tolist() == [4.0]


# Where a state goes: checkpoints and frameworks.


def test_the_state_is_a_tree_of_arrays_that_checkpoints_keep(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = start()
    tx = chained(length=4)
    weighting = monitoring.recorded(weightings.imtl_l(), length=4)
    opt_state, state = tx.init(params), weighting.init(STEPS[0])
    update, observe = jax.jit(tx.update), jax.jit(weighting.update)
    for losses in STEPS:
        _, state = observe(losses, state)
        _, opt_state = update(params, opt_state, params)
    everything = (opt_state, {"nested": {"weighting": state}})
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(everything))
    target = jax.eval_shape(
        lambda: (tx.init(params), {"nested": {"weighting": weighting.init(STEPS[0])}})
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", everything)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", target)
    assert jax.tree.structure(restored) == jax.tree.structure(everything)
    chex.assert_trees_all_equal(restored, everything)
    for part in (0, 1):
        expected, again = (monitoring.history(x[part]) for x in (everything, restored))
        chex.assert_trees_all_equal(again[:3], expected[:3])
    with pytest.raises(ValueError, match="2 histories in this state, at"):
        monitoring.history(everything)


def test_linen_train_state_and_the_serialization_of_flax():
    pytest.importorskip("flax")
    from flax import serialization
    from flax.training.train_state import TrainState

    import yoto_jax.linen  # noqa: F401 (teaches Flax what LossLogits are)

    params = start()
    tx = chained(length=4)
    make = lambda: TrainState.create(apply_fn=None, params=params, tx=tx)
    state = make()
    apply = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    for _ in range(6):
        state = apply(state)
    seen = monitoring.history(state)
    assert seen.steps.tolist() == [2, 3, 4, 5]
    assert seen.losses == {}
    again = serialization.from_bytes(make(), serialization.to_bytes(state))
    chex.assert_trees_all_equal(monitoring.history(again)[:2], seen[:2])


def test_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    from yoto_jax.nnx import CompositeLoss

    losses = {"a": np.float32(1.0), "b": np.float32(2.0)}
    model = CompositeLoss(losses, "a")
    tx = optax.chain(monitoring.record(length=4), yoto.sgdw(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: m(losses))(model)
        optimizer.update(model, grads, losses=losses)

    logits = []
    for _ in range(3):
        logits.append(float(model.loss_logits.get_value().learned[0]))
        step(model, optimizer)
    for state in (optimizer, optimizer.opt_state):
        seen = monitoring.history(state)
        weights = 1 / (1 + np.exp(-np.array(logits)))
        np.testing.assert_allclose(seen.loss_weights["b"], weights, rtol=1e-6)
        assert seen.losses["b"].tolist() == [2.0] * 3


def test_losses_may_come_and_go(plain):
    tx = monitoring.record(length=4)
    params, losses = start(), plain["losses"][0]
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(params, state, params)
    assert monitoring.history(state).losses == {}
    _, state = update(params, state, params, losses=losses)
    seen = monitoring.history(state)
    np.testing.assert_array_equal(seen.losses["fit"], [np.nan, losses["fit"]])


def test_optax_maps_over_the_parameters_in_the_state():
    params = start()
    tx = chained()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert jax.tree.structure(mapped[0]) == jax.tree.structure(state[0])
    chex.assert_trees_all_equal(mapped[0], state[0])


# What is said.


@pytest.fixture(scope="module")
def train():
    """The small problem, for 300 steps: one program for each optimizer."""
    params, batches = problem()

    def run(optimizer, rate, rho, scale):
        record = monitoring.record(length=300, hyperparameter_decay=rho)
        tx = optax.chain(record, optimizer(rate, hyperparameter_decay=rho))

        def step(carry, batch):
            params, state = carry

            def objective(p):
                losses = loss_fn(p["w"], batch)
                losses = {name: scale[name] * x for name, x in losses.items()}
                return yoto.composite_loss(losses, p["mu"]), losses

            grads, losses = jax.grad(objective, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), None

        def many(carry, _):
            return jax.lax.scan(step, carry, batches)[0], None

        carry = jax.lax.scan(many, (params, tx.init(params)), None, 15)[0]
        return carry[1]

    optimizers = {"sgdw": yoto.sgdw, "adamw": functools.partial(yoto.adamw, b2=0.9)}
    programs = {
        name: jax.jit(functools.partial(run, optimizer))
        for name, optimizer in optimizers.items()
    }

    def train(optimizer, rho, rate=0.02, **scale):
        scale = {name: scale.get(name, 1.0) for name in NAMES}
        return monitoring.history(programs[optimizer](rate, rho, scale))

    return train


@pytest.mark.parametrize(("optimizer", "rho"), [("sgdw", 0.3), ("adamw", 10.0)])
def test_a_healthy_run_is_left_alone(optimizer, rho, train):
    assert monitoring.check(train(optimizer, rho)) == []


def test_a_collapsed_weight_is_reported(train):
    seen = train("adamw", 0.01, rate=0.1, smooth=20.0)
    assert seen.loss_weights["smooth"][0] > 0.05
    found = monitoring.check(seen, last=30)
    (finding,) = [f for f in found if f.kind == "collapsed"]
    assert "smooth" in finding.losses
    assert "fit" not in finding.losses
    for words in ("'smooth' ", "last 30 rows (steps 270 to 299)", "Raise hyper"):
        assert words in finding.message


@pytest.mark.parametrize(("optimizer", "rho"), [("sgdw", 40.0), ("adamw", 100.0)])
def test_a_regulariser_that_decides_alone_is_reported(optimizer, rho, train):
    (finding,) = monitoring.check(train(optimizer, rho))
    assert (finding.kind, finding.losses) == ("prior", NAMES)
    for words in ("'fit' 0.7", "Lower hyperparameter_decay", "of the losses 0.0"):
        assert words in finding.message


def test_the_gradients_alone_do_not_tell_who_decides(train):
    """Adam and momentum enlarge the push of the losses before the two meet."""
    seen = train("adamw", 10.0)
    ratio = np.median(seen.prior_gradient[-100:]) / np.median(seen.data_gradient[-100:])
    assert ratio > 10
    assert monitoring.check(seen) == []


def test_losses_of_unlike_scales_are_reported(train):
    (finding,) = monitoring.check(train("adamw", 10.0, smooth=1e5))
    assert (finding.kind, finding.losses[0]) == ("scale", "smooth")
    for words in ("'smooth' is", "times in scale", "yoto.weightings.normalize"):
        assert words in finding.message


def made(weights, losses=None, n=50, **more):
    """A history with rows all alike, or as given."""
    fill = lambda named: {
        name: np.broadcast_to(np.float32(x), n) for name, x in named.items()
    }
    return monitoring.History(np.arange(n), fill(weights), fill(losses or {}), **more)


def kinds(seen, **limits):
    return [finding.kind for finding in monitoring.check(seen, **limits)]


def test_false_alarms_that_are_not_given():
    now_and_then = np.where(np.arange(50) % 3 > 0, 0.0, 0.5)
    assert kinds(made({"a": now_and_then, "b": 1 - now_and_then})) == []
    # A downstream loss has no weight, a balanced loss a small one.
    assert kinds(made({"a": 1.0, "b": 0.0}, downstream="b")) == []
    assert kinds(made({"a": 1.0, "b": 1e-6}, {"a": 1.0, "b": 1e6})) == []
    # A loss of 0 has no scale, and a loss that only steers is not weighed.
    assert kinds(made({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0})) == []
    steering = made({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1e9}, downstream="b")
    assert kinds(steering) == []
    # A few bad batches, a single loss, a run that has just begun.
    few = np.where(np.arange(50) % 20 == 0, np.nan, 1.0)
    assert kinds(made({"a": 0.5, "b": 0.5}, {"a": few, "b": 1.0})) == []
    assert kinds(made({"a": 1.0}, {"a": 1.0}, prior_weights=({"a": 1.0},))) == []
    assert kinds(made({"a": 1.0, "b": 0.0}, n=9)) == []
    assert kinds(made({"a": 1.0, "b": -0.7}, {"a": 1.0, "b": 1.0})) == []


def test_alarms_and_their_limits():
    assert kinds(made({"a": 1.0, "b": 1e-6})) == ["collapsed"]
    assert kinds(made({"a": 1.0, "b": 2e-4})) == []
    assert kinds(made({"a": 1.0, "b": 1e-6}, {"a": 1.0, "b": 1.0})) == [
        "collapsed",
        "scale",
    ]
    unlike = made({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 5e3})
    assert kinds(unlike) == ["scale"]
    assert kinds(made({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 9e2})) == []
    pinned = made({"a": 0.6, "b": 0.4}, prior_weights=({"a": 0.61, "b": 0.39},))
    assert kinds(pinned) == ["prior"]
    apart = made({"a": 0.6, "b": 0.4}, prior_weights=({"a": 0.65, "b": 0.35},))
    assert kinds(apart) == []
    bad = np.where(np.arange(50) % 5 == 0, np.inf, 1.0)
    assert kinds(made({"a": 0.5, "b": 0.5}, {"a": bad, "b": 1.0})) == ["not finite"]
    lost = np.where(np.arange(50) < 37, 0.5, np.nan)
    (finding,) = monitoring.check(made({"a": lost, "b": 0.5}))
    assert finding.losses == ("a",)
    assert "since step 37" in finding.message
    late = np.where(np.arange(50) < 20, 0.5, 1e-6)
    assert kinds(made({"a": late, "b": 0.5})) == []
    assert kinds(made({"a": late, "b": 0.5}), last=30) == ["collapsed"]
    # Everything is lost: something is said, and nothing fails.
    gone = made({"a": np.nan, "b": np.nan}, {"a": np.nan, "b": np.inf})
    assert kinds(gone) == ["not finite", "not finite"]
    many = made({"a": 1.0} | {f"loss {k}": 0.0 for k in range(40)})
    assert "and 34 more" in monitoring.check(many)[0].message


def run_recorded(weighting, curves, **options):
    """The history of a weighting that is shown these losses in one compiled loop."""
    recorded = monitoring.recorded(weighting, **options)
    losses = {name: np.float32(x) for name, x in curves.items()}
    first = jax.tree.map(lambda x: x[0], losses)
    step = lambda state, losses: (recorded.update(losses, state)[1], None)
    run = jax.jit(lambda s: jax.lax.scan(step, s, losses)[0])
    state = run(recorded.init(first))
    return monitoring.history(state), optax.tree.get(state, "num_updates")


@pytest.mark.parametrize(
    ("weighting", "bad", "losses", "words"),
    [
        (weightings.famo(), -1.0, ("a",), "0 or less: 'a' in 39. If the method"),
        (weightings.uncertainty(), 0.0, ("a",), "0 or less: 'a' in 39. If the method"),
        (
            weightings.every(weightings.dwa(), 3),
            -1.0,
            ("a",),
            "0 or less: 'a' in 39. If the method",
        ),
        (weightings.scale_invariant(), np.inf, ("a",), "infinite: 'a' in 39. Compute"),
        (weightings.famo(lower_bounds=1.5), 1.0, ("a", "b"), "below its bound"),
    ],
    ids=["famo", "uncertainty", "every dwa", "infinite", "below the bound"],
)
def test_a_weighting_that_learns_nothing_is_reported(weighting, bad, losses, words):
    seen, updates = run_recorded(weighting, {"a": [bad] * 40, "b": [2.0] * 40})
    assert updates == 0
    assert seen.num_skipped.tolist() == list(range(1, 41))
    finding = next(x for x in monitoring.check(seen) if x.kind == "skipped")
    assert finding.losses == losses
    assert "39 of the 39 batches of steps 1 to 39 (since the start: 40 of 40)" in (
        finding.message
    )
    assert words in finding.message


def test_skipped_batches_are_judged_by_the_recent_ones_and_by_their_share():
    steps = np.arange(200)
    show = lambda bad, **more: run_recorded(
        weightings.uncertainty(),
        {"a": np.where(bad, -1.0, 1.0), "b": 1.0 + steps},
        **more,
    )[0]
    seldom = show(steps % 20 == 3)
    assert seldom.num_skipped[-1] == 10
    assert kinds(seldom) == []
    early = show(steps < 50)
    assert kinds(early) == []
    assert kinds(early, last=200) == ["skipped"]
    # Rows that lie apart count the batches between them as well.
    sparse = show(steps % 5 == 1, every=5)
    assert (sparse.losses["a"] > 0).all()
    assert sparse.num_skipped.tolist() == list(range(40))
    assert kinds(sparse) == ["skipped"]
    # One that counts nothing is left alone.
    plain = weightings.equal()
    silent = plain._replace(
        init=lambda losses: (), update=lambda losses, state: (losses, state)
    )
    recorded = monitoring.recorded(silent)
    _, state = recorded.update(STEPS[0], recorded.init(STEPS[0]))
    assert monitoring.history(state).num_skipped is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.every(w, 2),
        weightings.smooth,
        weightings.normalize,
        weightings.skip_outliers,
    ],
)
def test_recorded_inside_another_wrapper_is_warned_of(wrap):
    inside = wrap(monitoring.recorded(weightings.equal()))
    state = {"weighting": inside.init(STEPS[0])}
    with pytest.warns(UserWarning, match="recorded inside another wrapper.*'weighting"):
        monitoring.history(state)
    monitoring.history(monitoring.recorded(wrap(weightings.equal())).init(STEPS[0]))


def test_a_gradient_of_something_else_is_reported():
    losses = {"a": np.float32(2.0), "b": np.float32(1.0), "c": np.float32(0.5)}

    def run(tx, scale=1.0):
        params = {"mu": yoto.init_loss_logits(losses, "a")}
        objective = lambda p: scale * yoto.composite_loss(losses, p["mu"])

        def step(carry, _):
            params, state = carry
            grads = jax.grad(objective)(params)
            updates, state = tx.update(grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda x: jax.lax.scan(step, x, length=20)[0])
        return monitoring.history(run((params, tx.init(params)))[1])

    record, optimizer = monitoring.record(length=20), yoto.adamw(1e-3)
    first = run(optax.chain(record, optimizer))
    assert kinds(first) == []
    behind = run(optax.chain(optimizer, record))
    (finding,) = monitoring.check(behind)
    assert finding.kind == "gradient"
    ratio = np.median(behind.data_gradient / first.data_gradient)
    assert 1e-3 < ratio < 0.1
    for words in ("must be the first link", "averaged over devices"):
        assert words in finding.message
    np.testing.assert_array_equal(behind.loss_weights["b"], first.loss_weights["b"])
    assert kinds(run(optax.chain(record, optimizer), scale=64.0)) == ["gradient"]
    assert kinds(run(optax.chain(record, optimizer), scale=3.0)) == []


def test_warnings_come_once_for_each_kind_and_set_of_losses():
    seen = made({"a": 1.0, "b": 1e-6, "c": 0.5}, {"a": 1.0, "b": 1.0, "c": 1e5})
    said: set = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = monitoring.warn(seen, said=said)
        again = monitoring.warn(seen, said=said)
        monitoring.warn(made({"a": 1.0, "c": 0.0}), said=said)
    assert first == again == monitoring.check(seen)
    assert [w.category for w in caught] == [monitoring.LossWeightWarning] * 3
    assert [w.filename for w in caught] == [__file__] * 3
    with pytest.warns(monitoring.LossWeightWarning, match="'zeta' 0"):
        monitoring.warn(made({"a": 1.0, "zeta": 0.0}))
    monitoring.warn(made({"a": 1.0, "zeta": 0.0}))  # Said in this process.


# Showing it.


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def curves(count, decades=1.0):
    end = np.logspace(0, -decades, count)
    steps = np.arange(0, 100, 10)
    weights = {f"loss {k}": 0.5 * x ** (steps / 90) for k, x in enumerate(end)}
    return monitoring.History(steps, weights, {})


@pytest.mark.parametrize(
    ("count", "decades"), [(3, 1.0), (12, 1.0), (12, 3.0), (40, 3.0)]
)
def test_plot(count, decades, pyplot):
    seen = curves(count, decades)
    ax = monitoring.plot_loss_weights(seen)
    assert ax.get_yscale() == ("linear" if decades == 1 else "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss weight")
    assert len(ax.get_lines()) == count
    for line, y in zip(ax.get_lines(), seen.loss_weights.values(), strict=True):
        np.testing.assert_array_equal(line.get_data(), [seen.steps, y])
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(looks) == count
    ax.figure.canvas.draw()
    labels = ax.get_legend().get_texts() if count == 40 else ax.texts
    assert {text.get_text() for text in labels} == set(seen.loss_weights)
    extent = pyplot.Text.get_window_extent  # Without the line that leads to it.
    boxes = sorted(map(extent, labels), key=lambda box: (box.x0, box.y0))
    for low, high in itertools.pairwise(boxes):
        assert low.y1 <= high.y0 + 1 or low.x1 <= high.x0 + 1, "labels overlap"
    inside = ax.figure.bbox
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 for b in boxes)


def test_plot_on_given_axes_and_of_odd_weights(pyplot):
    _, ax = pyplot.subplots()
    seen = made({"a": 1.0, "b": 0.0, "c": np.nan}, n=1, downstream="b")
    assert monitoring.plot_loss_weights(seen, ax=ax) is ax
    assert [line.get_label() for line in ax.get_lines()] == ["a"]
    negative = monitoring.plot_loss_weights(made({"a": -0.001, "b": 1.0}))
    assert negative.get_yscale() == "linear"
    zeros = np.where(np.arange(50) % 3 > 0, 0.0, 0.5)
    monitoring.plot_loss_weights(made({"a": zeros, "b": 1e-30, "c": 0.0}))
    pyplot.gcf().canvas.draw()
    with pytest.raises(ValueError, match="no loss weights have been recorded"):
        monitoring.plot_loss_weights(made({"a": 1.0}, n=0))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'yoto_jax\[monitoring\]'"
    ):
        monitoring.plot_loss_weights(made({"a": 1.0}))


def test_scalars_reach_tensorboard_once(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    weighting = monitoring.recorded(weightings.scale_invariant(), length=3)
    state, update = weighting.init(STEPS[0]), jax.jit(weighting.update)
    since = -1
    with tensorboardx.SummaryWriter(str(tmp_path)) as writer:
        for k, losses in enumerate([*STEPS, *STEPS[::-1]]):
            _, state = update(losses, state)
            if k % 2:
                seen = monitoring.history(state)
                since = monitoring.write_scalars(seen, writer, since=since)
                assert since == k
        assert monitoring.write_scalars(seen, writer, since=since) == since
    written = events(next(tmp_path.glob("events.*")))
    a = [step["a"] for step in [*STEPS, *STEPS[::-1]]]
    assert written["loss_weights_losses/a"] == list(enumerate(a))
    assert written["loss_weights/a"] == [(k, 1 / x) for k, x in enumerate(a)]
    assert len(written) == 4


def events(path):
    """The scalars of an event file: length, checksum, protocol buffer, checksum."""
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    content, found = path.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_gradients_and_prefix_in_the_tags(plain):
    tx = chained(length=2)
    params = start()
    losses = plain["losses"][0]
    _, state = jax.jit(tx.update)(params, tx.init(params), params, losses=losses)
    calls = []

    class Writer:
        def add_scalar(self, *call):
            calls.append(call)

    assert (
        monitoring.write_scalars(monitoring.history(state), Writer(), prefix="x") == 0
    )
    tags = [tag for tag, _, _ in calls]
    assert tags == [
        *(f"x/{name}" for name in NAMES),
        *(f"x_losses/{name}" for name in NAMES),
        "x_gradients/data",
        "x_gradients/prior",
    ]
    assert {(type(value), step) for _, value, step in calls} == {(float, 0)}
    assert monitoring.write_scalars(monitoring.history(tx.init(params)), Writer()) == -1


# Errors.


def test_errors_name_what_is_wrong():
    params = start()
    tx = monitoring.record(length=3)
    state = tx.init(params)
    for make in (monitoring.record, functools.partial(monitoring.recorded, None)):
        with pytest.raises(ValueError, match="length must be positive, got 0"):
            make(length=0)
    with pytest.raises(TypeError, match=r"length must be an integer, got 2\.0"):
        monitoring.record(length=2.0)
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        monitoring.record(every=0)
    with pytest.raises(ValueError, match="hyperparameter_decay must be non-negative"):
        monitoring.record(hyperparameter_decay=-1.0)
    with pytest.raises(ValueError, match="entropy must be 'all' or 'auxiliary'"):
        monitoring.record(entropy="some")
    with pytest.raises(ValueError, match="finds no LossLogits in the parameters"):
        tx.init({"w": params["w"]})
    with pytest.raises(ValueError, match="needs the current loss logits"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="missing: 'size', 'smooth'"):
        tx.update(params, state, params, losses={"fit": 1.0})
    with pytest.raises(ValueError, match="hold 1 LossLogits and the updates 0"):
        tx.update({"w": params["w"]}, state, params)
    two = {"mu": yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")}
    with pytest.raises(ValueError, match=r"begun with \[3\] losses.*of \[2\]"):
        tx.update(two, state, two)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)\. Use vmap"):
        tx.update(batched, state, batched)
    with pytest.raises(ValueError, match="no history in this state"):
        monitoring.history(yoto.adamw(0.1).init(params))
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda s: monitoring.history(s).steps)(state)
    with pytest.raises(ValueError, match="record has seen no LossLogits"):
        monitoring.history(tx.init({}))


STATE = monitoring.recorded(weightings.equal()).init({"a": 0.0})
SEEN = made({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    "call",
    [
        monitoring.check,
        monitoring.warn,
        monitoring.plot_loss_weights,
        lambda history: monitoring.write_scalars(history, None),
    ],
    ids=["check", "warn", "plot_loss_weights", "write_scalars"],
)
@pytest.mark.parametrize("history", [STATE, None, {"a": np.ones(20)}, [], tuple(SEEN)])
def test_what_is_no_history_is_refused(call, history):
    with pytest.raises(TypeError, match=r"history\(state\) returns, got \w+\.$"):
        call(history)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: monitoring.record(every=2.5), TypeError, "every must be an integer"),
        (lambda: monitoring.record(every="2"), TypeError, "every must be an integer"),
        (lambda: monitoring.record(every=True), TypeError, "every must be an integer"),
        (lambda: monitoring.record(every=None), TypeError, "every must be an integer"),
        (lambda: monitoring.record(every=np.int64(0)), ValueError, "every must be pos"),
        (
            lambda: monitoring.record(length=True),
            TypeError,
            "length must be an integer",
        ),
        (lambda: monitoring.record(hyperparameter_decay=[1.0]), TypeError, "a number"),
        (lambda: monitoring.recorded(None), TypeError, "be a LossWeighting.*None"),
        (
            lambda: monitoring.recorded(weightings.famo),
            TypeError,
            r"must be a LossWeighting, such as yoto.weightings.equal\(\), got func",
        ),
        (lambda: monitoring.check(SEEN, last=0), ValueError, "last must be positive"),
        (lambda: monitoring.warn(SEEN, last=-5), ValueError, "last must be positive"),
        (lambda: monitoring.write_scalars(SEEN, None), TypeError, "add_scalar.*None"),
        (lambda: monitoring.history(None), ValueError, "no history in this state"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_losses_of_one_path_are_refused():
    losses = {"a/b": 0.0, "a": {"b": 0.0}}
    weighting = monitoring.recorded(yoto.weightings.equal(), length=4)
    with pytest.raises(ValueError, match="two losses have the same path 'a/b'"):
        weighting.init(losses)


# Losses that are absent from batches.


def rarely(history_of):
    """A history in which `rare` is there in every fourth of forty batches."""
    weighting = monitoring.recorded(yoto.weightings.equal(), length=40)
    state = weighting.init({"common": 0.0, "rare": 0.0})
    update = jax.jit(
        lambda state, present: weighting.update(
            {"common": 1.0, "rare": history_of(present)}, state, present=present
        )[1]
    )
    for step in range(40):
        present = {"common": jnp.asarray(True), "rare": jnp.asarray(step % 4 == 0)}
        state = update(state, present)
    return monitoring.history(state)


@pytest.mark.parametrize("absent", [0.0, np.nan])
def test_absent_losses_are_not_taken_for_bad_ones(absent):
    seen = rarely(lambda present: jnp.where(present["rare"], 2.0, absent))
    there = np.arange(40) % 4 == 0
    np.testing.assert_array_equal(seen.present["rare"], there)
    assert seen.present["common"].all()
    for known in (seen.losses, seen.loss_weights):
        np.testing.assert_array_equal(np.isfinite(known["rare"]), there)
    np.testing.assert_allclose(seen.losses["rare"][there], 2.0)
    np.testing.assert_allclose(seen.loss_weights["rare"][there], 0.5)
    assert monitoring.check(seen) == []


def test_bad_rare_losses_are_found_among_the_batches_that_have_them():
    seen = rarely(lambda present: jnp.nan)
    (finding,) = [x for x in monitoring.check(seen) if x.kind == "not finite"]
    assert finding.losses == ("rare",)
    assert "'rare' in 10" in finding.message
    small = np.where(seen.present["rare"], 1e-6, np.nan)
    weights = {"common": np.ones(40), "rare": small}
    fading = seen._replace(loss_weights=weights, losses={}, num_skipped=None)
    assert kinds(fading) == ["collapsed"]
    assert kinds(fading, last=30) == []  # Eight rows with it: too few to judge.


def test_record_has_the_weights_of_the_losses_that_are_there():
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    params = {"mu": yoto.init_loss_logits(losses, "a", epsilon=0.25)}
    tx = optax.chain(monitoring.record(hyperparameter_decay=10.0), yoto.adamw(0.1))
    state = tx.init(params)
    present = {"a": jnp.asarray(True), "b": jnp.asarray(False), "c": jnp.asarray(True)}
    loss = lambda p: yoto.composite_loss(losses, p["mu"], present=present)
    grads = jax.grad(loss)(params)
    _, state = tx.update(grads, state, params, losses=losses, present=present)
    seen = monitoring.history(state)
    np.testing.assert_allclose(seen.loss_weights["a"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(seen.loss_weights["c"], 0.2, rtol=1e-6)
    assert np.isnan(seen.loss_weights["b"]).all()
    assert np.isnan(seen.losses["b"]).all()
    mu = params["mu"]
    slope = jax.grad(lambda mu: yoto.regularizer(mu, present=present))(mu)
    wanted = 10 * jnp.linalg.norm(slope.learned)
    np.testing.assert_allclose(seen.prior_gradient, wanted, rtol=1e-5)
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda tag, *_: written.append(tag))
    monitoring.write_scalars(seen, writer)
    assert "loss_weights/a" in written
    assert "loss_weights/b" not in written


def test_several_logits_are_told_alike_what_is_there():
    losses = {"a": 1.0, "b": 2.0}
    mu = yoto.init_loss_logits(losses, "a")
    params = {"one": mu, "two": mu}
    tx = optax.chain(monitoring.record(), yoto.adamw(0.1))
    present = {"a": jnp.asarray(True), "b": jnp.asarray(False)}
    given = {"losses": [losses, losses], "present": present}
    _, state = tx.update(params, tx.init(params), params, **given)
    seen = monitoring.history(state)
    assert {name: x.item() for name, x in seen.present.items()} == {
        "one/a": True,
        "one/b": False,
        "two/a": True,
        "two/b": False,
    }


def test_several_logits_of_the_same_losses_are_told_in_their_order():
    losses = {"a": 1.0, "b": 2.0}
    mu = yoto.init_loss_logits(losses, "a")
    params = {"one": mu, "two": mu}
    tx = optax.chain(monitoring.record(), yoto.adamw(0.1))
    present = [{"a": True, "b": False}, {"a": True, "b": True}]
    given = {"losses": [losses, losses], "present": present}
    _, state = tx.update(params, tx.init(params), params, **given)
    seen = monitoring.history(state)
    assert [seen.present[f"{name}/b"].item() for name in params] == [False, True]


def test_weights_that_are_all_zero_are_drawn():
    weighting = monitoring.recorded(yoto.weightings.equal())
    losses = {"a": 1.0, "b": 1.0}
    nothing = dict.fromkeys(losses, jnp.asarray(False))
    _, state = weighting.update(losses, weighting.init(losses), present=nothing)
    _, state = weighting.update(losses, state)
    assert (
        monitoring.plot_loss_weights(monitoring.history(state)).get_yscale() == "linear"
    )
    zeros = made({"a": 0.0, "b": 0.0})
    assert monitoring.plot_loss_weights(zeros).get_yscale() == "linear"


def test_losses_that_were_not_given_are_no_bad_ones():
    losses = {"a": 1.0, "b": 2.0}
    params = {"mu": yoto.init_loss_logits(losses, "a")}
    tx = optax.chain(monitoring.record(), yoto.adamw(0.1))
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step in range(40):
        given = {"losses": losses} if step >= 20 else {}
        _, state = update(params, state, params, **given)
    seen = monitoring.history(state)
    np.testing.assert_array_equal(seen.given, np.arange(40) >= 20)
    np.testing.assert_array_equal(np.isnan(seen.losses["a"]), ~seen.given)
    assert "not finite" not in kinds(seen)
    bad = {
        name: np.where(np.arange(40) < 25, np.nan, x) for name, x in seen.losses.items()
    }
    assert "not finite" in kinds(seen._replace(losses=bad))  # Five of twenty.


def test_a_history_without_any_loss_says_so():
    seen = made(
        {"a": np.nan, "b": np.nan}, present=dict.fromkeys("ab", np.zeros(50, bool))
    )
    with pytest.raises(ValueError, match="no row has any of the losses"):
        monitoring.plot_loss_weights(seen)
