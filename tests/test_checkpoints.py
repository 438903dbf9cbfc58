import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import yoto_jax as yoto

ocp = pytest.importorskip("orbax.checkpoint")

TRANSFORMATIONS = {
    "sgdw": yoto.sgdw(optax.cosine_decay_schedule(0.05, 40), weight_decay=0.01),
    "adamw": yoto.adamw(0.02, hyperparameter_decay=lambda t: 1.0 + 0.1 * t),
    "partition": optax.partition(
        {"model": optax.lion(1e-2), "loss_logits": yoto.adamw(1e-2)},
        yoto.label_loss_logits,
    ),
}


RESTORE = """
import sys, jax, optax, orbax.checkpoint as ocp, yoto_jax as yoto
params = {"mu": yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "b")}
target = jax.eval_shape(lambda: (params, yoto.adamw(0.1).init(params)))
with ocp.StandardCheckpointer() as checkpointer:
    restored, state = checkpointer.restore(sys.argv[1], target)
print(restored["mu"], optax.tree.get(state, "nu")["mu"].learned.shape)
"""


def test_a_fresh_process_restores_loss_logits(tmp_path):
    losses = {"a": 0.0, "b": 0.0, "c": 0.0}
    params = {"mu": yoto.init_loss_logits(losses, "b", [0.5, 2.0])}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, yoto.adamw(0.1).init(params)))
    command = [sys.executable, "-c", RESTORE, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{params['mu']} (2,)"


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("losses", ["dict", "tuple"])
def test_a_restored_run_continues_bit_for_bit(tx, losses, tmp_path):
    def loss_fn(w, x):
        values = (jnp.mean((w - x) ** 2), jnp.mean(jnp.abs(w)), jnp.max(w) ** 2)
        return values if losses == "tuple" else dict(zip("abc", values, strict=True))

    @jax.jit
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

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "run", abstract)

    chex.assert_trees_all_equal(restored, (params, state))
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))
    for x in batches[10:]:
        params, state = step(params, state, x)
        restored = step(*restored, x)
    chex.assert_trees_all_equal(restored, (params, state))
