"""What is compared of the regulariser: optimizers, epsilons and the entropy."""

from typing import Literal

from benchmarks.harness.results import describe

METHODS = ("adamw", "sgdw")
EPSILONS = (0.01, 0.1, 1.0)
EPSILON = 0.1  # for what is shown at one epsilon only
COLLAPSED = 1e-3  # A loss that weighs less might as well be left out.

Entropy = Literal["all", "auxiliary"]


def config_of(rho: float, epsilon: float, entropy: Entropy = "all") -> str:
    return describe(rho=rho, epsilon=epsilon, entropy=entropy)
