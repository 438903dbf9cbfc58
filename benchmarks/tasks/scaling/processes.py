"""Several JAX processes on one machine, started and watched."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[3]


class Process(NamedTuple):
    """A process under way, and the file that it writes to."""

    popen: subprocess.Popen[bytes]
    output: IO[bytes]


class Ended(NamedTuple):
    """How one process ended."""

    status: int  # exit status; negative: killed by that signal
    seconds: float  # from the start of all of them
    output: str  # what it wrote


def start(
    processes: int, devices: int, arguments: Sequence[str], *own: Sequence[str]
) -> list[Process]:
    """Start ``benchmarks.distributed`` so many times, each with so many devices.

    ``own`` are further arguments for the first process, the second, and so on.
    """
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    environment.pop("XLA_FLAGS", None)
    together = []
    if processes > 1:
        together = ["--coordinator", f"localhost:{free_port()}"]
        together += ["--processes", str(processes)]
    started = []
    for process in range(processes):
        command = [sys.executable, "-m", "benchmarks.distributed", *together]
        if processes > 1:
            command += ["--process", str(process)]
        extra = own[process] if process < len(own) else ()
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        popen = subprocess.Popen(
            [*command, *arguments, *extra],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        started.append(Process(popen, output))
    return started


def wait(running: Sequence[Process], timeout: float) -> list[Ended]:
    """Wait for all of them; those that are not done in time are killed."""
    began = time.monotonic()
    ended: dict[int, float] = {}
    while len(ended) < len(running) and time.monotonic() - began < timeout:
        for place, (popen, _) in enumerate(running):
            if place not in ended and popen.poll() is not None:
                ended[place] = time.monotonic()
        time.sleep(0.02)
    found = []
    for place, (popen, output) in enumerate(running):
        popen.kill()
        popen.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
        output.close()
        moment = ended.get(place, began + timeout)
        found.append(Ended(popen.returncode, moment - began, text))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
