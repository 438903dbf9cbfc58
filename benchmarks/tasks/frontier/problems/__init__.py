"""The problems, by name: each module makes one."""

import functools
import importlib
from pathlib import Path

from benchmarks.tasks.frontier.problem import Problem

DEVELOPMENT, HELD_OUT = "development", "held out"
PROBLEMS = {
    "digits": DEVELOPMENT,
    "mnist1d": DEVELOPMENT,
    "burgers": DEVELOPMENT,
    "segmentation": DEVELOPMENT,
    "missing_labels": HELD_OUT,
    "depth": HELD_OUT,
    "helmholtz": HELD_OUT,
    "allen_cahn": HELD_OUT,
    "camvid": HELD_OUT,
    "pretraining": HELD_OUT,
}
"""Settings are chosen on one half of them, before the other half is looked at."""

FROM_FOLDER = ("camvid",)
"""Those whose data are in a folder, and which are there if it is given."""


@functools.cache
def make(name: str, preset: str, folder: Path | None = None) -> Problem:
    """A problem in the size of a preset; the folder is for those that need one."""
    module = importlib.import_module(f"benchmarks.tasks.frontier.problems.{name}")
    return module.make(preset, folder) if name in FROM_FOLDER else module.make(preset)
