"""What is compared on the segmentation task: methods and their settings."""

import math

from benchmarks.harness import contest as contests
from benchmarks.harness.contest import NONE, Contest
from benchmarks.harness.training import Task
from benchmarks.tasks.segmentation import task

EXPONENTS = (-2, -1.5, -1, -0.5, 0, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
GRID = ((NONE,), *((10.0**x,) for x in EXPONENTS))
BOUNDS = ((0.01, 100.0),)
PUBLISHED = (10.0,)
PAPER = {"ratios": (math.exp(-4),), "rho": 200.0, "sgd": True}
RHOS = (1.0, 20.0, 50.0, 500.0)
METRIC = "mIoU"


def contest(made: Task | None, budget: int | None = None) -> Contest:
    methods = contests.methods(
        len(task.AUXILIARY), GRID, BOUNDS, PUBLISHED, PAPER, RHOS, budget
    )
    rules = contests.rules(BOUNDS, groups=4)
    return Contest(made, METRIC, 1, "mIoU (%)", task.CLEAN, task.UNSEEN, methods, rules)
