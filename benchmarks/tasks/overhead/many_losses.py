"""What more losses cost: gradients of large layers, and hundreds of losses."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import yoto_jax as yoto
from benchmarks.harness.results import Record, record
from benchmarks.models import small
from benchmarks.tasks.overhead import weighting_costs as costs
from benchmarks.tasks.overhead.methods import MEASURED
from yoto_jax import weightings

Array = jax.Array

SIZES = {"large layers": (2, 8, 32), "many losses": (200,)}
SOLVERS = tuple(n for n in MEASURED if "gramian" in MEASURED[n].needs)
SOLVED = {
    200: SOLVERS,
    1000: ("mgda", "pcgrad", "gradvac"),
}
"""A thousand losses for an interior point method, and those with most rounds."""

SOURCES = {
    "kept": yoto.of_parameters(),
    "kept, one at a time": yoto.of_parameters(chunk_size=1),
    "none kept": yoto.of_parameters(keep=False),
    "none kept, one at a time": yoto.of_parameters(keep=False, chunk_size=1),
}


def model(count: int, width: int, depth: int, batch: int) -> small.Shared:
    """Dense layers, and a head with an output for each of ``count`` losses."""

    def init(key: Array) -> Any:
        keys = jax.random.split(key, depth + 1)
        sizes = itertools.pairwise([width] * (depth + 1) + [count])
        return [small.dense(k, pair) for k, pair in zip(keys, sizes, strict=True)]

    def encoder(params: Any, x: Array) -> Array:
        for layer in params[:-1]:
            x = jnp.tanh(small.linear(layer, x))
        return x

    return small.Shared(init, encoder, (batch, width))


def losses_of(params: Any, z: Array, x: Array) -> list[Array]:
    """A regression to another target for every output."""
    y = small.linear(params[-1], z)
    errors = jnp.mean((y - jnp.linspace(-1, 1, y.shape[-1]) * x[:, :1]) ** 2, axis=0)
    return [errors[k] for k in range(y.shape[-1])]


def arms_of(shared: small.Shared, count: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """The step with fixed weights, and those asked for: ``(weighting, source)``."""
    full = lambda params, x: losses_of(params, shared.encoder(params, x), x)

    def plain(params: Any, state: Any, x: Array) -> Any:
        def mean(params: Any) -> Any:
            losses = full(params, x)
            return sum(losses) / count, losses

        (_, losses), grads = jax.value_and_grad(mean, has_aux=True)(params)
        return losses, grads, state

    arms: dict[str, Any] = {"fixed": (plain, ())}
    for name, (weighting, source) in chosen.items():
        is_heads = name.endswith("representation")
        loss_fn = losses_of if is_heads else full
        step = yoto.value_and_grad(loss_fn, weighting, gradients=source)
        arms[name] = step, weighting.init([0.0] * count)
    return arms


def large(count: int) -> tuple[small.Shared, dict[str, Any]]:
    """Four layers of 1024 units, whose gradients are of 4 MiB each."""
    shared = model(count, 1024, 4, batch=256)
    weighting = weightings.imtl_g()
    chosen = {name: (weighting, source) for name, source in SOURCES.items()}
    return shared, arms_of(shared, count, chosen)


def many(count: int) -> tuple[small.Shared, dict[str, Any]]:
    """Two layers of 64 units, with the ways that hundreds of losses leave."""
    shared = model(count, 64, 2, batch=64)
    upgrad = weightings.upgrad()
    last = yoto.of_parameters(select=lambda params: params[-2])
    of_z = yoto.of_representation(shared.encoder)
    chosen = {
        "famo": (weightings.famo(), None),
        "upgrad, a shared layer": (upgrad, last),
        "upgrad, all parameters": (upgrad, SOURCES["kept"]),
        "upgrad, one at a time": (upgrad, SOURCES["none kept, one at a time"]),
        "upgrad, the representation": (upgrad, of_z),
    }
    return shared, arms_of(shared, count, chosen)


PROBLEMS: dict[str, Callable[[int], tuple[small.Shared, dict[str, Any]]]] = {
    "large layers": large,
    "many losses": many,
}


def steps(kind: str, count: int, pairs: int) -> list[Record]:
    """Time and memory of steps, each beside the one with fixed weights."""
    shared, arms = PROBLEMS[kind](count)
    x = jax.random.normal(jax.random.key(1), shared.inputs)
    compiled = {
        arm: costs.compiled(step, state, shared, x)
        for arm, (step, state) in arms.items()
    }
    fixed = compiled["fixed"]
    costs.timed(fixed, x, 1)
    number = max(1, min(20, int(costs.BLOCK / costs.timed(fixed, x, 3))))
    config = f"{kind}, K={count}"
    put = lambda arm, metric, value: record(arm, metric, value, config=config)
    records = []
    for arm, program in compiled.items():
        taken = costs.timed(program, x, 1)
        rounds = max(2, min(pairs, int(costs.PATIENCE / taken)))
        own = max(1, min(number, int(costs.PATIENCE / taken / rounds)))
        times, beside = [], []
        for _ in range(rounds):
            times.append(costs.timed(program, x, own))
            beside.append(costs.timed(fixed, x, number))
        ratios = np.divide(times, beside)
        first, median, third = np.percentile(ratios, [25, 50, 75])
        records += [
            put(arm, "many: milliseconds", 1e3 * statistics.median(times)),
            put(arm, "many: ratio, first quartile", first),
            put(arm, "many: ratio", median),
            put(arm, "many: ratio, third quartile", third),
            put(arm, "many: extra MiB", program.mib - fixed.mib),
            put(arm, "many: compile seconds", program.seconds),
        ]
    return records


def solve(method: str, count: int, patience: float = 1.0) -> list[Record]:
    """Time and memory of the weights alone, of a Gramian in conflict."""
    weighting = MEASURED[method].example(0)
    losses = [1.0] * count
    state = weighting.init(losses)
    matrix = jnp.asarray(costs.gramian(count), jnp.float32)
    # One array of weights: to unstack them is Python's work, not a solver's.
    weigh = lambda g: jnp.stack(weighting.update(losses, state, gramian=g)[0])
    program = jax.jit(weigh).lower(matrix).compile()
    times: list[float] = []
    while len(times) < 2 or (len(times) < 7 and sum(times) < patience):
        start = time.perf_counter()
        jax.block_until_ready(program(matrix))
        times.append(time.perf_counter() - start)
    analysis = program.memory_analysis()
    mib = analysis.temp_size_in_bytes / 2**20 if analysis else np.nan
    config = f"K={count}"
    return [
        record(
            method,
            "many: solve milliseconds",
            1e3 * statistics.median(times),
            config=config,
        ),
        record(method, "many: solve MiB", mib, config=config),
    ]
