"""What a step costs with each weighting, in time, memory and compilation."""

import functools
import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.results import Record, record
from benchmarks.harness.terminal import track
from benchmarks.harness.units import Units
from benchmarks.models import small
from benchmarks.models.small import NAMES, Losses, Shared, heads
from benchmarks.tasks.overhead import peers
from benchmarks.tasks.overhead.methods import (
    FIXED,
    FULL,
    GRADIENT_DRIVEN,
    LOSS_DRIVEN,
    MEASURED,
)

Array = jax.Array


def make(name: str) -> yoto.LossWeighting:
    """A weighting for the losses of the models; "class" steers, "fit" leads."""
    method = MEASURED[name]
    return method.example("class" if method.requires == "downstream" else "fit")


TRANSFORMER, RESIDUAL = "transformer, 2 layers", "residual net"
SHARED = {
    TRANSFORMER: peers.problem(),
    RESIDUAL: small.residual(32, 4, batch=16, side=16),
}
SMALL = {"small net": small.with_heads(small.mlp(16, 32, 8, batch=16), 8)}

SAMPLE = ("upgrad", "grap")
"""Weightings that stand for the others that look at gradients."""
QUICK = ("uncertainty", "upgrad", "grap")
UPGRAD = tuple(name for name in FULL if name.startswith("upgrad"))
BLOCK = 0.06
"""Seconds that are timed at once: some steps."""
PATIENCE = 1.0
"""Seconds for all steps of a weighting that makes them very slow."""


def kinds(name: str) -> dict[str, tuple[str, ...]]:
    """The weightings that are timed with this model, by what they look at.

    Each is timed with one model at least: those that look at gradients with the one
    that TorchJD is timed with, the others with the one that compiles fast.
    """
    few = {
        TRANSFORMER: ((), GRADIENT_DRIVEN, FULL),
        RESIDUAL: (LOSS_DRIVEN, SAMPLE, UPGRAD),
        "small net": (QUICK, QUICK, UPGRAD),
    }
    of_losses, of_gradients, of_all = few[name]
    found = {
        "fixed weights": ("fixed", "fixed again"),
        "driven by losses": tuple(n for n in LOSS_DRIVEN if n in of_losses),
        "driven by gradients": tuple(n for n in GRADIENT_DRIVEN if n in of_gradients),
        "gradients of all parameters": tuple(of_all),
    }
    return {kind: arms for kind, arms in found.items() if arms}


def arms_of(model: Shared) -> dict[str, tuple[Any, Any]]:
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
    of_z = yoto.of_representation(model.encoder)
    for name in MEASURED:
        weighting = make(name)
        if weighting.needs == ("losses",):
            value_and_grad = yoto.value_and_grad(full, weighting)
        else:
            value_and_grad = yoto.value_and_grad(heads, weighting, gradients=of_z)
        arms[name] = value_and_grad, weighting.init(like)
    for name, source in FULL.items():
        weighting = make(name.split(",")[0])
        value_and_grad = yoto.value_and_grad(full, weighting, gradients=source)
        arms[name] = value_and_grad, weighting.init(like)
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


class Compiled(NamedTuple):
    """A compiled step, the carry it starts from, and what compiling it showed."""

    program: Any
    carry: Any
    seconds: float
    mib: float  # of temporary memory


def compiled(value_and_grad: Any, state: Any, model: Shared, x: Array) -> Compiled:
    """A training step, compiled."""
    step, carry = build(value_and_grad, state, model)
    start = time.perf_counter()
    program = step.lower(carry, x).compile()
    seconds = time.perf_counter() - start
    analysis = program.memory_analysis()
    mib = analysis.temp_size_in_bytes / 2**20 if analysis else np.nan
    return Compiled(program, carry, seconds, mib)


def timed(compiled: Compiled, x: Array, count: int) -> float:
    """Seconds for each of ``count`` steps, on a copy of the carry."""
    carry = jax.block_until_ready(jax.tree.map(jnp.copy, compiled.carry))
    start = time.perf_counter()
    for _ in range(count):
        carry, _ = compiled.program(carry, x)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / count


