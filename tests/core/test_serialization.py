"""State in files that are not ours: exported programs, and Flax's state dicts."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.contract.test_weightings import ROWS
from yoto_jax import conditional, monitoring, weightings
from yoto_jax.conditional._distributions import Box, Distribution

LOSSES = {"fit": 0.5, "heads": (1.0, 2.0)}
MU = yoto.init_loss_logits(LOSSES, "fit", epsilon=0.3)

# Programs in a file.


def exported(function, *args):
    """The function, once written and read again."""
    pytest.importorskip("flatbuffers")
    written = jax.export.export(jax.jit(function))(*args).serialize()
    return jax.export.deserialize(written).call


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_a_step_of_yoto_in_a_file():
    tx = yoto.adamw(0.1)

    def step(mu, opt_state, losses):
        grads = jax.grad(lambda mu: yoto.composite_loss(losses, mu))(mu)
        updates, opt_state = tx.update(grads, opt_state, mu)
        return optax.apply_updates(mu, updates), opt_state

    losses = jax.tree.map(jnp.float32, LOSSES)
    args = (MU, tx.init(MU), losses)
    same(exported(step, *args)(*args), jax.jit(step)(*args))


def test_a_step_of_a_weighting_in_a_wrapper_with_a_key_in_a_file():
    weighting = weightings.every(weightings.random(key=3), 2)
    losses = jax.tree.map(jnp.float32, LOSSES)
    state = weighting.init(losses)
    call = exported(weighting.update, losses, state)
    by_file, directly, update = state, state, jax.jit(weighting.update)
    for _ in range(3):
        weights, by_file = call(losses, by_file)
        expected, directly = update(losses, directly)
        same((weights, by_file), (expected, directly))


def test_states_of_all_weightings_and_transformations_go_into_a_file():
    states = {name: row.make("fit").init(LOSSES) for name, row in ROWS.items()}
    recorded = monitoring.recorded(weightings.yoto("fit"), length=2)
    states["recorded"] = recorded.init(LOSSES)
    schedule = optax.constant_schedule(0.1)
    chain = optax.chain(monitoring.record(length=2), yoto.adamw(schedule))
    adamw = yoto.adamw(0.1)
    learned = yoto.by_hypergradient(adamw)
    for tx in (chain, yoto.sgdw(schedule), yoto.skip_outliers(adamw), learned):
        states[f"transformation {len(states)}"] = tx.init({"w": jnp.ones(2), "mu": MU})
    same(exported(lambda x: x, states)(states), states)


def distributions(kind):
    """All that the package has, those in no list included."""
    found = [kind] if kind.__module__.startswith("yoto_jax") else []
    return found + [x for sub in kind.__subclasses__() for x in distributions(sub)]


def test_distributions_in_a_file():
    supports = [
        conditional.LogUniform({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 9.0}),
        conditional.Uniform({"a": 0.0}, {"a": 9.0}),
        conditional.Fixed((1.0, 2.0)),
        conditional.Dirichlet((1.0, 2.0)),
    ]
    same(exported(lambda x: x, supports)(supports), supports)
    bases = {Distribution, Box}
    assert {type(x) for x in supports} == {*distributions(Distribution)} - bases
    assert repr(exported(lambda x: x, supports)(supports)) == repr(supports)


def states():
    """The named tuples that a state is made of, wherever they are defined."""
    for module in pkgutil.walk_packages(yoto.__path__, "yoto_jax."):
        if module.name.split(".")[-1] not in ("linen", "nnx", "checkpoints"):
            for name, kind in vars(importlib.import_module(module.name)).items():
                named_tuple = inspect.isclass(kind) and hasattr(kind, "_fields")
                if named_tuple and kind.__module__ == module.name and "State" in name:
                    yield kind


def test_every_state_goes_into_a_file():
    every = [kind(*map(jnp.float32, range(len(kind._fields)))) for kind in states()]
    assert len(every) > 20
    same(exported(lambda x: x, every)(every), every)


def test_losses_in_a_container_of_the_users():
    class Losses(NamedTuple):
        fit: float
        size: float

    mu = yoto.init_loss_logits(Losses(0.0, 0.0), "fit")
    with pytest.raises(ValueError, match=r"unregistered type .*Losses"):
        exported(yoto.loss_weights, mu)
    jax.export.register_namedtuple_serialization(Losses, serialized_name="test.Losses")
    same(exported(yoto.loss_weights, mu)(mu), yoto.loss_weights(mu))


# Flax.


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["yoto_jax", "flax"])
def test_flax_knows_the_loss_logits_in_either_order_of_imports(first):
    pytest.importorskip("flax")
    flax = "from flax import serialization"
    code = f"""
        {flax if first == "flax" else "import sys"}
        import yoto_jax as yoto
        assert {first == "flax"} or "flax" not in sys.modules
        losses = {{"fit": 0.0, "size": 0.0}}
        tree = {{"mu": yoto.init_loss_logits(losses, "fit", epsilon=0.3)}}
        support = yoto.conditional.Dirichlet((1.0, 2.0))
        {flax}
        state = serialization.to_state_dict(tree)
        assert state["mu"].keys() == {{"learned"}}
        blank = {{"mu": yoto.init_loss_logits(losses, "fit", epsilon=0.1)}}
        print(serialization.from_state_dict(blank, state))
        written = serialization.to_bytes(tree)
        print(serialization.from_bytes(blank, written))
        print(serialization.msgpack_restore(written)["mu"]["learned"])
        state = serialization.to_state_dict(support)
        print(serialization.from_state_dict(support, state))
        import yoto_jax.linen, yoto_jax.nnx
    """
    restored = "{'mu': LossLogits(fit=None, size=-1.204)}"
    assert run(textwrap.dedent(code)).splitlines() == [
        restored,
        restored,
        "[-1.2039728]",
        "Dirichlet(0=1, 1=2)",
    ]


def test_flax_names_what_does_not_fit():
    serialization = pytest.importorskip("flax.serialization")
    with pytest.raises(ValueError, match=r"must hold \['learned'\], got \['weights'\]"):
        serialization.from_state_dict(MU, {"weights": MU.learned})
    with pytest.raises(ValueError, match="mu must hold 2 logits"):
        serialization.from_state_dict(MU, {"learned": np.zeros(3, np.float32)})


def test_flax_leaves_out_what_a_mask_has_left_out():
    serialization = pytest.importorskip("flax.serialization")
    masked = jax.tree.map(lambda _: optax.MaskedNode(), {"mu": MU})
    assert serialization.to_state_dict(masked) == {"mu": {}}
    restored = serialization.from_bytes(masked, serialization.to_bytes(masked))
    assert jax.tree.structure(restored) == jax.tree.structure(masked)
