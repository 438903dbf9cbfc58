"""What a step costs with each weighting, in time, memory and compilation."""

import functools
import importlib.metadata
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks import _common, peers
from benchmarks._models import NAMES, Losses, Shared, heads
from yoto_jax import weightings

Array = jax.Array
FIXED = dict(zip(NAMES, (0.4, 0.2, 0.3, 0.1), strict=True))


LEFT_OUT = {
    "equal": "what fixed weights are",
    "causal": "for losses in the order of time",
    "ntk": "its kernel is the user's",
    "ntk_surrogate": "as gradnorm",
    "softmax_alignment": "as grap",
    "auto_lambda": "as grap",
}
MEASURED = {
    name: method
    for name, method in weightings.methods().items()
    if name not in LEFT_OUT
}


def make(name: str) -> yoto.LossWeighting:
    """A weighting for the losses of the models; "class" steers, "fit" leads."""
    method = MEASURED[name]
    if name == "static":
        return weightings.static(FIXED)
    return method.example("class" if method.requires == "downstream" else "fit")


FULL: dict[str, dict[str, Any]] = {
    "upgrad, all parameters": {},
    "upgrad, all parameters, one at a time": {"chunk_size": 1},
    "upgrad, all parameters, none kept": {"keep_gradients": False},
    "gradnorm, all parameters, none kept": {"keep_gradients": False},
}


def arms_of(model: Shared, quick: bool) -> dict[str, tuple[Any, Any]]:
    """For each arm, ``value_and_grad`` and the first state of its weighting."""
    full = lambda params, x: heads(params, model.encoder(params, x), x)
    like = dict.fromkeys(NAMES, 0.0)

    def plain(params: Any, state: Any, x: Array) -> Any:
        def objective(params: Any) -> Any:
            losses = full(params, x)
            return sum(FIXED[name] * losses[name] for name in NAMES), losses

        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return losses, grads, state

    arms: dict[str, tuple[Any, Any]] = {
        "fixed": (plain, ()),
        "fixed again": (plain, ()),
    }
    for name in MEASURED:
        weighting = make(name)
        value_and_grad = yoto.value_and_grad(full, weighting)
        if weighting.needs != ("losses",):
            value_and_grad = yoto.value_and_grad(
                heads, weighting, encoder=model.encoder
            )
        arms[name] = value_and_grad, weighting.init(like)
    for name, options in FULL.items():
        weighting = make(name.split(",")[0])
        value_and_grad = yoto.value_and_grad(full, weighting, **options)
        arms[name] = value_and_grad, weighting.init(like)
    if quick:
        kept = ("fixed", "fixed again", "uncertainty", "upgrad", "grap", *FULL)
        arms = {name: arms[name] for name in kept}
    return arms


