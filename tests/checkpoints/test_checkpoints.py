"""A checkpoint comes back to the last bit, or an error says why it does not."""

import contextlib
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import conditional
from yoto_jax._digests import digests

ocp = pytest.importorskip("orbax.checkpoint")

from yoto_jax.checkpoints import CheckpointError, Checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = {"a": 0.0, "b": 0.0, "c": 0.0}
TRANSFORMATIONS = {
    "sgdw": yoto.sgdw(optax.cosine_decay_schedule(0.05, 40), weight_decay=0.01),
    "adamw": yoto.adamw(0.02, hyperparameter_decay=lambda t: 1.0 + 0.1 * t),
    "partition": optax.partition(
        {"model": optax.lion(1e-2), "loss_logits": yoto.adamw(1e-2)},
        yoto.label_loss_logits,
    ),
    "by_hypergradient": yoto.by_hypergradient(yoto.adamw(0.02), 0.1),
}


def small(step=1, losses=LOSSES, primary="b"):
    """A state that is a known function of the step."""
    mu = yoto.init_loss_logits(losses, primary, epsilon=0.1 + 0.01 * step)
    return {"mu": mu, "w": jnp.arange(6.0).reshape(2, 3) * step}


def assert_same(restored, expected):
    """The same trees, bit for bit, and the same Python types."""
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


RESTORE = """
import sys, jax, yoto_jax as yoto
from yoto_jax.checkpoints import Checkpoints
params = {"mu": yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "b")}
like = jax.eval_shape(lambda: (params, yoto.adamw(0.1).init(params)))
with Checkpoints(sys.argv[1]) as checkpoints:
    step, (restored, state), data = checkpoints.restore(like)
print(step, restored["mu"], jax.tree.leaves(state)[-1].shape, data)
"""


def test_a_fresh_process_restores_loss_logits(tmp_path):
    params = {"mu": yoto.init_loss_logits(LOSSES, "b", epsilon=[0.5, 2.0])}
    with Checkpoints(tmp_path / "run") as checkpoints:
        state = (params, yoto.adamw(0.1).init(params))
        assert checkpoints.save(3, state, data={"epoch": 1})
    command = [sys.executable, "-c", RESTORE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"3 {params['mu']} (2,) {{'epoch': 1}}"


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("losses", ["dict", "tuple"])
def test_a_restored_run_continues_bit_for_bit(tx, losses, tmp_path):
    chex.clear_trace_counter()  # It counts by name, over all tests.

    def loss_fn(w, x):
        values = (jnp.mean((w - x) ** 2), jnp.mean(jnp.abs(w)), jnp.max(w) ** 2)
        return values if losses == "tuple" else dict(zip("abc", values, strict=True))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        objective = lambda p: yoto.composite_loss(loss_fn(p["w"], x), p["mu"])
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    w = jnp.linspace(-1, 1, 4)
    primary = 1 if losses == "tuple" else "b"
    params = {"w": w, "mu": yoto.init_loss_logits(loss_fn(w, w), primary)}
    state = tx.init(params)
    batches = jax.random.normal(jax.random.key(0), (20, 4))
    for x in batches[:10]:
        params, state = step(params, state, x)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, (params, state))
        abstract = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpoints.restore(abstract).state

    chex.assert_trees_all_equal(restored, (params, state))
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))
    for x in batches[10:]:
        params, state = step(params, state, x)
        restored = step(*restored, x)
    chex.assert_trees_all_equal(restored, (params, state))


class Model(NamedTuple):
    layers: list[Any]
    count: jax.Array


NUMPY = ("numpy", "scalar")


