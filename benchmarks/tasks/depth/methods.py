"""What is compared on the depth task: methods and their settings."""

import itertools

from benchmarks.harness import contest as contests
from benchmarks.harness.contest import Contest
from benchmarks.harness.training import Task
from benchmarks.tasks.depth import task

GRID = tuple(itertools.product((0.001, 0.01, 0.25, 1.0, 10.0), (0.01, 0.1, 1.0)))
BOUNDS = ((0.001, 10.0), (0.01, 1.0))
PUBLISHED = (0.25, 0.1)
PAPER = {"ratios": (0.1, 0.1), "rho": 20.0}
RHOS = (0.1, 1.0)
METRIC = "delta1"


def contest(made: Task | None, budget: int | None = None) -> Contest:
    methods = contests.methods(
        len(task.AUXILIARY), GRID, BOUNDS, PUBLISHED, PAPER, RHOS, budget
    )
    rules = contests.rules(BOUNDS)
    return Contest(
        made, METRIC, 1, "delta1 (%)", task.SEEN, task.UNSEEN, methods, rules
    )
