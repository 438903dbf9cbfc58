"""What is compared on choices: what logits descend, how they decide, names."""

from typing import NamedTuple

from benchmarks.harness.results import describe

SOURCES = ("training", "held-out")
"""The loss that the logits descend."""
WAYS = ("softmax", "gumbel", "straight_through")


class Schedule(NamedTuple):
    """How a choice is made to end."""

    name: str
    temperature: float  # at the end, from 1 at the start, geometrically
    decay: float  # strength at the start, and the opposite one at the end


SCHEDULES = (
    Schedule("constant", 1.0, 0.0),
    Schedule("annealed", 0.1, 0.0),
    Schedule("decay", 1.0, 5.0),
)
RUNS = {"training": 2, "held-out": 3}
"""What a choice costs in trainings: one or two gradients a step, and the retraining."""
ONE_BY_ONE = "one by one"
RANDOM = "random search"


def name_of(source: str, way: str) -> str:
    return f"{source} {way}"


FIXED = {"view": "signal"}
"""What is given in the smaller space, of which ``SMALLER`` is the schedule."""
SMALLER = SCHEDULES[1]


def config_of(schedule: str, smaller: bool = False) -> str:
    return describe(schedule=schedule, **(FIXED if smaller else {}))


def random_config(runs: int, smaller: bool = False) -> str:
    return describe(runs=runs, **(FIXED if smaller else {}))


METHODS = tuple(name_of(source, way) for source in SOURCES for way in WAYS)