def everything():
    """A leaf of each kind, and names that are hard to tell apart."""
    weighting = yoto.weightings.gradnorm()
    return {
        "model": Model([{"w.x": jnp.ones((2, 2), jnp.bfloat16)}], jnp.int32(3)),
        "a/b": jnp.arange(3, dtype=jnp.int8),
        "a": {"b": jnp.array([True, False]), "c.d": jnp.float16(0.1)},
        "mu": yoto.init_loss_logits(LOSSES, "c"),
        "alone": yoto.init_loss_logits({"x": 0.0}, "x"),  # no entries
        "weighting": weighting.init(LOSSES),
        "moments": optax.adam(1e-3).init(jnp.zeros(2)),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), (2, 2)),
        "complex": jnp.array([1 + 2j]),
        "narrow": [jnp.arange(3, dtype="int4"), jnp.ones(2, "float8_e5m2")],
        "weak": jnp.asarray(0.25),
        "numpy": np.linspace(0, 1, 5),
        "scalar": np.float64(1 / 3),
        "numbers": [3, 0.1, True, 1j],
        "none": None,
    }


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path):
    state = everything()
    like = jax.tree.map(lambda x: type(x)() if isinstance(x, float | int) else x, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        restored = checkpoints.restore(like).state
        assert_same(restored, state)
        assert restored["weak"].weak_type
        assert not restored["model"].count.weak_type
        like = jax.eval_shape(lambda: state)
        with pytest.raises(CheckpointError, match=r"'scalar'.* is float64\[\], not"):
            checkpoints.restore(like)  # JAX knows no numbers of 64 bits.
        abstract = checkpoints.restore(like | {k: state[k] for k in NUMPY}).state
    assert_same(abstract["keys"], state["keys"])
    assert_same(abstract["moments"], state["moments"])
    numbers = [3, np.float32(0.1), True, 1j]
    assert abstract["numbers"] == numbers
    assert [x.weak_type for x in abstract["numbers"]] == [True, True, False, True]


def test_one_array_is_a_state_and_numbers_go_where_arrays_are(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jnp.arange(3))
        assert_same(checkpoints.restore(jnp.zeros(3, int)).state, jnp.arange(3))
        checkpoints.save(2, {"n": 7, "x": jnp.float32(0.5)})
        device = jax.devices()[-1]
        like = jax.device_put({"n": 0, "x": 0.0}, device)
        assert like["n"].weak_type
        restored = checkpoints.restore(like | {"x": 0.0}).state
    assert_same(restored, {"n": jax.device_put(7, device), "x": 0.5})
    assert restored["n"].devices() == {device}


def test_what_is_stored_is_plain_json_and_plain_orbax(tmp_path):
    weighting = yoto.weightings.famo()
    state = small() | {"weighting": weighting.init({"x": 0.0, "y": {"z": 0.0}})}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, data=[1, "two"])
    record = json.loads((tmp_path / "5" / "record" / "metadata").read_text())
    assert record["losses"] == {
        "mu": {"names": ["a", "b", "c"], "primary": "b"},
        "weighting": {"names": ["x", "y/z"]},
    }
    w = record["arrays"]["w"]
    assert (w["shape"], w["dtype"], len(w["digest"])) == ([2, 3], "float32", 16)
    assert (record["step"], record["data"]) == (5, [1, "two"])
    assert record["versions"]["yoto_jax"] == yoto.__version__
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "5" / "arrays")
    np.testing.assert_array_equal(arrays["w"], state["w"])


# When.


def test_steps_that_are_due_are_saved_and_the_latest_kept(tmp_path):
    with Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
        saved = [step for step in range(1, 8) if checkpoints.save(step, small(step))]
        assert saved == [2, 4, 6]
        assert checkpoints.save(7, small(7), force=True)
        assert not checkpoints.save(7, small(7), force=True)
        checkpoints.wait()
        assert checkpoints.steps() == [6, 7]
        assert checkpoints.latest_step() == 7
        assert_same(checkpoints.restore(small(), step=6).state, small(6))


def test_outside_of_its_statement_a_checkpoint_is_complete_when_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(1, small(1))
    assert Checkpoints(tmp_path).steps() == [1]
    with checkpoints:
        assert checkpoints.save(2, small(2))
    assert checkpoints.save(3, small(3))
    assert Checkpoints(tmp_path).steps() == [1, 2, 3]
    assert_same(checkpoints.restore(small()).state, small(3))


def test_starting_and_resuming_are_the_same_line(tmp_path):
    state = small()
    for run in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            step, restored, data = checkpoints.restore(state, missing="ok")
            assert (step, data) == ((0, None), (4, {"batch": 9}))[run]
            assert (restored is state) == (run == 0)
            assert checkpoints.save(4, state, data={"batch": 9}) == (run == 0)
    with pytest.raises(ValueError, match="state to start with.* 'mu/learned', 'w'"):
        checkpoints.restore(jax.eval_shape(lambda: state), missing="ok")
    with pytest.raises(ValueError, match="missing must be 'raise' or 'ok'"):
        checkpoints.restore(state, missing="fine")


