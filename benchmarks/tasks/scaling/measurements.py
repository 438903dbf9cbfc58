"""What the scaling benchmark measures: devices, traffic, memory, time, crashes."""

import functools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.results import Record, describe, record
from benchmarks.harness.terminal import track
from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.scaling import collectives, processes, task
from yoto_jax import weightings

VIRTUAL_DEVICES = 8
LIMIT = 1e-5
"""How far a run on many devices may be from the run on one, float32."""


class Size(NamedTuple):
    """How much is done."""

    steps: int  # of the runs that are compared
    devices: tuple[int, ...]
    batch: int  # of the timed steps
    rounds: int
    processes: tuple[int, ...]
    process_steps: int
    trials: int  # of killed runs
    soak: int  # steps
    sample: bool = False  # whether a method of each kind stands for all

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the methods that are measured."""
        return [name for name in names if not self.sample or name in SAMPLE]


SAMPLE = ("plain", "yoto", "upgrad", "gradnorm, all parameters, none kept")
"""Learned weights, and weightings by gradients that are kept and that are not. Nearly
all the time of the benchmark is compilation, of every method in every way."""


# Devices: the same run.


def compare_devices(size: Size) -> list[Record]:
    """Differences from the run on one device, and whether replicas agree."""
    drawn = task.batches(size.steps, 128)
    records = []
    for name in track(size.of(task.COMPARED), "devices"):
        method = task.METHODS[name]()
        reference = task.run(task.one_device(method), method, drawn)
        for way, make in task.WAYS.items():
            for count in size.devices:
                devices = jax.devices()[:count]
                if len(devices) < count:
                    continue
                outcome = task.run(make(method, devices), method, drawn)
                put = functools.partial(record, name, config=way, domain=str(count))
                records += [
                    put("difference", task.difference(outcome, reference)),
                    put("identical", outcome.identical),
                ]
    return records


# Collectives: what is sent.

LEFT_OUT = {
    "static": "as equal",
    "ntk": "its kernel is the user's",
    "modo": "its second batch is the user's",
    "sdmgrad": "its second batch is the user's",
}
WEIGHTINGS = {
    "weightings.yoto" if name == "yoto" else name: method
    for name, method in weightings.methods().items()
    if name not in LEFT_OUT
}
"""By their labels; "yoto" is layer 1."""


def make(method: weightings.Method) -> yoto.LossWeighting:
    steered = method.requires == "downstream"
    return method.example(task.STEERING if steered else digits.PRIMARY)


def measure_collectives(size: Size) -> list[Record]:
    """What each method sends beyond a plain step, from the compiled programs."""
    methods: dict[str, task.Method] = {"yoto": task.learned()}
    for name, weighting in WEIGHTINGS.items():
        methods[name] = task.weighted(make(weighting))
    methods["upgrad, all parameters"] = task.weighted(
        weightings.upgrad(), gradients=yoto.of_parameters()
    )
    methods["gradnorm, all parameters, none kept"] = task.weighted(
        weightings.gradnorm(), gradients=yoto.of_parameters(keep=False)
    )
    devices = jax.devices()
    plain = {
        way: sent(task.plain(), way, devices) for way in ("shard_map", "jit, Auto")
    }
    records = []
    for way, traffic in plain.items():
        records += [
            record("plain", "collectives", traffic.count, config=way),
            record("plain", "bytes", traffic.bytes, config=way),
        ]
    for name in track(size.of(methods), "collectives"):
        for way, reference in plain.items():
            extra = collectives.added(sent(methods[name], way, devices), reference)
            records += [
                record(name, "collectives", extra.count, config=way),
                record(name, "bytes", extra.bytes, config=way),
            ]
    return records


def sent(method: task.Method, way: str, devices: Sequence[Any]) -> collectives.Traffic:
    made = task.WAYS[way](method, devices)
    params = {"model": digits.init_model(jax.random.key(0))}
    with made.mesh:
        carry = made.place(method.init(params))
        batch = made.spread(task.batches(1, 128)[0])
        return collectives.traffic(made.step.lower(carry, batch).compile())


# Memory: what is held.


def measure_memory() -> list[Record]:
    """Peak bytes of a step, and of gradients kept to look at, from the programs."""
    wide = wide_model(1024)
    batch = (jnp.zeros((64, 64)), jnp.zeros((64, 10)))
    peaks = {}
    for name in ("plain", "yoto"):
        step, carry = memory_step(name, wide)
        program = jax.jit(step, donate_argnums=0).lower(carry, *batch).compile()
        peaks[name] = collectives.peak_bytes(program)
    records = [record(name, "peak bytes", peak) for name, peak in peaks.items()]
    records.append(record("yoto", "ratio of peaks", peaks["yoto"] / peaks["plain"]))
    return records + back_ends(wide, batch)


def wide_model(width: int) -> Any:
    sizes = (64, width, width, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (m, n)) / m**0.5
        for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def wide_encoder(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    del y
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])


def wide_heads(
    params: Any, z: jax.Array, x: jax.Array, y: jax.Array
) -> dict[str, jax.Array]:
    del x
    out = z @ params[2]
    return {
        "fit": jnp.mean((out - y) ** 2),
        "size": jnp.mean(jnp.abs(out)),
        "smooth": jnp.mean((out[1:] - out[:-1]) ** 2),
    }


def wide_losses(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    return wide_heads(params, wide_encoder(params, x, y), x, y)


def memory_step(name: str, model: Any) -> tuple[Callable[..., Any], Any]:
    """A step with AdamW, with constant or learned weights, and its carry."""
    params: Any = {"model": model}
    tx: optax.GradientTransformation = optax.adamw(1e-3)
    total = lambda params, losses: sum(losses.values()) / len(losses)
    if name == "yoto":
        template = dict.fromkeys(("fit", "size", "smooth"), 0.0)
        params["mu"] = yoto.init_loss_logits(template, "fit")
        tx = yoto.adamw(1e-3)
        total = lambda params, losses: yoto.composite_loss(losses, params["mu"])

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state = carry
        objective = lambda p: total(p, wide_losses(p["model"], x, y))
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, tx.init(params))


def keeps_products() -> bool:
    """Whether XLA keeps the products of the gradients that it sums up."""
    version = tuple(int(n) for n in jaxlib.__version__.split(".")[:2])
    return version < (0, 11) and jax.default_backend() == "cpu"


def back_ends(model: Any, batch: tuple[jax.Array, ...]) -> list[Record]:
    """What looking at gradients holds beyond a plain gradient, and what is promised."""
    losses = 3
    products = losses**2 if keeps_products() else 0
    whole = optax.tree.size(model) * 4
    largest = max(x.size for x in model) * 4
    last = model[-1].size * 4
    z = 4 * jax.eval_shape(wide_encoder, model, *batch).size
    upgrad, gradnorm = weightings.upgrad(), weightings.gradnorm()
    of_last = yoto.of_parameters(select=lambda params: params[-1])
    none_kept = yoto.of_parameters(keep=False)
    cases: dict[str, tuple[yoto.LossWeighting, Any, int]] = {
        "the representation": (
            upgrad,
            yoto.of_representation(wide_encoder),
            (losses + 1 + products) * z,
        ),
        "the last layer": (upgrad, of_last, (losses + products) * last),
        "all parameters": (
            upgrad,
            yoto.of_parameters(),
            losses * (whole + largest) + products * largest,
        ),
        "all, chunk_size=1": (
            upgrad,
            yoto.of_parameters(chunk_size=1),
            losses * whole + products * largest,
        ),
        "all, keep=False": (upgrad, none_kept, (2 * losses + products) * largest),
        "all, keep=False, norms": (gradnorm, none_kept, whole),
    }
    arms: dict[str, Any] = {"plain": (weightings.equal(), None, 0)} | cases
    temporary = {}
    for name, (weighting, source, _) in arms.items():
        f = wide_heads if name == "the representation" else wide_losses
        step = jax.jit(yoto.value_and_grad(f, weighting, gradients=source))
        state = weighting.init(jax.eval_shape(wide_losses, model, *batch))
        program = step.lower(model, state, *batch).compile()
        temporary[name] = program.memory_analysis().temp_size_in_bytes
    records = []
    for name, (*_, promised) in cases.items():
        extra = temporary[name] - temporary["plain"]
        records += [
            record("upgrad", "extra bytes", extra, config=name),
            record("upgrad", "promised bytes", promised, config=name),
        ]
    return records


# Speed: what it takes.

TIMED = ("plain", "yoto", "famo", "gradnorm", "upgrad", "grap")


def measure_speed(size: Size) -> list[Record]:
    """Time of a step on 1, 2, 4, 8 devices for the same batch, all in turns."""
    batch = tiled(task.batches(1, 128)[0], size.batch)
    arms: dict[tuple[str, int], tuple[task.Way, task.Carry, task.Batch]] = {}
    for name in size.of(TIMED):
        method = task.METHODS[name]()
        for count in sorted({1, *size.devices}):
            if count > jax.device_count():
                continue
            way = task.WAYS["jit, Auto"](method, jax.devices()[:count])
            params = {"model": digits.init_model(jax.random.key(0))}
            with way.mesh:
                carry = way.place(method.init(params))
            arms[name, count] = way, carry, way.spread(batch)
    times: dict[tuple[str, int], list[float]] = {arm: [] for arm in arms}
    for turn in track(range(size.rounds + 1), "speed"):
        for arm in list(arms)[:: 1 if turn % 2 else -1]:
            times[arm].append(seconds(*arms[arm]))
    records = []
    for (name, count), taken in times.items():
        kept = np.array(taken[1:])  # the first is warm-up
        alone = np.array(times[name, 1][1:])
        beside = np.array(times["plain", count][1:])
        put = functools.partial(record, name, config=describe(devices=count))
        records += [
            put("milliseconds", 1e3 * np.median(kept)),
            *quartiles(put, "of one device", kept / alone),
            *quartiles(put, "of plain", kept / beside),
        ]
    return records


def quartiles(
    put: Callable[..., Record], metric: str, ratios: np.ndarray
) -> list[Record]:
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return [
        put(metric, middle),
        put(f"{metric}, lower quartile", low),
        put(f"{metric}, upper quartile", high),
    ]


def tiled(batch: task.Batch, size: int) -> task.Batch:
    repeat = lambda x: jnp.concatenate([x] * -(-size // len(x)))[:size]
    return jax.tree.map(repeat, batch)


def seconds(way: task.Way, carry: task.Carry, batch: task.Batch, n: int = 5) -> float:
    with way.mesh:
        start = time.perf_counter()
        for _ in range(n):
            carry, _ = way.step(carry, batch)
        jax.block_until_ready(carry)
    return (time.perf_counter() - start) / n


# Processes: the same run on several.


def compare_processes(size: Size) -> list[Record]:
    """One, two, four processes with eight devices between them, one run."""
    records = []
    for name in ("yoto", "famo", "upgrad", "plain"):
        finals = {}
        for count in track(size.processes, f"processes, {name}"):
            with tempfile.TemporaryDirectory() as folder:
                arguments = worker_arguments(Path(folder), name, size.process_steps)
                together(count, VIRTUAL_DEVICES // count, arguments)
                reports = read_reports(Path(folder), count)
                finals[count] = final_arrays(Path(folder), count)
            put = functools.partial(record, name, config=describe(processes=count))
            taken = max(report["seconds_per_step"] for report in reports)
            digests = {report["digest"] for report in reports}
            records += [
                put("milliseconds", 1e3 * taken),
                put("identical", len(digests) == 1),
            ]
            if 1 in finals:
                pairs = zip(finals[count][0], finals[1][0], strict=True)
                furthest = max(task.distance(a, b) for a, b in pairs)
                records.append(put("difference", furthest))
    return records


def worker_arguments(
    folder: Path, method: str, steps: int, every: int = 50
) -> list[str]:
    return [
        *("--folder", str(folder), "--method", method),
        *("--steps", str(steps), "--every", str(every), "--timeout", "10"),
    ]


def together(count: int, devices: int, arguments: list[str]) -> list[processes.Ended]:
    """So many processes to the end, or an error that says what they wrote."""
    running = processes.start(count, devices, arguments)
    ended = processes.wait(running, timeout=600)
    if failed := [each for each in ended if each.status != 0]:
        raise RuntimeError(
            f"a process ended with {failed[0].status}:\n{failed[0].output}"
        )
    return ended


def read_reports(folder: Path, count: int) -> list[dict[str, Any]]:
    paths = [folder / f"report.{process}.json" for process in range(count)]
    return [json.loads(path.read_text()) for path in paths]


def final_arrays(folder: Path, count: int) -> list[list[np.ndarray]]:
    """The parameters and states of each process at the end."""
    found = []
    for process in range(count):
        with np.load(folder / f"final.{process}.npz") as file:
            arrays = [file[str(place)] for place in range(len(file.files))]
        found.append([x.astype(np.float64) for x in arrays])
    return found


# Crashes: a process is killed, and the run is continued.


def crash(size: Size, count: int) -> list[Record]:
    """Kill one of the processes at a random step, look at the others, continue."""
    steps, every = size.process_steps, max(2, size.process_steps // 8)
    rng = random.Random(0)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = worker_arguments(Path(folder), "yoto", steps, every)
        together(count, 1, arguments)
        expected = read_reports(Path(folder), count)[0]["digest"]
    for trial in track(range(size.trials), "crashes"):
        victim, at = rng.randrange(count), rng.randrange(2, steps)
        with tempfile.TemporaryDirectory() as folder:
            arguments = worker_arguments(Path(folder), "yoto", steps, every)
            own: list[list[str]] = [[] for _ in range(count)]
            own[victim] = ["--kill-at", str(at)]
            running = processes.start(count, 1, arguments, *own)
            ended = processes.wait(running, timeout=300)
            others = [each for place, each in enumerate(ended) if place != victim]
            delay = max(each.seconds for each in others) - ended[victim].seconds
            together(count, 1, [*arguments, "--resume"])
            reports = read_reports(Path(folder), count)
        config = describe(trial=trial, process=victim, step=at)
        clear = all(is_clear(each.output) for each in others)
        noticed = all(each.status not in (0, None) for each in others)
        put = functools.partial(record, "crash", config=config)
        records += [
            put("others ended", noticed),
            put("clear message", clear),
            put("seconds until others ended", delay),
            put("steps lost", at - reports[0]["first"]),
            put("bit for bit", all(r["digest"] == expected for r in reports)),
            put("every", every),
        ]
    return records


def is_clear(output: str) -> bool:
    """Whether a process says that another one was lost, in our words or in JAX's."""
    return "another process was lost" in output or "another task died" in output


# Soak: a hundred thousand steps.


def soak(size: Size) -> list[Record]:
    """Many steps of YOTO from Python: memory of the host, compilations, weights."""
    method = task.METHODS["yoto"]()
    way = task.one_device(method)
    carry = method.init({"model": digits.init_model(jax.random.key(0))})
    drawn = task.batches(8, 128)
    history = []
    finite = True
    for step in track(range(size.soak), "soak"):
        carry, weights = way.step(carry, drawn[step % len(drawn)])
        if step % max(1, size.soak // 50) == 0:
            finite &= all(np.isfinite(x) for x in jax.tree.leaves(weights))
            history.append(resident_bytes())
    jax.block_until_ready(carry)
    finite &= all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(carry))
    settled = np.array(history[len(history) // 10 :], float)
    put = functools.partial(record, "soak", config=describe(steps=size.soak))
    growth = settled[-1] - settled[0]
    return [
        put("compilations", way.step._cache_size()),
        put("resident MiB", settled[0] / 2**20),
        put("growth of resident MiB", growth / 2**20),
        put("finite", finite),
        *(put(f"weight:{k}", w) for k, w in weights.items()),
    ]


def resident_bytes() -> int:
    """Memory of this process that is not swapped out (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
