"""Races of finished runs: what the lanes of one program would have done.

A race in which lanes keep training does to each lane what training alone does, so the
validation scores that runs had on the way say who would have been dropped where.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from yoto_jax import racing

Line = dict[str, Any]


class Race(NamedTuple):
    """Arms and cuts.

    Attributes:
      arms: Methods.
      points: How many points of the search, the first ones, are arms too.
      cuts: As in :func:`yoto_jax.racing.plan`.
    """

    arms: tuple[str, ...]
    points: int
    cuts: tuple[tuple[float, int], ...]


class Finish(NamedTuple):
    """The lane that wins, and what all of them cost, in runs."""

    line: Line
    runs: float


def run(race: Race, lines: Sequence[Line], score: str) -> Finish:
    """Race the arms of one seed by this score at the looks.

    Every lane costs what its own arm needs: those that look at the gradients of all
    losses share a program, the others another one.
    """
    looks = len(lines[0]["looks"][score])
    plan = racing.plan(looks, len(lines), race.cuts)
    lanes, cost = list(lines), 0.0
    for rung in plan.rungs:
        cost += rung.steps / looks * sum(line["runs"] for line in lanes)
        scores = [line["looks"][score][rung.stop - 1] for line in lanes]
        ranked = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
        lanes = [lanes[i] for i in sorted(ranked[: rung.keep])]
    return Finish(lanes[0], cost)
