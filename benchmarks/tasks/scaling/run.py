"""Many devices, many processes: the same weights everywhere, and what they cost.

On a machine without accelerators the devices are virtual: eight of them share its
cores. They show what is computed and what is sent, not how fast a cluster would be.
"""

import time
from collections.abc import Callable

import jax

from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, write_json
from benchmarks.harness.terminal import say, show
from benchmarks.harness.units import Units
from benchmarks.tasks.scaling import measurements as runs
from benchmarks.tasks.scaling.report import conclusions, figure, table, tables

METHODS = (
    "devices",
    "collectives",
    "memory",
    "speed",
    "processes",
    "crashes",
    "soak",
)
RESUMABLE = True
QUICK = ("collectives", "speed")


SIZES = {
    "quick": runs.Size(3, (2,), 64, 2, (2,), 20, 1, 200, sample=True),
    "cpu": runs.Size(50, (1, 2, 4, 8), 1024, 30, (1, 2, 4), 200, 20, 100_000),
    "gpu": runs.Size(50, (1, 2, 4, 8), 8192, 30, (1, 2, 4), 200, 20, 100_000),
}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(METHODS, QUICK)
    size = SIZES[options.preset]
    most = options.extra.get("processes")
    if most is not None:
        size = size._replace(processes=tuple(n for n in (1, 2, 4, 8) if n <= most))
        methods = options.choose(METHODS) if options.methods else ("processes",)
    use_virtual_devices()
    parts: dict[str, Callable[[], list[Record]]] = {
        "devices": lambda: runs.compare_devices(size),
        "collectives": lambda: runs.measure_collectives(size),
        "memory": runs.measure_memory,
        "speed": lambda: runs.measure_speed(size),
        "processes": lambda: runs.compare_processes(size),
        "crashes": lambda: runs.crash(size, min(2, max(size.processes))),
        "soak": lambda: runs.soak(size),
    }
    records = []
    units = Units(options, processes=size.processes)
    for method in methods:
        started = time.monotonic()
        records += units.do(method, parts[method])
        say(f"{method}: {time.monotonic() - started:.0f} s")
    path = options.out / "scaling.json"
    settings = {"limit": runs.LIMIT, **size._asdict()}
    result = write_json(path, meta(options, **settings), records)
    if "speed" in methods and "collectives" in methods:
        figure(result, path.with_suffix(".png"))
    show(table(result))
    for part in tables(result).values():
        show(part)
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {path}")


def use_virtual_devices() -> None:
    """As many CPU devices as the benchmark wants, if it is not too late for that."""
    try:
        jax.config.update("jax_num_cpu_devices", runs.VIRTUAL_DEVICES)
    except RuntimeError:
        if jax.device_count() < 2:
            raise UsageError(
                "scaling needs several devices: JAX has been started with one"
            ) from None
