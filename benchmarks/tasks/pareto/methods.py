"""What is compared of the fronts of two tasks: methods and their settings."""

import functools

from benchmarks.tasks.pareto.task import Conditioning
from yoto_jax import conditional

GRID, EQUAL = "grid", "equal"
METHODS: dict[str, Conditioning | None] = {
    EQUAL: None,
    GRID: None,
    "linear": Conditioning(1.0, None, conditional.weighted_sum, False),
    "cosmos": Conditioning(1.2, 1, conditional.cosmos, True),
    "cosmos_groups": Conditioning(1.2, 16, conditional.cosmos, True),
    "chebyshev": Conditioning(
        1.2, 16, functools.partial(conditional.smooth_chebyshev, smoothing=0.1), True
    ),
}
MODELS = 9  # in the grid: one for each of as many weightings
RAYS = 25  # weightings that a conditional model is asked for, as published
REFERENCES = {"ce": 2.0, "error": 1.0}  # the published one; and the worst there is


def weightings(method: str) -> int:
    """How many weightings a method is asked for: one for each model if it has some."""
    return {EQUAL: 1, GRID: MODELS}.get(method, RAYS)
