"""What learning the loss weights costs: a step with them against one without.

Two programs train the same model on the same batch with the same optimizer. One sums
the losses with constant weights, which XLA folds into the gradients; the other learns
them. Both run in turn within one process, and only the ratio of neighbours counts, so
that a machine that slows down slows both. A second copy of the plain program runs
along: its ratio shows what noise alone looks like.

Steps are timed as training loops call them, one by one from Python. Those so short that
the calls weigh in are also timed inside a ``scan``, where only the device's own work is
left.
"""

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import yoto_jax as yoto
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, read_json, record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.harness.units import Units
from benchmarks.models import small
from benchmarks.models.small import convolutional, mlp, transformer
from benchmarks.tasks.overhead import many_losses as many
from benchmarks.tasks.overhead import peers
from benchmarks.tasks.overhead import weighting_costs as costs
from benchmarks.tasks.overhead.methods import COMPARED, MANY_PAIRS, WAYS
from benchmarks.tasks.overhead.report import table, tables

Array = jax.Array
Model = small.Model
Losses = dict[str, Array]
WEIGHTS = {"fit": 0.5, "size": 0.3, "smooth": 0.2}


MODELS = {
    "MLP 16-32-4": mlp(16, 32, 4, batch=32),
    "MLP 64-64-64-10": mlp(64, 64, 64, 10, batch=64),
    "convolutional net": convolutional(32, 4, batch=16, side=32),
    "transformer": transformer(128, 2, heads=4, batch=8, length=64),
}
QUICK = {name: MODELS[name] for name in ("MLP 16-32-4",)}


def losses_of(outputs: Array) -> Losses:
    flat = outputs.reshape(-1, outputs.shape[-1])
    return {
        "fit": jnp.mean((flat - 1.0) ** 2),
        "size": jnp.mean(jnp.abs(flat)),
        "smooth": jnp.mean((flat[1:] - flat[:-1]) ** 2),
    }


def build(arm: str, model: Model) -> tuple[Callable[..., Any], Any]:
    """One arm's compiled step and the carry it starts from."""
    params: Any = {"model": model.init(jax.random.key(0))}
    tx: optax.GradientTransformation = optax.adamw(1e-3)
    total = lambda losses, params: sum(WEIGHTS[k] * losses[k] for k in WEIGHTS)
    if arm == "yoto":
        template = dict.fromkeys(WEIGHTS, 0.0)
        params["mu"] = yoto.init_loss_logits(template, "fit")
        tx = yoto.adamw(1e-3)
        total = lambda losses, params: yoto.composite_loss(losses, params["mu"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: Array) -> tuple[Any, Losses]:
        params, state = carry

        def objective(params: Any) -> tuple[Any, Losses]:
            losses = losses_of(model.apply(params["model"], x))
            return total(losses, params), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), losses

    return step, (params, tx.init(params))


def in_loop(step: Callable[..., Any], n: int) -> Callable[..., Any]:
    def run(carry: Any, x: Array) -> Any:
        losses = None
        for _ in range(n):
            carry, losses = step(carry, x)
        return carry, losses

    return run


def in_scan(step: Callable[..., Any], n: int) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry: Any, x: Array) -> Any:
        return jax.lax.scan(lambda carry, _: step(carry, x), carry, length=n)

    return run


REPEATS = {"loop": in_loop, "scan": in_scan}
BLOCK = 0.05  # seconds that are timed at once
SHORT = 1e-3  # seconds; a call from Python takes some ten microseconds


def seconds(run: Callable[..., Any], carry: Any, x: Array) -> float:
    """Time of one run on a copy of the carry, which it may consume."""
    carry = jax.block_until_ready(jax.tree.map(jnp.copy, carry))
    start = time.perf_counter()
    jax.block_until_ready(run(carry, x))
    return time.perf_counter() - start


