"""A race for several processes: ``python race_of_processes.py PORT PROCESS PROCESSES``.

Prints which arm won, and its parameters. There are four devices in all.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

import yoto_jax as yoto
from yoto_jax import racing

LANES = 4


def loss_fn(w, x):
    error = x @ w - x @ jnp.arange(3.0)
    return {"fit": jnp.mean(error**2), "size": jnp.mean(w**2)}


def main(port, process, processes):
    jax.config.update("jax_num_cpu_devices", LANES // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    x = jax.random.normal(jax.random.key(1), (64, 3))
    arms = racing.portfolio("fit", steps=600)
    race = racing.plan(steps=40, arms=LANES, cuts=[(0.5, 2), (0.75, 1)])
    weighting, tx = racing.one_of(arms), optax.adam(5e-2)
    value_and_grad = yoto.value_and_grad(loss_fn, weighting)

    def step(lane):
        w, opt_state, state, key = lane
        key, of_noise = jax.random.split(key)
        noise = 0.1 * jax.random.normal(of_noise, x.shape)
        _, grads, state = value_and_grad(w, state, x + noise)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(w, updates), opt_state, state, key

    step_all = jax.jit(jax.vmap(step), donate_argnums=0)
    score_all = jax.jit(jax.vmap(lambda w: -loss_fn(w, x)["fit"]))
    w = jnp.ones(3)
    losses = {"fit": 0.0, "size": 0.0}
    key = jax.random.key(2)
    lanes = racing.start((w, tx.init(w), weighting.init(losses), key), LANES)
    lanes = racing.spread(lanes)
    for rung in race.rungs:
        for _ in range(rung.steps):
            lanes = step_all(lanes)
        kept = racing.keep(lanes, score_all(lanes[0]), rung.keep)
        lanes = racing.spread(kept.lanes)
    w, _, state, _ = racing.lane(lanes, 0)
    arm = state.arm
    if processes > 1:
        w, arm = multihost_utils.process_allgather((w, arm), tiled=True)
    print(jax.device_count(), int(arm), *(float(x).hex() for x in w))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
