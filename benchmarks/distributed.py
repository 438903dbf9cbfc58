"""Train digits on many hosts: what every one of the processes runs.

One process for each host, all with the same arguments but for ``--process``:

    python -m benchmarks.distributed --coordinator HOST:PORT --processes 2 --process 0

On Slurm, Open MPI 4 and Cloud TPU, ``--cluster`` takes their place: JAX finds out. All
devices of all hosts share each batch; every host reads its own part of it. The run
saves itself as it goes and, with ``--resume``, continues from there bit for bit.
"""

import argparse
import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.scaling import task
from yoto_jax.checkpoints import CheckpointError, Checkpoints

LOST = 75
"""Exit status when another process was lost: start all again with ``--resume``."""
BATCH = 128


class Run(NamedTuple):
    """All that a run is made of: what is saved, and restored."""

    carry: task.Carry
    step: jax.Array  # int32: how many batches have been seen
    key: jax.Array  # of all that is random on the device


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    connect(options)
    try:
        train(options)
    except (jax.errors.JaxRuntimeError, CheckpointError) as error:
        if jax.process_count() == 1 or not speaks_of_others(str(error)):
            raise
        # Whatever this process held is on disk, up to the last checkpoint. Leaving by
        # the front door would wait for the others, of which one is gone.
        who = f"process {jax.process_index()} of {jax.process_count()}"
        reason = str(error).splitlines()[0]
        say(
            f"{who} stops: another process was lost ({reason}). "
            "Start all of them again with --resume."
        )
        os._exit(LOST)


def speaks_of_others(message: str) -> bool:
    """Whether an error is about the connection to the other processes."""
    words = ("gloo", "nccl", "connection", "coordination", "heartbeat", "barrier")
    return any(word in message.lower() for word in words)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    add = options.add_argument
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which of them this is")
    add("--cluster", action="store_true", help="let JAX find out these three")
    add("--timeout", type=int, default=20, help="seconds until a lost host is noticed")
    add("--method", choices=task.METHODS, default="yoto")
    add("--steps", type=int, default=200)
    add("--every", type=int, default=50, help="steps between checkpoints")
    add("--folder", type=Path, required=True, help="for checkpoints and the report")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--kill-at", type=int, metavar="STEP", help="die there, to test the others")
    return options


def connect(options: argparse.Namespace) -> None:
    """Make one machine of all processes; alone, there is nothing to do."""
    if options.coordinator is None and not options.cluster:
        return
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        initialization_timeout=120,
        heartbeat_timeout_seconds=options.timeout,
        shutdown_timeout_seconds=options.timeout,
    )


def train(options: argparse.Namespace) -> None:
    if BATCH % jax.device_count() or BATCH % jax.process_count():
        raise SystemExit(
            f"{jax.device_count()} devices of {jax.process_count()} processes cannot "
            f"share a batch of {BATCH} evenly"
        )
    mesh = task.mesh_of(jax.devices(), "Auto")
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    shared = jax.sharding.NamedSharding(mesh, jax.P(task.AXIS))
    method = task.METHODS[options.method]()
    step = jax.jit(functools.partial(advance, method), donate_argnums=0)
    run = jax.jit(lambda: start(method), out_shardings=everywhere)()
    with Checkpoints(
        options.folder / "checkpoints", every=options.every
    ) as checkpoints:
        if options.resume:
            run = checkpoints.restore(run, missing="ok").state
        first = int(run.step)
        if first >= options.steps:
            say(f"nothing to do: the run is at step {first} of {options.steps}")
            return
        overlap = jax.default_backend() != "cpu"
        began, timed = time.monotonic(), 0
        for count, batch in enumerate(batches(first, options.steps), first + 1):
            arrays = [
                jax.make_array_from_process_local_data(shared, x, (BATCH, *x.shape[1:]))
                for x in batch
            ]
            run, losses, weights = step(run, *arrays)
            if count == options.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if not overlap:  # Virtual devices would wait for each other's threads.
                jax.block_until_ready(run)
            checkpoints.save(count, run)
            if count == first + 5:  # what came before is compilation
                jax.block_until_ready(run)
                began, timed = time.monotonic(), options.steps - count
        jax.block_until_ready(run)
        seconds = (time.monotonic() - began) / max(1, timed)
    report(options, run, first, seconds, (losses, weights))


def start(method: task.Method) -> Run:
    params = {"model": digits.init_model(jax.random.key(0))}
    return Run(method.init(params), jnp.zeros((), jnp.int32), jax.random.key(1))


def advance(
    method: task.Method, run: Run, images: jax.Array, labels: jax.Array
) -> tuple[Run, Any, Any]:
    """One step. ``jit`` sees the whole batch: means are over all hosts."""
    view = digits.stylise(jax.random.fold_in(run.key, run.step), images)
    batch = (images, jax.nn.one_hot(labels, 10), view)
    carry, losses, weights = method.step(run.carry, batch, None)
    return Run(carry, run.step + 1, run.key), losses, weights


def batches(first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This host's part of each batch. The step is all the position there is."""
    images, labels = (np.asarray(x) for x in digits.load().train)
    part = BATCH // jax.process_count()
    mine = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
    for step in range(first, last):
        chosen = np.random.default_rng([0, step]).integers(len(labels), size=BATCH)
        yield images[chosen[mine]], labels[chosen[mine]]


def report(
    options: argparse.Namespace, run: Run, first: int, seconds: float, last: Any
) -> None:
    """What a run came to: a line of every process, and a file of the first."""
    losses, weights = jax.device_get(last)
    leaves = jax.tree.leaves(run._replace(key=jax.random.key_data(run.key)))
    parts = [np.asarray(x.addressable_data(0)) for x in leaves]
    digest = hashlib.sha256(b"".join(x.tobytes() for x in parts)).hexdigest()
    process = jax.process_index()
    found = {
        "process": process,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "method": options.method,
        "first": first,
        "steps": int(run.step),
        "seconds_per_step": seconds,
        "losses": {name: float(x) for name, x in losses.items()},
        "weights": {name: float(x) for name, x in weights.items()},
        "digest": digest,
    }
    np.savez(
        options.folder / f"final.{process}.npz",
        **{str(place): x for place, x in enumerate(parts)},
    )
    (options.folder / f"report.{process}.json").write_text(json.dumps(found))
    say(json.dumps(found))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
