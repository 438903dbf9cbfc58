"""The problems, by name: each module makes one."""

import functools
import importlib

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
}
"""Settings are chosen on one half of them, before the other half is looked at."""


@functools.cache
def make(name: str, preset: str) -> Problem:
    """A problem in the size of a preset."""
    module = importlib.import_module(f"benchmarks.tasks.frontier.problems.{name}")
    return module.make(preset)
