"""What a worker's process of the tests does; few imports, so that it starts soon."""

import contextlib
import functools
import os
import time
from pathlib import Path

from benchmarks.tasks.sweep import worker as shared

NAME = "test"
QUICK = shared.Timing(beat=0.1, grace=2.0, poll=0.05)


def product(point):
    return point[0] * point[1], {"point": list(point)}


def hang_once(folder, point):
    """The first one hangs in the middle of its trial; the others go on."""
    with contextlib.suppress(FileExistsError):
        (Path(folder) / "hanging").touch(exist_ok=False)
        (Path(folder) / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    time.sleep(0.02)
    return product(point)


def serve(url, folder):
    shared.stop_when_told()
    shared.work(url, NAME, functools.partial(hang_once, folder), QUICK)
