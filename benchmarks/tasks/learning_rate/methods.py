"""What is compared: problems, methods, rates and arms."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

PROBLEMS = {
    "digits": "digits, batches of 32",
    "digits_full": "digits, one batch of 128",
    "mnist1d": "MNIST-1D, batches of 32",
    "burgers_full": "Burgers, points drawn once",
}
UNGUARDED = ("mnist1d",)
"""Problems on which no guard is tried."""
EQUATIONS = ("burgers_full",)
"""Problems whose score is the logarithm of an error."""
ARMS = {"equal": "equal weights", "learned": "learned weights"}
FACTORS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Learning rates, in units of the one that is usual for the problem."""

DECADES = (0.01, 0.1, 1.0, 10.0)
FOR_GUARDS = (0.01, 1.0, 10.0)
NO_RATE = (1.0,)


class Method(NamedTuple):
    """A way to get a learning rate.

    Attributes:
      label: In tables.
      program: Of ``task.PROGRAMS``.
      factors: The rates that it is given.
      scheduled: Whether they follow a warm-up and a cosine.
      guard: Arguments of ``guards.Guard``.
    """

    label: str
    program: str = "adamw"
    factors: tuple[float, ...] = DECADES
    scheduled: bool = False
    guard: Mapping[str, float] = MappingProxyType({})


RATE = 0.03  # of the logarithm of the factor, a step
HUNDREDTH = -4.605170185988092  # its logarithm


def _guard(label: str, **guard: float) -> Method:
    return Method(label, factors=FOR_GUARDS, guard=guard)


METHODS = {
    "constant": Method("constant rate", factors=FACTORS),
    "cosine": Method("warm-up and cosine", scheduled=True),
    "hyper": Method("`by_hypergradient`", guard={"rate": RATE}),
    "hyper_cosine": Method(
        "`by_hypergradient` and cosine", scheduled=True, guard={"rate": RATE}
    ),
    "mechanize": Method("`mechanize` and cosine", "mechanize", scheduled=True),
    "schedule_free": Method("`schedule_free_adamw`", "schedule_free"),
    "prodigy": Method("`prodigy` and cosine", "prodigy", NO_RATE, True),
    "dadapt": Method("`dadapt_adamw` and cosine", "dadapt", NO_RATE, True),
    "fast": _guard("three times its rate", rate=3 * RATE),
    "never_below": _guard("never below 1", rate=RATE, low=0.0),
    "deviations": _guard(
        "running mean over its deviation", rate=RATE / 3, decay=0.9, normalise=1.0
    ),
    "band": _guard("small means move nothing", rate=RATE, decay=0.9, band=0.05),
    "halving": _guard("halved from a cosine of 0.3", rate=RATE, halve=0.3),
    "from_below": _guard("starts at a hundredth", rate=RATE, start=HUNDREDTH),
}
GUARDS = tuple(METHODS)[tuple(METHODS).index("fast") :]


def config_of(arm: str, factor: float) -> str:
    return f"arm={arm} factor={factor:g}"