def compare(name: str, model: Model, rounds: int) -> list[Record]:
    """Time the arms of one model in turn; records of times and paired ratios."""
    x = jax.random.normal(jax.random.key(1), model.inputs)
    arms = {arm: build(arm, model) for arm in COMPARED}
    warm = [
        seconds(in_loop(step, 3), carry, x) / 3
        for _ in range(2)
        for step, carry in arms.values()
    ]
    n = max(2, min(1000, int(BLOCK / min(warm))))
    records = []
    for way in WAYS if min(warm) < SHORT else ("loop",):
        repeat = REPEATS[way]
        runs = {arm: (repeat(step, n), carry) for arm, (step, carry) in arms.items()}
        for run, carry in runs.values():
            seconds(run, carry, x)
        times: dict[str, list[float]] = {arm: [] for arm in COMPARED}
        for turn in track(range(rounds), f"{name}, {way}"):
            for arm in COMPARED if turn % 2 else COMPARED[::-1]:
                times[arm].append(seconds(*runs[arm], x) / n)
        records += [r for arm in COMPARED for r in describe(name, way, arm, times)]
    return records


def describe(
    name: str, way: str, arm: str, times: dict[str, list[float]]
) -> list[Record]:
    """Median time of a step, and quartiles of its ratio to the step beside it."""
    ratios = np.percentile(np.divide(times[arm], times["fixed"]), [25, 50, 75])
    measured = {
        f"{way}: microseconds": 1e6 * statistics.median(times[arm]),
        f"{way}: ratio": ratios[1],
        f"{way}: ratio, first quartile": ratios[0],
        f"{way}: ratio, third quartile": ratios[2],
    }
    return [
        record(arm, metric, value, config=name) for metric, value in measured.items()
    ]


def import_time(rounds: int) -> list[Record]:
    """What ``import yoto_jax`` takes after ``import optax``, in new interpreters."""
    code = (
        "import time, optax; start = time.perf_counter(); import yoto_jax; "
        "print(1e3 * (time.perf_counter() - start))"
    )
    times = [
        float(subprocess.check_output([sys.executable, "-c", code], text=True))
        for _ in track(range(rounds), "import")
    ]
    return [record("yoto", "import ms", statistics.median(times))]


RESUMABLE = True
SECTIONS = ("yoto", "weightings", "solvers", "many", "peers")
USUAL = tuple(section for section in SECTIONS if section != "many")
"""What is measured unless sections are named: hundreds of losses take minutes more."""


class Part(NamedTuple):
    """What is measured at one go, and how the progress names it."""

    name: str
    measure: Callable[[], list[Record]]


def main(options: Options) -> None:
    options.refuse_data()
    quick = options.preset == "quick"
    sections = chosen(options)
    rounds = options.steps or (3 if quick else 15)  # There is no training to step.
    pairs = options.steps or (2 if quick else 5)
    units = Units(options, rounds=rounds, pairs=pairs)
    parts = plan(sections, rounds, pairs, quick, units)
    records = []
    for number, part in enumerate(parts, 1):
        say(f"{units.seconds:4.0f} s, part {number} of {len(parts)}: {part.name}")
        records += part.measure()
    path = Path(options.out) / "overhead.json"
    seconds = round(units.seconds)
    about = meta(options, rounds=rounds, pairs=pairs, seconds=seconds)
    if "peers" in sections:
        about |= costs.peer_versions()
    result = write_json(path, *merged(path, sections, about, records))
    for shown in {"overhead": table(result), **tables(result)}.values():
        if shown.rows:
            show(shown)
    say(f"Results, after {seconds} s: {path}")


def chosen(options: Options) -> tuple[str, ...]:
    """The sections to measure: that of TorchJD only where it is installed.

    Raises:
      UsageError: if it is asked for by name and is not there.
    """
    every = options.preset == "quick" or options.methods is not None
    sections = options.choose(SECTIONS if every else USUAL)
    if "peers" in sections and not peers.available():
        if options.methods is not None:
            raise UsageError("peers needs PyTorch and TorchJD: the extra peers")
        sections = tuple(section for section in sections if section != "peers")
    return sections


