"""Burgers' equation: see ``benchmarks.tasks.pinn.task``, whose losses these are."""

from benchmarks.tasks.frontier import physics
from benchmarks.tasks.frontier.problem import Problem
from benchmarks.tasks.pinn import task

SIZES = {
    "quick": physics.QUICK,
    "cpu": physics.Size(10_000, 32, 4, (16, 32), 64, 256, 4),
}
LEARNING_RATE = 5e-3
BOUNDS = ((1e-2, 1e4), (1e-3, 1e3))


def make(preset: str) -> Problem:
    size = SIZES[preset]
    test, validation = (physics.Known(*points) for points in task.references())
    equation = physics.Equation(
        name="burgers",
        names=task.LOSSES,
        draw=lambda key: task.draw_batch(key, size.inside, size.edge),
        losses=task.losses,
        test=test,
        validation=validation,
        kernel=task.ntk_diagonal,
    )
    return physics.problem(equation, size, LEARNING_RATE, BOUNDS)
