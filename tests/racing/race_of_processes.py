"""A race for several processes: ``python race_of_processes.py PORT PROCESS PROCESSES``.

Prints which arm won, and its parameters. There are four devices in all.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

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
    arms = [{"fit": 1.0, "size": size} for size in (100.0, 10.0, 0.0, 1.0)]
    race = racing.plan(steps=40, arms=LANES, cuts=[(0.25, 2), (0.5, 1)])
    tx = optax.adam(5e-2)

    def step(lane):
        w, opt_state, weights, number = lane
        composite = lambda w: sum(weights[k] * v for k, v in loss_fn(w, x).items())
        updates, opt_state = tx.update(jax.grad(composite)(w), opt_state)
        return optax.apply_updates(w, updates), opt_state, weights, number

    step_all = jax.jit(jax.vmap(step), donate_argnums=0)
    score_all = jax.jit(jax.vmap(lambda w: -loss_fn(w, x)["fit"]))
    w = jnp.ones(3)
    lanes = racing.start((w, tx.init(w)), LANES)
    lanes = racing.spread((*lanes, racing.stack(arms), jnp.arange(LANES)))
    for rung in race.rungs:
        for _ in range(rung.steps):
            lanes = step_all(lanes)
        kept = racing.keep(lanes, score_all(lanes[0]), rung.keep)
        lanes = racing.spread(kept.lanes)
    w, _, _, arm = racing.lane(lanes, 0)
    if processes > 1:
        w, arm = multihost_utils.process_allgather((w, arm), tiled=True)
    print(jax.device_count(), int(arm), *(float(x).hex() for x in w))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
