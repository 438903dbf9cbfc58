"""Searches for loss weights, all with one interface, and what became of them.

A search proposes weights of the auxiliary losses relative to the primary one, is told
how well they did on validation data, and proposes the next ones. It never sees a test.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import optuna
import scipy.stats

Ratios = tuple[float, ...]

VALIDATED = "best by validation"
ORACLE = "best on test"
MEDIAN = "median"
WORST = "worst"


class Search(Protocol):
    """What proposes loss weights."""

    budget: int

    def ask(self) -> list[Ratios]:
        """The next weights to try, side by side; none when the search is over."""
        ...

    def tell(self, values: Sequence[float]) -> None:
        """How well those just asked for did on validation data; more is better."""
        ...


class Points:
    """Points that are known beforehand: a grid, or random draws."""

    def __init__(self, points: Sequence[Ratios]):
        self.budget = len(points)
        self._left = list(points)

    def ask(self) -> list[Ratios]:
        return self._left

    def tell(self, values: Sequence[float]) -> None:
        del values
        self._left = []


def random(bounds: Sequence[tuple[float, float]], budget: int, seed: int) -> Points:
    """Log-uniform draws within the bounds of each ratio."""
    low, high = np.log10(np.array(bounds)).T
    rng = np.random.default_rng([seed, 2**31])
    draws = 10.0 ** rng.uniform(low, high, (budget, len(bounds)))
    return Points([tuple(draw) for draw in draws.tolist()])


SAMPLERS = ("tpe", "gp")
STARTED = 5
"""Points at random that they begin with, not the default ten: budgets are small."""


class Bayesian:
    """Optuna's samplers on the logarithms of the ratios, one point at a time."""

    def __init__(
        self,
        sampler: str,
        bounds: Sequence[tuple[float, float]],
        budget: int,
        seed: int,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        chosen = samplers[sampler](seed=seed, n_startup_trials=min(STARTED, budget))
        self.budget = budget
        self._study = optuna.create_study(direction="maximize", sampler=chosen)
        self._space: dict[str, Any] = {
            f"ratio {i}": optuna.distributions.FloatDistribution(low, high, log=True)
            for i, (low, high) in enumerate(bounds)
        }
        self._trial: optuna.Trial | None = None

    def ask(self) -> list[Ratios]:
        if len(self._study.trials) == self.budget:
            return []
        self._trial = self._study.ask(self._space)
        return [tuple(self._trial.params[name] for name in self._space)]

    def tell(self, values: Sequence[float]) -> None:
        assert self._trial is not None
        (value,) = values
        if math.isfinite(value):
            self._study.tell(self._trial, value)
        else:
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)


def has_gp() -> bool:
    """Whether Optuna's Gaussian process can run: it needs PyTorch."""
    return importlib.util.find_spec("torch") is not None


def selections(validation: Sequence[float], test: Sequence[float]) -> dict[str, int]:
    """Which run of a search each way of choosing takes.

    Only ``VALIDATED`` is a choice that somebody could make. The others look at the test
    and describe the search: its best, its middle and its worst.
    """
    ranked = np.argsort(np.nan_to_num(np.asarray(test), nan=-np.inf), kind="stable")
    chosen = np.nan_to_num(np.asarray(validation), nan=-np.inf)
    return {
        VALIDATED: int(np.argmax(chosen)),
        ORACLE: int(ranked[-1]),
        MEDIAN: int(ranked[(len(ranked) - 1) // 2]),
        WORST: int(ranked[0]),
    }


def best_of_n(validation: Sequence[float], test: Sequence[float]) -> np.ndarray:
    """Expected test value of the validated best among n runs, for every n.

    The expectation is over all choices of n from the runs of the search: the run that
    is r-th best of N by validation wins ``C(N - r, n - 1)`` of the ``C(N, n)`` choices.
    """
    ordered = np.asarray(test)[np.argsort(-np.asarray(validation), kind="stable")]
    total = len(ordered)
    choices = range(1, total + 1)
    wins = [
        [math.comb(total - r, n - 1) / math.comb(total, n) for r in choices]
        for n in choices
    ]
    return np.array(wins) @ ordered


def best_so_far(validation: Sequence[float], test: Sequence[float]) -> np.ndarray:
    """Test value of the validated best among the first n runs, for every n."""
    chosen = np.nan_to_num(np.asarray(validation), nan=-np.inf)
    best = [int(np.argmax(chosen[:n])) for n in range(1, len(chosen) + 1)]
    return np.asarray(test)[best]


def verdict(difference: np.ndarray) -> int:
    """Sign of the mean over seeds; 0 if 0 is in its 95 % interval, or with one seed.

    The interval is Student's: for three seeds, 4.3 standard errors to each side.
    """
    mean = difference.mean()
    return int(np.sign(mean)) if abs(mean) > reach(difference) else 0


def reach(x: np.ndarray, level: float = 0.975) -> float:
    """How far Student's quantile at ``level`` of the mean of ``x`` lies above it.

    Infinite for one seed alone, or where one is not finite.
    """
    n = len(x)
    if n < 2 or not np.isfinite(x).all():
        return math.inf
    return float(scipy.stats.t.ppf(level, n - 1) * x.std(ddof=1) / math.sqrt(n))