def build(value_and_grad: Any, state: Any, model: Shared) -> tuple[Any, Any]:
    """A training step to be compiled, and the carry it starts from."""
    tx = optax.adamw(1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: Array) -> tuple[Any, Losses]:
        params, state, opt_state = carry
        losses, grads, state = value_and_grad(params, state, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    params = model.init(jax.random.key(0))
    return step, (params, state, tx.init(params))


def timed(step: Any, carry: Any, x: Array, count: int) -> float:
    """Seconds for each of ``count`` steps, on a copy of the carry."""
    carry = jax.block_until_ready(jax.tree.map(jnp.copy, carry))
    start = time.perf_counter()
    for _ in range(count):
        carry, _ = step(carry, x)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / count


def compare(name: str, model: Shared, rounds: int, quick: bool) -> list[_common.Record]:
    """Each arm right after the step with fixed weights, in turn; all in one run."""
    x = jax.random.normal(jax.random.key(1), model.inputs)
    compiled: dict[str, tuple[Any, Any]] = {}
    records = []
    memory: dict[str, float] = {}
    for arm, (value_and_grad, state) in arms_of(model, quick).items():
        step, carry = build(value_and_grad, state, model)
        start = time.perf_counter()
        program = step.lower(carry, x).compile()
        seconds = time.perf_counter() - start
        analysis = program.memory_analysis()
        memory[arm] = analysis.temp_size_in_bytes / 2**20 if analysis else np.nan
        compiled[arm] = program, carry
        records.append(_common.record(arm, "compile seconds", seconds, config=name))
        extra = memory[arm] - memory["fixed"]
        records.append(_common.record(arm, "extra MiB", extra, config=name))
    size = sum(x.nbytes for x in jax.tree.leaves(compiled["fixed"][1][0])) / 2**20
    records.append(_common.record("fixed", "parameters MiB", size, config=name))

    count = max(1, min(20, int(0.3 / timed(*compiled["fixed"], x, 3))))
    ratios: dict[str, list[float]] = {arm: [] for arm in compiled if arm != "fixed"}
    times: dict[str, list[float]] = {arm: [] for arm in compiled}
    for arm in compiled:
        timed(*compiled[arm], x, 1)
    for turn in _common.track(range(rounds), name):
        for arm in ratios if turn % 2 else reversed(ratios):
            pair = {}
            for which in ("fixed", arm) if turn % 2 else (arm, "fixed"):
                pair[which] = timed(*compiled[which], x, count)
                times[which].append(pair[which])
            ratios[arm].append(pair[arm] / pair["fixed"])
    for arm, measured in times.items():
        value = 1e3 * statistics.median(measured)
        records.append(_common.record(arm, "milliseconds", value, config=name))
    for arm, measured in ratios.items():
        for label, value in zip(
            ("ratio, first quartile", "ratio", "ratio, third quartile"),
            np.percentile(measured, [25, 50, 75]),
            strict=True,
        ):
            records.append(_common.record(arm, label, value, config=name))
    return records


# Solvers alone.

SOLVED = ("nash_mtl", "upgrad", "mgda", "aligned_mtl", "pcgrad", "cagrad", "dual_proj")
SIZES = (2, 3, 11, 40)


def gramian(count: int, seed: int = 0) -> np.ndarray:
    """Gradients in conflict, whose norms differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 2 * count)) - 0.5 * rng.normal(size=2 * count)
    rows *= np.exp(rng.normal(size=(count, 1))) / np.sqrt(2 * count)
    return rows @ rows.T


def solver_times(rounds: int, sizes: tuple[int, ...] = SIZES) -> list[_common.Record]:
    """Microseconds for one call of a weighting on a Gramian."""
    records = []
    for method in _common.track(SOLVED, "solvers"):
        for size in sizes:
            weighting = make(method)
            losses = [1.0] * size
            state = weighting.init(losses)
            matrix = jnp.asarray(gramian(size), jnp.float32)
            # One array of weights: to unstack them is Python's work, not a solver's.
            solve = jax.jit(
                lambda g, w=weighting, s=state, x=losses: jnp.stack(
                    w.update(x, s, gramian=g)[0]
                )
            )
            jax.block_until_ready(solve(matrix))
            measured = []
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(20):
                    out = solve(matrix)
                jax.block_until_ready(out)
                measured.append((time.perf_counter() - start) / 20)
            value = 1e6 * statistics.median(measured)
            records.append(
                _common.record(method, "solver microseconds", value, config=f"K={size}")
            )
    return records


# TorchJD, where it is installed.


def peer_records(rounds: int, quick: bool) -> tuple[list[_common.Record], Any]:
    """Steps and solvers of TorchJD beside our plain step, and the versions."""
    methods = ("upgrad",) if quick else peers.METHODS
    model = peers.problem(*((1, 2, 8) if quick else ()))
    steps = peers.steps(model, methods)
    name = "transformer, 6 layers"
    times: dict[str, list[float]] = {method: [] for method in steps}
    for step in steps.values():
        step()
    for _ in _common.track(range(rounds), "TorchJD"):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - start)
    records = [
        _common.record(
            method,
            "TorchJD milliseconds",
            1e3 * statistics.median(measured),
            config=name,
        )
        for method, measured in times.items()
    ]
    for method in methods:
        for size in (2, 3) if quick else SIZES:
            solve = peers.solver(method, gramian(size).astype(np.float32))
            solve()
            measured = []
            for _ in range(rounds):
                start = time.perf_counter()
                solve()
                measured.append(time.perf_counter() - start)
            value = 1e6 * statistics.median(measured)
            metric = "TorchJD solver microseconds"
            records.append(_common.record(method, metric, value, config=f"K={size}"))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchjd")}
    return records, versions


# Tables.


def _cell(records: list[_common.Record], **wanted: Any) -> float:
    found = _common.values(records, **wanted)
    return float(found[0]) if len(found) else float("nan")


def _number(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:z,.{digits}f}"  # z: no minus zero


def step_table(result: _common.Result) -> _common.Table:
    """Time, compilation and memory of a step with each weighting."""
    records = result["records"]
    models = [
        r["config"]
        for r in _common.select(records, method="fixed", metric="milliseconds")
    ]
    measured = [r for r in records if r["metric"] == "extra MiB"]
    columns = ["weighting"]
    rows = [[arm] for arm in dict.fromkeys(r["method"] for r in measured)]
    sizes = []
    for model in models:
        get = lambda arm, metric, model=model: _cell(
            records, method=arm, metric=metric, config=model
        )
        columns += [f"{model}: step", "compile (s)", "extra memory (MiB)"]
        for row in rows:
            arm = row[0]
            quartiles = [
                get(arm, f"ratio{which}")
                for which in ("", ", first quartile", ", third quartile")
            ]
            row += [
                f"{get('fixed', 'milliseconds'):.0f} ms"
                if arm == "fixed"
                else "{:.3f} ({:.3f} to {:.3f})".format(*quartiles),
                _number(get(arm, "compile seconds"), 1),
                _number(get(arm, "extra MiB"), 1),
            ]
        sizes.append(f"{get('fixed', 'parameters MiB'):.1f} MiB ({model})")
    meta = result["meta"]
    return _common.Table(
        columns,
        rows,
        "Ratio to the step with fixed weights measured right before or after it, "
        f"median (quartiles) of {meta['pairs']} pairs, {meta['device']} "
        f"({meta['cpu_count']} cores), four losses. Methods that look at gradients use "
        "`encoder=` unless they say otherwise. Memory beyond the plain step's, from "
        "the compiled program; "
        f"parameters: {', '.join(sizes)}.",
    )


def solver_table(result: _common.Result) -> _common.Table:
    """Microseconds of a call, ours and, where measured, TorchJD's."""
    records = _common.select(result["records"], metric="solver microseconds")
    theirs = _common.select(result["records"], metric="TorchJD solver microseconds")
    sizes = dict.fromkeys(r["config"] for r in records)
    columns = ["method"]
    for size in sizes:
        columns += [f"{size} (us)", *(["TorchJD (us)"] if theirs else [])]
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        row = [method]
        for size in sizes:
            row.append(_number(_cell(records, method=method, config=size), 0))
            if theirs:
                row.append(_number(_cell(theirs, method=method, config=size), 0))
        rows.append(row)
    return _common.Table(
        columns, rows, "One call on a K x K Gramian in float32, median, same machine."
    )


def peer_table(result: _common.Result) -> _common.Table:
    """The same transformer and losses in PyTorch with TorchJD, in the same run."""
    records = result["records"]
    theirs = _common.select(records, metric="TorchJD milliseconds")
    (model,) = dict.fromkeys(r["config"] for r in theirs)
    ours = lambda method, metric: _cell(
        records, method=method, metric=metric, config=model
    )
    plain = _cell(theirs, method="plain")
    step = _number(ours("fixed", "milliseconds"), 0)
    rows = [["plain step", step, "", _number(plain, 0), "", _number(plain, 0), ""]]
    for method in peers.METHODS:
        row = [method, _number(ours(method, "milliseconds"), 0)]
        row.append(_number(ours(method, "ratio"), 2))
        for way in peers.WAYS:
            taken = _cell(theirs, method=f"{method}, {way}")
            row += [_number(taken, 0), _number(taken / plain, 2)]
        rows.append(row)
    meta = result["meta"]
    versions = [
        f"{name} {meta[key]}"
        for key, name in (("torch", "PyTorch"), ("torchjd", "TorchJD"))
        if key in meta
    ]
    return _common.Table(
        [
            "method",
            "ours (ms)",
            "overhead",
            "TorchJD, parameters (ms)",
            "overhead",
            "TorchJD, features (ms)",
            "overhead",
        ],
        rows,
        f"A step of the {model}, four losses, {meta['device']} ({meta['cpu_count']} "
        "cores), median. Ours: `encoder=`. TorchJD: `mtl_backward` to the shared "
        "parameters, as it is documented, or to the features alone, written by hand. "
        "Overhead: ratio to the plain step of the same framework."
        + (f" {', '.join(versions)}." if versions else ""),
    )