class Bench:
    """Steps of one model, each timed right beside the one with fixed weights.

    Only the ratio of such neighbours counts: a machine that slows down slows both.
    """

    def __init__(self, name: str, model: Shared, pairs: int, units: Units):
        """Nothing is compiled yet.

        Args:
          name: Of the model.
          model: What is trained.
          pairs: How often each step is timed, at most.
          units: Where finished arms are kept.
        """
        self.name, self.model = name, model
        self.pairs, self.units = pairs, units
        self.x = jax.random.normal(jax.random.key(1), model.inputs)
        self.arms = arms_of(model)

    def measure(self, arms: Sequence[str]) -> list[Record]:
        """Records of these arms, of which each is kept when it is done."""
        records = []
        for arm in track(arms, self.name):
            work = self._baseline if arm == "fixed" else self._beside
            records += self.units.do(
                f"{self.name}, {arm}", functools.partial(work, arm)
            )
        return records

    @functools.cached_property
    def _fixed(self) -> Compiled:
        return self._compile("fixed")

    @functools.cached_property
    def _count(self) -> int:
        """How many steps with fixed weights fill a block."""
        timed(self._fixed, self.x, 1)
        return max(1, min(20, int(BLOCK / timed(self._fixed, self.x, 3))))

    def _compile(self, arm: str) -> Compiled:
        return compiled(*self.arms[arm], self.model, self.x)

    def _record(self, arm: str, metric: str, value: float) -> Record:
        return record(arm, metric, value, config=self.name)

    def _of_program(self, arm: str, compiled: Compiled) -> list[Record]:
        return [
            self._record(arm, "compile seconds", compiled.seconds),
            self._record(arm, "extra MiB", compiled.mib - self._fixed.mib),
        ]

    def _baseline(self, arm: str) -> list[Record]:
        fixed = self._fixed
        size = sum(x.nbytes for x in jax.tree.leaves(fixed.carry[0])) / 2**20
        times = [timed(fixed, self.x, self._count) for _ in range(self.pairs)]
        return [
            *self._of_program(arm, fixed),
            self._record(arm, "parameters MiB", size),
            self._record(arm, "milliseconds", 1e3 * statistics.median(times)),
        ]

    def _beside(self, arm: str) -> list[Record]:
        program = self._compile(arm)
        step = timed(program, self.x, 1)  # It warms up, too.
        patience = int(PATIENCE / step)  # steps
        count = max(1, min(self._count, patience))
        pairs = min(self.pairs, max(2, patience // count))
        times, ratios = [], []
        for turn in range(pairs):
            if turn % 2:
                beside = timed(self._fixed, self.x, self._count)
                times.append(timed(program, self.x, count))
            else:
                times.append(timed(program, self.x, count))
                beside = timed(self._fixed, self.x, self._count)
            ratios.append(times[-1] / beside)
        first, median, third = np.percentile(ratios, [25, 50, 75])
        return [
            *self._of_program(arm, program),
            self._record(arm, "milliseconds", 1e3 * statistics.median(times)),
            self._record(arm, "ratio, first quartile", first),
            self._record(arm, "ratio", median),
            self._record(arm, "ratio, third quartile", third),
        ]


# Solvers alone.

SOLVED = ("nash_mtl", "upgrad", "mgda", "aligned_mtl", "pcgrad", "cagrad", "dual_proj")
SIZES = (2, 3, 11, 40)


def gramian(count: int, seed: int = 0) -> np.ndarray:
    """Gradients in conflict, whose norms differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 2 * count)) - 0.5 * rng.normal(size=2 * count)
    rows *= np.exp(rng.normal(size=(count, 1))) / np.sqrt(2 * count)
    return rows @ rows.T


def solver_times(
    method: str, rounds: int, sizes: tuple[int, ...] = SIZES
) -> list[Record]:
    """Microseconds for one call of a weighting on a Gramian."""
    records = []
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
        records.append(record(method, "solver microseconds", value, config=f"K={size}"))
    return records


# TorchJD, where it is installed.


def peer_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "torchjd")}


def peer_methods(quick: bool) -> tuple[str, ...]:
    return ("upgrad",) if quick else peers.METHODS


def peer_steps(rounds: int, quick: bool) -> list[Record]:
    """Milliseconds of TorchJD's steps beside PyTorch's plain one."""
    model = peers.problem(*((1, 2, 8) if quick else ()))
    steps = peers.steps(model, peer_methods(quick))
    times: dict[str, list[float]] = {method: [] for method in steps}
    for step in steps.values():
        step()
    for _ in track(range(rounds), "TorchJD"):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - start)
    return [
        record(
            method,
            "TorchJD milliseconds",
            1e3 * statistics.median(measured),
            config=TRANSFORMER,
        )
        for method, measured in times.items()
    ]


def peer_solvers(rounds: int, quick: bool) -> list[Record]:
    """Microseconds of TorchJD's solvers on the Gramians of ours."""
    records = []
    for method in track(peer_methods(quick), "TorchJD"):
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
            records.append(record(method, metric, value, config=f"K={size}"))
    return records