def test_no_run_writes_into_the_past_of_another(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, small(10))
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            message = f"step 10 already, so step {step} cannot be saved"
            with pytest.raises(CheckpointError, match=message):
                checkpoints.save(step, small(step))
        assert checkpoints.save(11, small(11))


def test_a_state_may_be_donated_once_it_is_saved(tmp_path):
    @jax.jit
    def fill(step):
        return {"w": jnp.full((256, 512), step), "n": jnp.arange(4096.0) * step}

    step = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for number in range(1, 4):
            state = fill(number * 1.0)
            checkpoints.save(number, state)
            for _ in range(3):
                state = step(state)
        for number in range(1, 4):
            restored = checkpoints.restore(jax.eval_shape(fill, 1.0), step=number).state
            assert_same(restored, fill(number * 1.0))


def test_later_changes_on_the_host_change_nothing(tmp_path):
    array, data = np.zeros(1000), {"position": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": array}, data=data)
        array[:] = 1
        data["position"].append(2)
        restored = checkpoints.restore({"x": array})
    assert not restored.state["x"].any()
    assert restored.data == {"position": [1]}


@pytest.mark.parametrize(
    "data", [(1, 2), {1: 2}, float("nan"), {1, 2}, np.float32(1), b"x"], ids=repr
)
def test_data_that_would_not_come_back_is_refused(data, tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(TypeError, match="data must be a JSON value"),
    ):
        checkpoints.save(1, small(), data={"x": [data]})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "'x' is a str, not an array"),
        (np.array(["text"]), "'x' is an array of <U4"),
        (np.array([{}]), "'x' is an array of object"),
        (2**70, "'x' is an integer of more than 64 bits"),
        (jax.ShapeDtypeStruct((), jnp.float32), "'x' is a shape without an array"),
    ],
)
def test_leaves_that_are_no_arrays_are_refused(leaf, message, tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(TypeError, match=message),
    ):
        checkpoints.save(1, small() | {"x": leaf})


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be positive, got -1"):
        Checkpoints(tmp_path, keep=-1)
    for wrong in ({"every": 2.5}, {"every": True}, {"every": None}, {"keep": "3"}):
        (name,) = wrong
        with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
            Checkpoints(tmp_path, **wrong)
    with pytest.raises(ValueError, match="folder must be the path of a folder"):
        Checkpoints("")
    with Checkpoints(tmp_path) as checkpoints:
        for nothing in (None, {}):
            with pytest.raises(ValueError, match="like holds no arrays"):
                checkpoints.restore(nothing, missing="ok")
        with pytest.raises(ValueError, match="step must not be negative, got -2"):
            checkpoints.save(-2, small())
        with pytest.raises(ValueError, match="nothing to save"):
            checkpoints.save(1, {"x": jnp.zeros((0, 3))})
        with pytest.raises(TypeError, match="outside of jit"):
            jax.jit(lambda x: checkpoints.save(1, x))(small())


# Where.

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def mesh_of(devices, kind="Auto"):
    kind = getattr(jax.sharding.AxisType, kind)
    return jax.make_mesh((devices,), ("d",), (kind,), devices=jax.devices()[:devices])


def placed(mesh, *spec):
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def sharded(mesh):
    """Sharded parameters and keys, and replicated loss logits."""
    w = jax.random.normal(jax.random.key(0), (16, 3))
    keys = jax.random.split(jax.random.key(1), 8)
    return {
        "w": jax.device_put(w, placed(mesh, "d")),
        "half": jax.device_put(w.astype(jnp.bfloat16), placed(mesh, "d")),
        "keys": jax.device_put(keys, placed(mesh, "d")),
        "mu": jax.device_put(yoto.init_loss_logits(LOSSES, "a"), placed(mesh)),
    }


