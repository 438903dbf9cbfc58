"""What is compared on the physics-informed network: methods and their settings."""

from collections.abc import Callable
from typing import NamedTuple

import jax

import yoto_jax as yoto
from benchmarks.harness.results import describe
from yoto_jax import weightings

PERIOD = 100  # steps between looks at gradients, for the methods that need them
CONDITIONS = ("initial", "boundary")

Make = Callable[[jax.Array], yoto.LossWeighting]


class Method(NamedTuple):
    """A row of the table."""

    name: str
    config: str
    make: Make  # from the weights of the conditions, relative to the equation


def _fixed(ratios: jax.Array) -> yoto.LossWeighting:
    initial, boundary = ratios
    return weightings.static({"pde": 1.0, "initial": initial, "boundary": boundary})


def _sometimes(weighting: Callable[[], yoto.LossWeighting]) -> Make:
    return lambda _: weightings.every(weighting(), PERIOD)


EVERY = describe(every=PERIOD)
METHODS = {
    "static": Method("static 1:1:1", "", _fixed),
    "tuned": Method("static, best by validation", "", _fixed),
    "gradient-norm": Method(
        "gradient norms", EVERY, _sometimes(weightings.grad_norm_balance)
    ),
    "lr-annealing": Method(
        "learning rate annealing",
        EVERY,
        _sometimes(lambda: weightings.lr_annealing("pde")),
    ),
    "ntk": Method("NTK", EVERY, _sometimes(weightings.ntk)),
    "relobralo": Method("ReLoBRaLo", "", lambda _: weightings.relobralo()),
    "uncertainty": Method("uncertainty", "", lambda _: weightings.uncertainty()),
    "yoto": Method("YOTO", "", lambda _: weightings.yoto("pde")),
}
FIXED = ("static", "tuned")
