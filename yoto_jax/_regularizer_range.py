"""Where the regulariser of the loss logits rests, and where it pulls hardest."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

_FAR = 60.0  # The slope is within rounding of its limits there.


class Range(NamedTuple):
    """Weights relative to the primary loss, of one auxiliary loss among others."""

    low: float
    preferred: float
    high: float


@functools.cache
def regularizer_range(count: int) -> Range:
    """Where the regulariser of so many auxiliary losses is convex in each logit.

    The preferred weight, the same for all of them, is its minimum. With the others
    there, its pull on one logit, the slope, grows with the distance from the minimum up
    to the ends of the range, where the curvature is 0. Below, the pull fades like the
    weight itself. With one auxiliary loss the ends are exp(-+x) where
    x tanh(x / 2) = 2.

    Args:
      count: How many auxiliary losses, at least 1.
    """
    alike = lambda mu: _slope(mu, _Others(count - 1, mu))
    rest = _root(alike, -_FAR, 0.0)
    curvature = functools.partial(_curvature, others=_Others(count - 1, rest))
    low = _root(curvature, -_FAR, rest)
    high = _root(curvature, rest, _FAR / 2)
    return Range(math.exp(low), math.exp(rest), math.exp(high))


class _Others(NamedTuple):
    """The auxiliary losses beside one: how many, and the logit that they share."""

    count: int
    mu: float

    @property
    def total(self) -> float:
        """Their unnormalised weight, with that of the primary loss."""
        return 1 + self.count * math.exp(self.mu)

    @property
    def mean(self) -> float:
        """Their mean logit, with that of the primary loss."""
        return self.count * math.exp(self.mu) * self.mu / self.total


def _slope(mu: float, others: _Others) -> float:
    """Eq. 8 for one logit."""
    p = _weight(mu, others)
    return p * (1 - p) * (mu - others.mean) + _sigmoid(mu)


def _curvature(mu: float, others: _Others) -> float:
    """The derivative of Eq. 8 by that logit."""
    p = _weight(mu, others)
    entropy = p * (1 - p) * ((1 - 2 * p) * (mu - others.mean) + 1)
    return entropy + _sigmoid(mu) * _sigmoid(-mu)


def _weight(mu: float, others: _Others) -> float:
    return _sigmoid(mu - math.log(others.total))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where ``f`` changes its sign, by bisection to the last digit."""
    rises = f(high) > 0
    for _ in range(100):
        middle = (low + high) / 2
        if (f(middle) > 0) == rises:
            high = middle
        else:
            low = middle
    return (low + high) / 2