@needs_eight
def test_another_number_of_devices(tmp_path):
    state, reference = sharded(mesh_of(8)), sharded(mesh_of(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for devices in (8, 4, 1):
            like = sharded(mesh_of(devices))
            restored = checkpoints.restore(like).state
            assert_same(restored, reference)
            where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
            assert where(restored) == where(like)
            shapes = lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding
            )
            restored = checkpoints.restore(jax.tree.map(shapes, like)).state
            assert_same(restored, reference)
            assert where(restored) == where(like)
        nowhere = jax.eval_shape(lambda: reference)
        assert_same(checkpoints.restore(nowhere).state, reference)
        checkpoints.save(2, reference)  # and back
        assert_same(checkpoints.restore(state).state, state)


@needs_eight
def test_shapes_and_types_of_an_explicit_mesh(tmp_path):
    mesh = mesh_of(8, "Explicit")
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        state = sharded(mesh)
        checkpoints.save(1, state)
        for like in (state, jax.eval_shape(lambda x: x, state)):
            restored = checkpoints.restore(like).state
            assert_same(restored, state)
            types = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree)]
            assert types(restored) == types(state)


@needs_eight
def test_what_jax_may_place_as_it_likes_stays_so(tmp_path):
    state = small()  # Not committed to a device: a jitted step moves it to the batch.
    batch = jax.device_put(jnp.ones((8, 2)), placed(mesh_of(8), "d"))
    step = jax.jit(lambda state, batch: batch @ state["w"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for like in (state, jax.eval_shape(lambda: state)):
            restored = checkpoints.restore(like).state
            assert step(restored, batch).sharding.mesh.size == 8
        fixed = jax.device_put(state, jax.devices()[3])
        restored = checkpoints.restore(fixed).state
    assert restored["w"].devices() == {jax.devices()[3]}
    with pytest.raises(ValueError, match="incompatible devices"):
        step(restored, batch)


# Digests.

DTYPES = "bool int4 uint16 float8_e4m3fn bfloat16 float32 complex64"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_digests_are_the_same_on_host_and_device(dtype):
    x = jax.random.bits(jax.random.key(0), (8, 3, 2), jnp.uint8)
    x = (x % 2 if dtype == "bool" else x).astype(dtype)
    host = np.asarray(x)
    assert digests({"x": x}) == digests({"x": host})
    assert digests({"x": x}) != digests({"x": x[::-1]})
    if jax.device_count() >= 8 and dtype in ("bfloat16", "float32"):
        over_devices = jax.device_put(x, placed(mesh_of(8), "d"))
        assert digests({"x": over_devices}) == digests({"x": host})


@pytest.mark.parametrize("dtype", ["int64", "float64", "complex128"])
def test_digests_of_wide_numbers(dtype):
    with jax.enable_x64(True):
        x = jnp.linspace(-2, 2, 12, dtype=dtype).reshape(3, 4)
        assert digests({"x": x}) == digests({"x": np.asarray(x)})


def test_a_digest_sees_every_bit_and_the_order():
    x = np.random.default_rng(0).integers(0, 256, 96, np.uint8)
    seen = {digests({"x": x})["x"]}
    for bit in range(8 * len(x)):
        flipped = x.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(digests({"x": flipped.view(np.float32)})["x"])
        seen.add(digests({"x": np.roll(x, bit)})["x"])
    assert len(seen) == 8 * len(x) + len(x)


# What goes wrong.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), data={"step": step})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copied")


def refused(folder, message, like=None, step=None):
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=message) as caught,
    ):
        checkpoints.restore(small() if like is None else like, step=step)
    assert str(folder) in str(caught.value)
    return str(caught.value)


OTHERS = {
    "another loss": (
        lambda: small(losses={"a": 0.0, "b": 0.0, "d": 0.0}),
        "mu is for other losses; missing: 'd'; unexpected: 'c'",
    ),
    "one loss more": (
        lambda: small(losses=LOSSES | {"d": 0.0}),
        "mu is for other losses; missing: 'd'",
    ),
    "another primary": (
        lambda: small(primary="a"),
        "mu has another primary loss: 'b', not 'a'",
    ),
    "no primary": (
        lambda: small(primary=None),
        "mu has another primary loss: 'b', not None",
    ),
    "another shape": (
        lambda: small() | {"w": jnp.zeros((3, 2))},
        r"holds another state; 'w' is float32\[2, 3\], not float32\[3, 2\]",
    ),
    "another dtype": (
        lambda: small() | {"w": jnp.zeros((2, 3), jnp.bfloat16)},
        r"'w' is float32\[2, 3\], not bfloat16\[2, 3\]",
    ),
    "other names": (
        lambda: {"mu": small()["mu"], "v": [small()["w"]]},
        "holds another state; missing: 'v/0'; unexpected: 'w'",
    ),
}


