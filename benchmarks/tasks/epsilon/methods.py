"""The ways to start that are compared: numbers, and weights measured on batches."""

import itertools
from typing import Any, Literal, NamedTuple

from benchmarks.harness.training import Task
from benchmarks.tasks.frontier.methods import LEARNED

DEFAULT = LEARNED["yoto"]["epsilon"]
EPSILONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
GRID = (1e-3, 1e-1, 10.0)
"""Of starts that differ between two auxiliary losses."""
SHARES = (1e-2, 1e-1, 1.0, 10.0)
BATCHES = 4
"""How many a start is measured on."""

When = Literal["start", "warm-up"]


class Measured(NamedTuple):
    """Weights from some batches, by :func:`yoto_jax.balanced_epsilon`.

    Attributes:
      by: What is compared, ``"gradient"`` or ``"loss"``.
      when: Before the first step, or after a warm-up from the default epsilon.
      share: Of auxiliary gradients, or losses.
      clip: Whether to stay where the regulariser can move the weights.
      units: Whether the losses are multiplied by what was measured, and the shares are
        the weights; else the weights are both.
      learn: Whether the weights are learned from there, or held.
    """

    by: Literal["gradient", "loss"] = "gradient"
    when: When = "warm-up"
    share: float = 1.0
    clip: bool = True
    units: bool = False
    learn: bool = True


class Arm(NamedTuple):
    """A way to start.

    Attributes:
      epsilon: Weights at the first step, one for each auxiliary loss.
      measured: What they are replaced by, if they are.
      few: Whether the first seeds are enough.
    """

    epsilon: tuple[float, ...]
    measured: Measured | None = None
    few: bool = True


def raw(epsilon: float) -> str:
    return f"epsilon {epsilon:g}"


def in_norms(share: float) -> str:
    return f"epsilon {share:g} in gradient norms"


def both(pair: tuple[float, ...]) -> str:
    return f"epsilon {pair[0]:g} and {pair[1]:g}"


BALANCED = {
    "balanced by gradient, at the start": Measured("gradient", "start"),
    "balanced by loss, at the start": Measured("loss", "start"),
    "balanced by gradient, after 2 %": Measured("gradient"),
    "balanced by loss, after 2 %": Measured("loss"),
}
"""What the library offers."""
HELD_FROM = {
    "start": "balanced by gradient, at the start, then held",
    "warm-up": "balanced by gradient, after 2 %, then held",
}
OTHERS = {
    HELD_FROM["start"]: Measured("gradient", "start", clip=False, learn=False),
    HELD_FROM["warm-up"]: Measured(clip=False, learn=False),
    "losses in gradient norms, epsilon 1": Measured(clip=False, units=True),
    "losses in gradient norms, epsilon 0.1": Measured(
        clip=False, units=True, share=DEFAULT
    ),
}
CONTENDERS = (raw(DEFAULT), *BALANCED, *list(OTHERS)[:3])
"""What all seeds are trained for; the others show where weights end."""


def arms(task: Task, grid: bool) -> dict[str, Arm]:
    """All of them, by name; those of a grid where two auxiliary losses have one."""
    count = len(task.auxiliary)
    alike = lambda epsilon: (epsilon,) * count
    found = {raw(epsilon): Arm(alike(epsilon)) for epsilon in EPSILONS}
    found |= {
        in_norms(share): Arm(alike(DEFAULT), Measured(share=share, clip=False))
        for share in SHARES
    }
    measured = {**BALANCED, **OTHERS}
    found |= {name: Arm(alike(DEFAULT), how) for name, how in measured.items()}
    found = {
        name: arm._replace(few=name not in CONTENDERS) for name, arm in found.items()
    }
    if grid and count == 2:
        pairs = [pair for pair in itertools.product(GRID, GRID) if len({*pair}) == 2]
        found |= {both(pair): Arm(pair) for pair in pairs}
    return found


def config(arm: Arm, count: int) -> dict[str, Any]:
    """Of the rule, before anything is measured."""
    return {"ratios": arm.epsilon, "factors": (1.0,) * (count + 1)}
