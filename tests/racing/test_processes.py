"""A race over several processes ends as it does in one."""

import pathlib
import socket
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / "race_of_processes.py"


def run(processes):
    """What each of the processes prints last."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(port), str(process), str(processes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
    return [printed.splitlines()[-1] for printed, _ in said]


@pytest.mark.slow
def test_two_processes_end_as_one():
    (alone,) = run(1)
    assert alone.startswith("4 1 ")  # Four devices, and the arm that fits most.
    assert run(2) == [alone, alone]
