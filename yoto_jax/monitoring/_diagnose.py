"""Findings from recorded gradients, in words."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from yoto_jax.monitoring._conflicts import Conflicts, check_conflicts
from yoto_jax.monitoring._findings import (
    FEWEST_ROWS,
    Finding,
    check_last,
    nearly_all,
    some,
)

_OPPOSED = -0.1  # Mean cosine: what points away less is of no consequence.
_BY_CHANCE = 0.01  # Probability of one false alarm among all pairs of a kind.
_ERRORS = 3.0  # Standard errors of the mean that a pair must stay clear by.
_SMALL_SHARE = 0.01  # Of an even share of the update, 1 / K.

Pair = tuple[str, str]


def diagnose(
    conflicts: Conflicts,
    *,
    representation: Conflicts | None = None,
    last: int = 100,
) -> list[Finding]:
    """Finds losses that conflict, and losses that the update neglects.

    The last looks are judged together, at least ten. A cosine counts as negative
    throughout if its mean is below -0.1 and it is negative more often than a fair coin
    would make it: the probability that one of the pairs is taken for such by chance is
    below 0.01. That takes seventeen looks of 40 losses.

    - ``"conflict"``: cosines of the gradients of two losses are negative throughout.
    - ``"no conflict"``: no pair has such cosines, and the mean of each pair is above
      -0.1 by three standard errors.
    - ``"representation"``: a pair conflicts at the representation and does not over the
      parameters, or the other way round.
    - ``"overruled"``: cosines of the gradient of a loss with the update are negative
      throughout: training makes this loss worse.
    - ``"share"``: in nine of ten looks that have the loss, its share of the update was
      below 0.01 / K, and that of the length of all weighted gradients too.

    Args:
      conflicts: From :func:`conflicts` or :func:`measure_conflicts`.
      representation: The same losses as their shared representation sees them, from
        ``gradients=yoto.of_representation(encoder)``; ``conflicts`` are of the
        parameters then.
      last: How many looks to judge.

    Returns:
      Findings, each with a message that names losses and numbers; empty if nothing can
      be said.

    Raises:
      TypeError: ``conflicts`` or ``representation`` is something else, such as the
        state.
      ValueError: ``last`` is below ten, or ``representation`` has other losses.

    Examples:
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> rng = np.random.default_rng(0)
      >>> noise = rng.normal(0.0, 0.5, size=(20, 2, 2))
      >>> g = np.array([[3.0, 0.0], [-2.0, 1.0]]) + noise
      >>> weights = {"a": np.full(20, 1.0), "b": np.full(20, 0.25)}
      >>> gramian = g @ g.swapaxes(1, 2)
      >>> seen = monitoring.Conflicts(np.arange(20), gramian, weights)
      >>> for kind, losses, message in monitoring.diagnose(seen):
      ...     print(kind, losses)
      conflict ('a', 'b')
      overruled ('b',)
    """
    check_conflicts(conflicts)
    check_last(last)
    if representation is not None:
        check_conflicts(representation)
        names, others = list(conflicts.loss_weights), list(representation.loss_weights)
        if names != others:
            raise ValueError(
                f"representation must be of the same losses {names}, got {others}."
            )
    seen = _recent(conflicts, last)
    if len(seen.steps) < FEWEST_ROWS:
        return []
    with np.errstate(all="ignore"):
        pairs = {pair: _judge(x) for pair, x in seen.cosines.items()}
        return [
            *_conflicting(seen, pairs),
            *_no_conflict(seen, pairs),
            *_elsewhere(pairs, representation and _recent(representation, last)),
            *_overruled(seen),
            *_small_shares(seen),
        ]


class _Verdict(NamedTuple):
    """What cosines of several looks say."""

    looks: int  # at which the cosine is known
    negative: int
    mean: float
    error: float  # standard error of the mean
    chance: float  # probability of so many negative ones by tosses of a coin

    def opposed(self, among: int) -> bool:
        """Whether the cosine is negative throughout, as one of so many looked at."""
        return self.mean < _OPPOSED and self.chance * among < _BY_CHANCE

    @property
    def clear(self) -> bool:
        """Whether it is not, and there were enough looks to tell."""
        enough = self.looks >= FEWEST_ROWS
        return enough and self.mean - _ERRORS * self.error > _OPPOSED


def _judge(cosines: np.ndarray) -> _Verdict:
    known = cosines[np.isfinite(cosines)]
    n = len(known)
    if n < 2:
        return _Verdict(n, 0, math.nan, math.nan, 1.0)
    negative = int(np.sum(known < 0))
    tail = sum(math.comb(n, m) for m in range(negative, n + 1))
    error = float(np.std(known, ddof=1)) / math.sqrt(n)
    return _Verdict(n, negative, float(np.mean(known)), error, tail / 2**n)


def _recent(seen: Conflicts, last: int) -> Conflicts:
    return seen._replace(
        steps=seen.steps[-last:],
        gramian=seen.gramian[-last:],
        loss_weights={name: x[-last:] for name, x in seen.loss_weights.items()},
    )


def _opposed(pairs: dict[Pair, _Verdict]) -> list[Pair]:
    """Pairs that conflict, the worst one first."""
    found = [pair for pair, verdict in pairs.items() if verdict.opposed(len(pairs))]
    return sorted(found, key=lambda pair: pairs[pair].mean)


def _conflicting(seen: Conflicts, pairs: dict[Pair, _Verdict]) -> Iterator[Finding]:
    if not (found := _opposed(pairs)):
        return
    numbers = some(
        f"{_and(pair)} in {pairs[pair].negative / pairs[pair].looks:.0%} of the looks "
        f"that have both (mean cosine {pairs[pair].mean:.2f})"
        for pair in found
    )
    yield Finding(
        "conflict",
        _members(found),
        f"Losses conflict: {numbers}, of the {_looks(seen)}. What improves one makes "
        "the other worse, and fixed weights choose which gives way. Try a weighting "
        "that looks at the Gramian, such as yoto.weightings.upgrad, beside tuned fixed "
        "weights.",
    )


def _no_conflict(seen: Conflicts, pairs: dict[Pair, _Verdict]) -> Iterator[Finding]:
    if not pairs or _opposed(pairs) or not all(x.clear for x in pairs.values()):
        return
    means = {pair: verdict.mean for pair, verdict in pairs.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    numbers = f"{means[low]:.2f} ({_and(low)})"
    if len(means) > 1:
        numbers = f"from {numbers} to {means[high]:.2f} ({_and(high)})"
    negative = sum(x.negative for x in pairs.values())
    looks = sum(x.looks for x in pairs.values())
    yield Finding(
        "no conflict",
        tuple(seen.loss_weights),
        f"The losses do not conflict: mean cosines of their gradients are {numbers}, "
        f"and {negative / looks:.0%} of all cosines are negative, in the "
        f"{_looks(seen)}. Methods that resolve conflicts have nothing to resolve here: "
        "weights alone, fixed or learned, are what is left to choose.",
    )


def _elsewhere(
    pairs: dict[Pair, _Verdict], representation: Conflicts | None
) -> Iterator[Finding]:
    """Conflicts that one of two places shows, and the other does not have."""
    if representation is None or len(representation.steps) < FEWEST_ROWS:
        return
    shared = {pair: _judge(x) for pair, x in representation.cosines.items()}
    for here, there, what in (
        (
            shared,
            pairs,
            "at the representation, and not over the parameters, where gradients of "
            "their own parts hide it: {}. A weighting sees these conflicts with "
            "gradients=yoto.of_representation(encoder).",
        ),
        (
            pairs,
            shared,
            "over the parameters, and not at the representation: {}. A weighting sees "
            "these conflicts with gradients=yoto.of_parameters(), and does not with "
            "of_representation.",
        ),
    ):
        if found := [pair for pair in _opposed(here) if there[pair].clear]:
            numbers = some(
                f"{_and(pair)} (mean cosine {here[pair].mean:.2f}, there "
                f"{there[pair].mean:.2f})"
                for pair in found
            )
            yield Finding(
                "representation",
                _members(found),
                f"Losses conflict {what.format(numbers)}",
            )


def _overruled(seen: Conflicts) -> Iterator[Finding]:
    verdicts = {name: _judge(x) for name, x in seen.descents.items()}
    found = [name for name, x in verdicts.items() if x.opposed(len(verdicts))]
    if not found:
        return
    numbers = some(
        f"{name!r} in {verdicts[name].negative / verdicts[name].looks:.0%} of the "
        f"looks that have it (mean cosine with the update {verdicts[name].mean:.2f})"
        for name in sorted(found, key=lambda name: verdicts[name].mean)
    )
    yield Finding(
        "overruled",
        tuple(found),
        f"The update makes losses worse: {numbers}, of the {_looks(seen)}. Raise their "
        "weights, or take a weighting whose update goes against no loss, such as "
        "yoto.weightings.upgrad. If these losses are only watched, leave this be.",
    )


def _small_shares(seen: Conflicts) -> Iterator[Finding]:
    limit = _SMALL_SHARE / max(1, len(seen.loss_weights))
    shares, sizes = seen.shares, seen.sizes
    found = {}
    for name in seen.loss_weights:
        known = np.isfinite(shares[name]) & np.isfinite(sizes[name])
        both = np.fmax(np.abs(shares[name]), sizes[name])[known]
        if name == seen.downstream or len(both) < FEWEST_ROWS:
            continue
        if nearly_all(both) < limit:
            found[name] = (
                float(np.median(shares[name][known])),
                float(np.median(seen.loss_weights[name][known])),
                float(np.median(seen.norms[name][known])),
            )
    if not found:
        return
    numbers = some(
        f"{name!r} is {share:.2g} of the update (weight {weight:.2g}, gradient of norm "
        f"{norm:.2g})"
        for name, (share, weight, norm) in found.items()
    )
    yield Finding(
        "share",
        tuple(found),
        f"Losses with hardly a share: {numbers}, in the median of the {_looks(seen)}. "
        "If they are meant to train anything, raise their weights, or take a weighting "
        "that evens out gradients, such as yoto.weightings.imtl_g.",
    )


def _members(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for pair in pairs for name in pair))


def _and(pair: Pair) -> str:
    return f"{pair[0]!r} and {pair[1]!r}"


def _looks(seen: Conflicts) -> str:
    return f"last {len(seen.steps)} looks (steps {seen.steps[0]} to {seen.steps[-1]})"