@pytest.mark.parametrize(("like", "message"), OTHERS.values(), ids=OTHERS)
def test_another_state_is_named(like, message, saved):
    for state in (like(), jax.eval_shape(like)):
        said = refused(saved, message, state)
        assert said.endswith("Other steps: 1.")


class Reversed(NamedTuple):
    c: float = 0.0
    b: float = 0.0
    a: float = 0.0


def test_the_same_losses_in_another_order_are_not_mixed_up(saved):
    message = "mu has its losses in another order: 'a', 'b', 'c', not 'c', 'b', 'a'"
    refused(saved, message, small(losses=Reversed()))


def test_weighting_states_know_their_losses(tmp_path):
    weighting = yoto.weightings.smooth(yoto.weightings.dwa())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, weighting.init(LOSSES))
    others = weighting.init({"a": 0.0, "b": 0.0, "z": 0.0})
    refused(tmp_path, "inner is for other losses; missing: 'z'; unexpec.* 'c'", others)
    refused(tmp_path, "inner has its losses in ano", weighting.init(Reversed()))


def test_scales_of_losses_know_them(tmp_path):
    of = lambda losses: yoto.skip_outliers(optax.sgd(0.1), losses=losses)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, of({"a": 0.0, "b": 0.0}).init(jnp.zeros(2)))
    others = of({"b": 0.0, "c": 0.0}).init(jnp.zeros(2))
    refused(tmp_path, "for other losses; missing: 'c'; unexpected: 'a'", others)


def test_a_race_knows_its_weightings(tmp_path):
    arms = {name: yoto.weightings.static({"a": 1.0, "b": b}) for name, b in ARMS}
    of = lambda arms: yoto.racing.one_of(arms).init({"a": 0.0, "b": 0.0})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, of(arms))
    refused(tmp_path, "inner/0/arm high", of(dict(reversed(arms.items()))))


ARMS = (("low", 0.1), ("high", 10.0))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((conditional.LogUniform, {"gan": 0.1, "rec": 0.1}), "missing: 'gan'"),
        (
            (conditional.Uniform, {"kl": 0.1, "rec": 0.1}),
            "another kind of distribution: 'LogU",
        ),
        (
            (conditional.LogUniform, {"kl": 0.1, "rec": 10.0}),
            "another set of free weights",
        ),
    ],
)
def test_distributions_know_their_losses(other, message, tmp_path):
    high = {"kl": 10.0, "rec": 10.0}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            1, {"s": conditional.LogUniform({"kl": 0.1, "rec": 0.1}, high)}
        )
    kind, low = other
    refused(tmp_path, message, {"s": kind(low, dict.fromkeys(low, 10.0))})


def test_there_is_no_such_checkpoint(saved, tmp_path):
    refused(tmp_path / "new", "there is no checkpoint here")
    said = refused(saved, "there is no such checkpoint", step=7)
    assert said == f"{saved}/7: there is no such checkpoint. Other steps: 1, 2."


def test_folders_of_others(copied, tmp_path):
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(4, args=ocp.args.StandardSave(small()))
    refused(tmp_path / "orbax", "is no checkpoint of yoto_jax: it has no record")
    (copied / "3").mkdir()
    refused(copied, "is no checkpoint of yoto_jax")
    (copied / "2" / "record" / "metadata").write_text('{"format": "another"}')
    refused(copied, "record/metadata is not a record of yoto_jax", step=2)
    (copied / "1").rename(copied / "5")
    refused(copied, "this is the checkpoint of step 1, renamed", step=5)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match=r"file/run: the folder cannot be made"):
        Checkpoints(file / "run")


def rewrite(folder, **changes):
    """Change a record as a program that knows its digest would."""
    from yoto_jax.checkpoints._record import digest_of

    path = folder / "record" / "metadata"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(record | {"digest": digest_of(record)}))


def test_a_newer_format_is_refused(copied):
    rewrite(copied / "2", version=2, arrays="in a way that is not known yet")
    refused(copied, f"version 2; yoto_jax {yoto.__version__} knows versions up to 1")