def plan(
    sections: Sequence[str], rounds: int, pairs: int, quick: bool, units: Units
) -> list[Part]:
    """All that is to be measured, in order."""
    parts = []
    if "yoto" in sections:
        parts += yoto_parts(rounds, quick, units)
    if "weightings" in sections:
        parts += weighting_parts(pairs, quick, units)
    if "solvers" in sections:
        parts += solver_parts(rounds, quick, units)
    if "many" in sections:
        parts += many_parts(pairs, quick, units)
    if "peers" in sections:
        parts += peer_parts(pairs, quick, units)
    return parts


def yoto_parts(rounds: int, quick: bool, units: Units) -> Iterator[Part]:
    for name, model in (QUICK if quick else MODELS).items():
        work = functools.partial(compare, name, model, rounds)
        yield Part(
            f"learned weights, {name}, {rounds} rounds of {len(COMPARED)} programs",
            functools.partial(units.do, name, work),
        )
    imports = 1 if quick else 2
    work = functools.partial(import_time, imports)
    yield Part(f"import, {imports} times", functools.partial(units.do, "import", work))


def weighting_parts(pairs: int, quick: bool, units: Units) -> Iterator[Part]:
    for name, model in (costs.SMALL if quick else costs.SHARED).items():
        bench = costs.Bench(name, model, pairs, units)
        for kind, arms in costs.kinds(name).items():
            yield Part(
                f"weightings, {name}, {kind}: {len(arms)} programs, {pairs} pairs",
                functools.partial(bench.measure, arms),
            )


def solver_parts(rounds: int, quick: bool, units: Units) -> Iterator[Part]:
    sizes = (2, 3) if quick else costs.SIZES
    for method in costs.SOLVED[:3] if quick else costs.SOLVED:
        work = functools.partial(costs.solver_times, method, rounds, sizes)
        yield Part(
            f"solvers, {method}, {len(sizes)} sizes, {rounds} rounds",
            functools.partial(units.do, f"solver, {method}", work),
        )


def many_parts(pairs: int, quick: bool, units: Units) -> Iterator[Part]:
    sizes = {"many losses": (20,)} if quick else many.SIZES
    for kind, counts in sizes.items():
        for count in counts:
            name = f"{kind}, K={count}"
            work = functools.partial(many.steps, kind, count, pairs)
            yield Part(name, functools.partial(units.do, name, work))
    solved = {20: many.SOLVERS[:2]} if quick else many.SOLVED
    for count, methods in solved.items():
        for method in methods:
            name = f"many, {method}, K={count}"
            work = functools.partial(many.solve, method, count)
            yield Part(name, functools.partial(units.do, name, work))


def peer_parts(rounds: int, quick: bool, units: Units) -> Iterator[Part]:
    methods = len(costs.peer_methods(quick))
    for what, measure in (("steps", costs.peer_steps), ("solvers", costs.peer_solvers)):
        work = functools.partial(measure, rounds, quick)
        yield Part(
            f"TorchJD, {what} of {methods} methods, {rounds} rounds",
            functools.partial(units.do, f"TorchJD, {what}", work),
        )


def merged(
    path: Path,
    sections: Sequence[str],
    meta: dict[str, Any],
    records: list[Record],
) -> tuple[dict[str, Any], list[Record]]:
    """What was not asked for stays as it was measured before."""
    if not path.is_file():
        return meta, records
    before = read_json(path)
    stay = [r for r in before["records"] if section(r) not in sections]
    if not stay:
        return meta, records
    of_run = ("command", "commit", "date")
    meta = meta | {"before": {k: before["meta"].get(k) for k in of_run}}
    if "peers" in map(section, stay):
        kept = ("torch", "torchjd")
        meta |= {k: before["meta"][k] for k in kept if k in before["meta"]}
    if "many" in map(section, stay):
        meta[MANY_PAIRS] = before["meta"].get(MANY_PAIRS, before["meta"]["pairs"])
    return meta, stay + records


def section(record: Record) -> str:
    """The section that a record belongs to."""
    metric = record["metric"]
    if metric.startswith("TorchJD"):
        return "peers"
    if metric.startswith("many: "):
        return "many"
    if metric == "solver microseconds":
        return "solvers"
    return "yoto" if metric.startswith(("loop", "scan", "import")) else "weightings"
