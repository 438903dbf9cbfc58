"""How many lanes train for how long, and what that costs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from yoto_jax._checks import as_integer
from yoto_jax._losses import PyTree


class Rung(NamedTuple):
    """A stretch of training, and how many lanes are left after it.

    Attributes:
      start: Its first step; steps count from 0.
      stop: The step after its last one.
      lanes: How many lanes train.
      keep: How many of them go on; 1 after the last rung.
    """

    start: int
    stop: int
    lanes: int
    keep: int

    @property
    def steps(self) -> int:
        """How many steps each of its lanes trains."""
        return self.stop - self.start


class Plan(NamedTuple):
    """The rungs of a race, first to last. ``print`` says what it costs.

    Attributes:
      rungs: In the order of training.
    """

    rungs: tuple[Rung, ...]

    @property
    def arms(self) -> int:
        """How many lanes start."""
        return self.rungs[0].lanes

    @property
    def steps(self) -> int:
        """Steps of the lane that wins, as many as of a run alone."""
        return self.rungs[-1].stop

    @property
    def runs(self) -> float:
        """Training of all lanes, in units of one whole run."""
        return sum(rung.lanes * rung.steps for rung in self.rungs) / self.steps

    def after(self, step: int) -> tuple[Rung, ...]:
        """What is left to do after so many steps, for a race that was interrupted.

        The rung under way begins at ``step``. After the last step of a rung its cut is
        left: a rung of no steps. A state that was saved after the cut loses nothing by
        being cut to the same number again.
        """
        step = integer("step", step, 0)
        if step > self.steps:
            raise ValueError(f"step must be at most {self.steps}, got {step}.")
        left = [rung for rung in self.rungs if rung.stop >= step]
        return tuple(rung._replace(start=max(rung.start, step)) for rung in left)

    def lanes_at(self, step: int) -> int:
        """How many lanes there are after so many steps, before a cut that is due."""
        return self.after(step)[0].lanes

    def lanes_bytes(self, lane: PyTree) -> int:
        """Bytes of all lanes at the start, of what is carried from step to step.

        Args:
          lane: What one run carries (parameters, states), or its shapes.
        """
        shapes = jax.eval_shape(lambda: lane)
        sizes = [_bytes(leaf) for leaf in jax.tree.leaves(shapes)]
        return self.arms * sum(sizes)

    def __str__(self) -> str:
        """One line for each rung, and one for the cost."""
        lines = [
            f"steps {rung.start} to {rung.stop}: {_lanes(rung.lanes)}"
            + (f", then the best {rung.keep}" if rung.keep < rung.lanes else "")
            for rung in self.rungs
        ]
        return "\n".join([*lines, f"cost: {self.runs:.2f} runs of {self.steps} steps"])


def plan(steps: int, arms: int, cuts: Sequence[tuple[float, int]]) -> Plan:
    """Plans a race with cuts at given shares of the steps.

    Args:
      steps: Of the lane that wins, as many as of a run alone.
      arms: How many lanes start.
      cuts: ``(share, keep)`` for each cut: after this share of the steps, in (0, 1),
        so many lanes are left. The last cut leaves one lane, or the race is decided
        after the last step.

    Returns:
      A :class:`Plan`.

    Raises:
      TypeError: A number of steps or lanes is not an integer, or a cut is no pair.
      ValueError: A number is out of its range, or the cuts are not in order.

    Examples:
      >>> import yoto_jax as yoto
      >>> race = yoto.racing.plan(2000, arms=9, cuts=[(0.2, 3), (0.5, 1)])
      >>> print(race)
      steps 0 to 400: 9 lanes, then the best 3
      steps 400 to 1000: 3 lanes, then the best 1
      steps 1000 to 2000: 1 lane
      cost: 3.20 runs of 2000 steps
    """
    steps, lanes = integer("steps", steps, 1), integer("arms", arms, 1)
    rungs: list[Rung] = []
    before = 0
    for cut in cuts:
        try:
            share, wanted = cut
        except (TypeError, ValueError):
            raise TypeError(
                f"cuts must be pairs (share, keep), as [(0.2, 1)], got {cuts!r}."
            ) from None
        if not 0 < share < 1:
            raise ValueError(f"a cut must be at a share in (0, 1), got {share}.")
        stop, left = round(share * steps), integer("keep", wanted, 1)
        if stop <= before:
            raise ValueError(
                f"cuts must be at least a step apart, in order: that at {share} is at "
                f"step {stop} of {steps}, the one before at {before}."
            )
        if left >= lanes:
            raise ValueError(
                f"a cut must drop a lane: that at {share} keeps {left} of {lanes}."
            )
        if stop == steps:
            raise ValueError(f"the cut at {share} leaves no step of {steps} after it.")
        rungs.append(Rung(before, stop, lanes, left))
        before, lanes = stop, left
    return Plan((*rungs, Rung(before, steps, lanes, 1)))


def successive_halving(
    steps: int, arms: int, *, eta: float = 3.0, first: float | None = None
) -> Plan:
    r"""Plans a race by successive halving: the same factor at every cut.

    .. math::
      n_i = \lfloor n \eta^{-i} \rfloor \text{ lanes until step } r_0 \eta^i,
      \qquad i = 0, 1, \dots

    Every cut drops at least one lane, whatever the factor. Lanes continue from where
    they are: unlike in the papers, no step is repeated.

    Args:
      steps: Of the lane that wins, as many as of a run alone.
      arms: n, how many lanes start.
      eta: :math:`\eta`, above 1: how many lanes there are for each that is kept.
      first: Share of the steps before the first cut, in (0, 1). By default
        :math:`\eta^{-s}` with s the number of cuts, as in the papers. Scores that say
        little early ask for more, such as 0.2.

    Returns:
      A :class:`Plan`. Cuts that would come after the last step are left out: several
      lanes then end, and the race is decided there.

    Raises:
      TypeError: A number of steps or lanes is not an integer.
      ValueError: A number is out of its range, or there are too few steps for so many
        cuts.

    Examples:
      >>> import yoto_jax as yoto
      >>> print(yoto.racing.successive_halving(900, arms=9))
      steps 0 to 100: 9 lanes, then the best 3
      steps 100 to 300: 3 lanes, then the best 1
      steps 300 to 900: 1 lane
      cost: 2.33 runs of 900 steps

    References:
      Jamieson and Talwalkar, `Non-stochastic Best Arm Identification and Hyperparameter
      Optimization <https://arxiv.org/abs/1502.07943>`_, 2016; Li et al., `Hyperband
      <https://arxiv.org/abs/1603.06560>`_, 2018, where eta is 3.
    """
    steps, arms = integer("steps", steps, 1), integer("arms", arms, 1)
    if not 1 < eta < math.inf:
        raise ValueError(f"eta must be above 1 and finite, got {eta}.")
    if first is not None and not 0 < first < 1:
        raise ValueError(f"first must be in (0, 1), got {first}.")
    left = [arms]
    while left[-1] > 1:
        exact = arms / eta ** len(left)
        left.append(min(left[-1] - 1, max(1, math.floor(exact + 1e-9))))
    begin = eta ** -(len(left) - 1) if first is None else first
    cuts = [(begin * eta**i, keep) for i, keep in enumerate(left[1:])]
    cuts = [(share, keep) for share, keep in cuts if round(share * steps) < steps]
    stops = [round(share * steps) for share, _ in cuts]
    if 0 in stops or len({*stops}) < len(stops):
        raise ValueError(
            f"{arms} arms and eta {eta} ask for cuts after a share of {begin:.2g} of "
            f"{steps} steps and eta times as many each: these fall together. Give a "
            "later first=, a larger eta or fewer arms."
        )
    return plan(steps, arms, cuts)


def integer(name: str, value: Any, least: int) -> int:
    number = as_integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def _bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _lanes(number: int) -> str:
    return "1 lane" if number == 1 else f"{number} lanes"