def test_arrays_of_another_step_are_found_out(copied):
    shutil.rmtree(copied / "2" / "arrays")
    shutil.copytree(copied / "1" / "arrays", copied / "2" / "arrays")
    message = "arrays is damaged: other contents in 'mu/learned', 'w'"
    refused(copied, message)
    assert_same(Checkpoints(copied).restore(small(), step=1).state, small(1))


def damage(content, how, seed):
    if how.startswith("cut"):
        return content[: len(content) * int(how[3:]) // 100]
    generator = np.random.default_rng(seed)
    changed = bytearray(content)
    for place in generator.integers(0, len(changed), 1 if how == "flip" else 8):
        changed[place] ^= 1 << generator.integers(8)
    return bytes(changed)


def damaged(folder, expected):
    """What is said of the latest checkpoint, if it is not as it should be."""
    try:
        restored = Checkpoints(folder).restore(expected)
    except CheckpointError as error:
        return str(error)
    assert_same(restored.state, expected)
    assert restored.data == {"step": restored.step}
    return None


# Reads that are under way when another fails end when nobody waits for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["cut0", "cut50", "cut99", "flip", "flips"])
def test_damage_to_any_file_is_never_a_wrong_state(how, copied):
    expected, found = small(2), 0
    files = [x for x in sorted((copied / "2").rglob("*")) if x.stat().st_size]
    for number, file in enumerate(x for x in files if x.is_file()):
        content = file.read_bytes()
        file.write_bytes(damage(content, how, number))
        error = damaged(copied, expected)
        if error is not None:
            found += 1
            assert f"{copied}/2: " in error
            assert "Other steps: 1." in error
        file.write_bytes(content)
    assert found >= 3
    assert_same(Checkpoints(copied).restore(small()).state, expected)


def test_a_file_that_is_gone(copied):
    shutil.rmtree(copied / "2" / "arrays")
    refused(copied, "arrays cannot be read")
    shutil.rmtree(copied / "1")
    assert "No others." in refused(copied, "arrays cannot be read", step=2)


# Crashes.

SAVE_UNTIL_KILLED = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from yoto_jax.checkpoints import Checkpoints

def run(folder):
    with Checkpoints(folder, keep=2) as checkpoints:
        step = 0
        while True:
            step += 1
            state = {"w": jnp.arange(1 << 16) * 1.0 + step, "n": step}
            checkpoints.save(step, state, data=step)

folders, children = sys.argv[1:], []
for folder in folders:
    children.append(os.fork())
    if children[-1] == 0:
        run(folder)
for delay, folder, child in zip((0.0, 0.08, 0.21), folders, children):
    deadline = time.monotonic() + 20
    while not Checkpoints(folder).steps() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_run_killed_at_any_time_leaves_whole_checkpoints(tmp_path):
    folders = [tmp_path / str(run) for run in range(3)]
    subprocess.run([sys.executable, "-c", SAVE_UNTIL_KILLED, *folders], check=True)
    for folder in folders:
        with Checkpoints(folder, keep=2) as checkpoints:
            # What is older may have been under removal.
            for step in checkpoints.steps()[-2:]:
                expected = {"w": jnp.arange(1 << 16) * 1.0 + step, "n": step}
                restored = checkpoints.restore(expected, step=step)
                assert_same(restored.state, expected)
                assert restored.data == step
            assert checkpoints.save(step + 1, expected)
        assert len(checkpoints.steps()) <= 2
        assert not [*folder.glob("*tmp*")]


def test_a_reader_leaves_alone_what_is_being_written(copied):
    underway = copied / "3.orbax-checkpoint-tmp"
    underway.mkdir()
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert checkpoints.restore(small()).step == 2
        assert underway.exists()
        checkpoints.save(4, small(4))
    assert not underway.exists()


@contextlib.contextmanager
def no_file_larger_than(size):
    """What a full disk looks like to a program, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def large(step):
    noise = np.random.default_rng(step).normal(size=1 << 16)  # not to be compressed
    return {"w": jnp.asarray(noise, jnp.float32)}


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, large(1))
        checkpoints.wait()
        message = f"{tmp_path}/2: the checkpoint could not be written.*Complete: 1."
        with no_file_larger_than(1 << 16):
            checkpoints.save(2, large(2))
            with pytest.raises(CheckpointError, match=message):  # at the next save
                checkpoints.save(3, large(2))
        assert_same(checkpoints.restore(large(0)).state, large(1))
        assert checkpoints.save(4, large(4))
    assert checkpoints.steps() == [4]
    assert not [*tmp_path.glob("*tmp*")]


def test_what_went_wrong_in_training_is_not_hidden(tmp_path):
    def train():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large(1))
            raise KeyError("in training")

    with no_file_larger_than(1 << 16), pytest.raises(KeyError) as caught:
        train()
    assert "could not be written" in caught.value.__notes__[0]
    checkpoints = Checkpoints(tmp_path)
    with no_file_larger_than(1 << 16), pytest.raises(CheckpointError):
        checkpoints.save(1, large(1))
    assert checkpoints.save(1, large(1))


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(disk):
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(1, large(1))
        checkpoints.wait()
        filler = disk / "filler"
        filler.write_bytes(bytes(600_000))
        message = "2: the checkpoint could not be written.*[Nn]o space left"
        checkpoints.save(2, large(2))
        with pytest.raises(CheckpointError, match=message):
            checkpoints.wait()
        assert_same(checkpoints.restore(large(0)).state, large(1))
        filler.unlink()
        checkpoints.save(3, large(3))
    assert Checkpoints(disk).steps() == [1, 3]


def test_a_read_only_folder_can_be_restored_from(disk, saved):
    shutil.copytree(saved, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with Checkpoints(disk / "run") as checkpoints:
        assert_same(checkpoints.restore(small()).state, small(2))
        with pytest.raises(CheckpointError, match=r"not be written.*[Rr]ead-only"):
            checkpoints.save(3, small(3))
    with pytest.raises(CheckpointError, match="the folder cannot be made"):
        Checkpoints(disk / "another")


def test_orbax_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    file = yoto.checkpoints.__file__
    spec = importlib.util.spec_from_file_location("without_orbax", file)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'yoto_jax\[checkpoints"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_digest_is_that_of_its_definition():
    """Word by word in Python's integers, so that old checkpoints stay readable."""

    def expected(x):
        total, weighted = 0, 0
        for place, word in enumerate(
            np.asarray(x).reshape(-1).view(np.uint32).tolist()
        ):
            place = (place * 0x9E3779B1 + 0x7F4A7C15) % 2**32
            mixed = word ^ place
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                mixed = (mixed ^ (mixed >> shift)) * factor % 2**32
            mixed ^= mixed >> 16
            total = (total + mixed) % 2**32
            weighted = (weighted + mixed * (place | 1)) % 2**32
        return f"{total:08x}{weighted:08x}"

    x = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
    assert digests({"x": x, "j": jnp.asarray(x)}) == dict.fromkeys("xj", expected(x))
    assert digests({"x": x[::-1]})["x"] != expected(x)  # the same words elsewhere


def test_an_altered_record_is_damaged(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(3.0)}, data={"batch": 1})
    path = tmp_path / "1" / "record" / "metadata"
    record = json.loads(path.read_text())
    record["data"] = {"batch": 2}
    path.write_text(json.dumps(record))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError):
        checkpoints.restore({"a": jnp.zeros(3)})


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("shape", [(), (8,)])
def test_weak_types_come_back(tmp_path, placed, shape):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    weak = jnp.full(shape, 1.01)
    if placed:
        weak = jax.device_put(weak, jax.NamedSharding(mesh, jax.P()))
    assert weak.weak_type
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"s": weak})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore({"s": weak}).state["s"]
    assert restored.weak_type
    assert restored.sharding == weak.sharding
    assert (restored * jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored, weak)


def test_a_choice_comes_back_to_its_options(tmp_path):
    options = ("relu", "tanh")
    kind = yoto.init_choice_logits(options, probabilities=(1, 3))
    state = {"kind": kind, "hard": yoto.harden(kind), "w": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert_same(checkpoints.restore(state).state, state)
        for name, other, message in (
            (
                "kind",
                yoto.init_choice_logits(("relu", "sine")),
                "other options; missing",
            ),
            (
                "kind",
                yoto.init_choice_logits(options[::-1]),
                "options in another order",
            ),
            ("hard", yoto.HardChoice(0, options), "hard is for other options; missing"),
        ):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(state | {name: other})
