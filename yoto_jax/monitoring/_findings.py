"""Checks of recorded loss weights."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from yoto_jax._checks import check_counts
from yoto_jax.monitoring._history import History, check_history, weighed

FEWEST_ROWS = 10  # With fewer, nothing is judged.
_NEARLY_ALL = 0.9  # Of the rows: some methods have a weight of 0 now and then.
_SELDOM = 0.1  # Of the rows or steps: batches that are bad by chance are far fewer.
_OTHER_GRADIENT = 10.0  # Times larger or smaller: no noise of batches makes that.
_SMALLEST_SHARE = 1e-4  # Of the sum of all weights.
_NEAR_PRIOR = 0.05  # Largest relative distance from the regulariser's own weights.
_UNLIKE_SCALES = 1e3  # Largest ratio of two losses; a loss of 0 is left out.
_SAID: set[tuple[str, tuple[str, ...]]] = set()  # Warned of in this process.


class Finding(NamedTuple):
    """A finding of :func:`check` or :func:`diagnose`.

    Attributes:
      kind: ``"not finite"``, ``"skipped"``, ``"collapsed"``, ``"prior"``, ``"scale"``
        or ``"gradient"`` of :func:`check`, ``"no conflict"``, ``"conflict"``,
        ``"representation"``, ``"overruled"`` or ``"share"`` of :func:`diagnose`.
      losses: Names of the losses it is about.
      message: Description with the numbers, and the remedy.
    """

    kind: str
    losses: tuple[str, ...]
    message: str


class LossWeightWarning(UserWarning):
    """Warning of a problem with loss weights or losses; see :func:`check`."""


def check(history: History, *, last: int = 100) -> list[Finding]:
    """Finds problems with recorded loss weights, and names remedies.

    The last rows are judged together, at least ten. A downstream loss is left out, and
    so are rows of batches that lack a loss, in what is said of it.

    - ``"not finite"``: a loss was NaN or infinite in more than one of ten rows, or a
      weight is now.
    - ``"skipped"``: the weighting learned nothing from more than one in ten steps: a
      loss was not positive where it has to be, or a number was not finite.
    - ``"collapsed"``: in nine of ten rows, the shares of a weight and of its weighted
      loss in their sums were below 1e-4.
    - ``"prior"``: in nine of ten rows, all weights were within a fraction 0.05 of those
      that the regulariser alone would choose.
    - ``"scale"``: the medians of the losses (of the weighted losses, unless logits are
      learned) differ by more than a factor 1000.
    - ``"gradient"``: in nine of ten rows, the gradient of the logits at :func:`record`
      was ten times larger or smaller than that of the composite loss: it is not the
      first link of the chain, or was given other losses.

    Args:
      history: From :func:`history`.
      last: How many rows to look at.

    Returns:
      Findings, each with a message that names losses and numbers; empty without any.

    Raises:
      TypeError: ``history`` is something else, such as the state.
      ValueError: ``last`` is below ten.

    Examples:
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> steps = np.arange(20)
      >>> weights = {"depth": 0.99 + 0 * steps, "camera": 1e-6 + 0 * steps}
      >>> seen = monitoring.History(steps, weights, losses={})
      >>> for kind, losses, message in monitoring.check(seen):
      ...     print(kind, losses)
      collapsed ('camera',)
    """
    check_history(history)
    check_last(last)
    if len(history.steps) < FEWEST_ROWS:
        return []
    recent = _recent(history, last)
    with np.errstate(all="ignore"):
        return [
            *_not_finite(recent),
            *_skipped(recent),
            *_collapsed(recent),
            *_prior_alone(recent),
            *_unlike_scales(recent),
            *_another_gradient(recent),
        ]


def check_last(last: Any) -> None:
    check_counts(last=last)
    if last < FEWEST_ROWS:
        raise ValueError(f"last must be {FEWEST_ROWS} or more, got {last}.")


def warn(
    history: History,
    *,
    said: set[tuple[str, tuple[str, ...]]] | None = None,
    last: int = 100,
) -> list[Finding]:
    """Issues a Python warning for each finding, once per kind and losses.

    Args:
      history: From :func:`history`.
      said: Kinds and losses already warned of; new ones are added. Default: one set for
        the process. Runs that share a process need a set each.
      last: As in :func:`check`.

    Returns:
      All findings, new or not.

    Examples:
      >>> import warnings
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> weights = {"depth": np.ones(20), "camera": np.zeros(20)}
      >>> seen = monitoring.History(np.arange(20), weights, losses={})
      >>> said = set()
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     for _ in range(3):
      ...         findings = monitoring.warn(seen, said=said)
      >>> print(len(caught), caught[0].category.__name__)
      1 LossWeightWarning
    """
    said = _SAID if said is None else said
    findings = check(history, last=last)
    for finding in findings:
        if (about := (finding.kind, finding.losses)) not in said:
            said.add(about)
            warnings.warn(finding.message, LossWeightWarning, stacklevel=2)
    return findings


def _recent(history: History, last: int) -> History:
    cut: Any = lambda x: None if x is None else x[-last:]
    each = lambda named: {name: cut(x) for name, x in named.items()}
    return history._replace(
        steps=cut(history.steps),
        loss_weights=each(history.loss_weights),
        losses=each(history.losses),
        data_gradient=cut(history.data_gradient),
        prior_gradient=cut(history.prior_gradient),
        num_skipped=cut(history.num_skipped),
        present=None if history.present is None else each(history.present),
        given=cut(history.given),
    )


def _there(seen: History, name: str) -> np.ndarray:
    """(n,) whether the batch of a row had this loss."""
    whole = np.ones(len(seen.steps), bool)
    return whole if seen.present is None else seen.present[name]


def _not_finite(seen: History) -> Iterator[Finding]:
    there = {name: _there(seen, name) for name in seen.loss_weights}
    given = True if seen.given is None else seen.given
    known = {name: x[there[name] & given] for name, x in seen.losses.items()}
    bad = {name: int(np.sum(~np.isfinite(x))) for name, x in known.items()}
    bad = {name: n for name, n in bad.items() if n > len(known[name]) * _SELDOM}
    if bad:
        counts = ", ".join(f"{name!r} in {n}" for name, n in bad.items())
        yield Finding(
            "not finite",
            tuple(bad),
            f"Losses were NaN or infinite in many of the {_rows(seen)}: {counts}. Find "
            "the operation with jax.config.update('jax_debug_nans', True); lower the "
            "learning rate, compute these losses in float32, or skip such batches "
            "(yoto.skip_outliers).",
        )
    sound = {n: np.isfinite(x) | ~there[n] for n, x in seen.loss_weights.items()}
    bad = tuple(name for name, x in sound.items() if not x[-1])
    if bad:
        finite = np.all([sound[name] for name in bad], axis=0)
        since = seen.steps[np.max(np.flatnonzero(finite), initial=-1) + 1]
        yield Finding(
            "not finite",
            bad,
            f"The weights of {some(map(repr, bad))} are NaN or infinite since step "
            f"{since}: nothing trains any more. Go back to a checkpoint from before, "
            "and skip batches that are not finite (yoto.skip_outliers).",
        )


_CAUSES = (  # Of skipped batches: the state of a loss, its test and the remedy.
    (
        "0 or less",
        lambda x: x <= 0,
        "If the method needs positive losses, add a constant to such a loss (its "
        "gradient stays the same), give famo lower_bounds, or take a weighting for "
        "losses of any sign, such as yoto.weightings.upgrad.",
    ),
    (
        "NaN or infinite",
        lambda x: ~np.isfinite(x),
        "Compute such a loss in float32, or lower the learning rate.",
    ),
)


def _skipped(seen: History) -> Iterator[Finding]:
    if seen.num_skipped is None:
        return
    skipped = seen.num_skipped[-1] - seen.num_skipped[0]
    steps = seen.steps[-1] - seen.steps[0]
    if not skipped > steps * _SELDOM:
        return
    held = np.flatnonzero(np.diff(seen.num_skipped)) + 1
    about, advice = {}, ""
    for what, is_bad, cure in _CAUSES:
        counts = {
            name: np.sum(is_bad(x[held]) & _there(seen, name)[held])
            for name, x in seen.losses.items()
        }
        if bad := {name: n for name, n in counts.items() if n}:
            about |= bad
            listing = some(f"{name!r} in {n}" for name, n in bad.items())
            advice += f" Losses in the {len(held)} rows with such batches were {what}: "
            advice += f"{listing}. {cure}"
    yield Finding(
        "skipped",
        tuple(about or seen.losses),
        f"The weighting learned nothing from {skipped} of the {steps} batches of steps "
        f"{seen.steps[0] + 1} to {seen.steps[-1]} (since the start: "
        f"{seen.num_skipped[-1]} of {seen.steps[-1] + 1}), and its weights stayed as "
        "they were."
        + (
            advice
            or " The losses in their rows are positive and finite: a statistic of the "
            "gradients was not finite, a loss was below its bound (lower_bounds of "
            "famo), or skip_outliers took the batches for outliers (raise its limit)."
        ),
    )


def _collapsed(seen: History) -> Iterator[Finding]:
    names = weighed(seen)
    there = np.array([_there(seen, name) for name in names])
    known = lambda named: np.where(there, [named[name] for name in names], 0.0)
    shares_of = lambda sizes: sizes / np.sum(sizes, axis=0)
    weights = np.abs(known(seen.loss_weights))
    shares = felt = shares_of(weights)
    if seen.losses:
        felt = np.fmax(shares, shares_of(weights * np.abs(known(seen.losses))))
    low = [
        k
        for k, rows in enumerate(there)
        if np.sum(rows) >= FEWEST_ROWS and nearly_all(felt[k, rows]) < _SMALLEST_SHARE
    ]
    if not low:
        return
    cure = (
        "Raise hyperparameter_decay (rho), start from a larger epsilon, or bring the "
        "losses to one scale (divide each by a typical value); with many losses the "
        "regulariser needs a larger rho to hold them all."
        if seen.data_gradient is not None
        else "If these losses are meant to train anything, bring all to one scale "
        "(yoto.weightings.normalize around the weighting, or "
        "yoto.weightings.scale_invariant), or choose a method that keeps every loss in "
        "play, such as yoto.weightings.upgrad."
    )
    numbers = some(f"{names[k]!r} {np.nanmedian(shares[k, there[k]]):.1e}" for k in low)
    yield Finding(
        "collapsed",
        tuple(names[k] for k in low),
        f"Weights have collapsed: {numbers} of the sum of all weights, in the median "
        f"of the {_rows(seen)}. Nothing trains these losses any more. {cure}",
    )


def _prior_alone(seen: History) -> Iterator[Finding]:
    for alone in seen.prior_weights:
        if len(alone) < 2:
            continue
        ratios = [seen.loss_weights[name] / weight for name, weight in alone.items()]
        # Of batches that lack a loss, the weights are those of fewer losses.
        whole = np.all([_there(seen, name) for name in alone], axis=0)
        distance = np.max(np.abs(np.log(ratios)), axis=0)[whole]
        if len(distance) < FEWEST_ROWS:
            continue
        if not nearly_all(distance) < np.log1p(_NEAR_PRIOR):
            continue
        weights = some(f"{name!r} {weight:.3f}" for name, weight in alone.items())
        yield Finding(
            "prior",
            tuple(alone),
            f"The regulariser alone decides the weights: over the {_rows(seen)} they "
            f"stayed within {np.expm1(np.nanmedian(distance)):.1%} (median) of what "
            f"they would be without any losses: {weights}{_pulls(seen)}. Lower "
            "hyperparameter_decay (rho), ten times at first, if the losses are to have "
            "a say; if not, fixed weights (yoto.weightings.static) do the same.",
        )


def _pulls(seen: History) -> str:
    if seen.prior_gradient is None or seen.data_gradient is None:
        return ""
    own, data = map(np.nanmedian, (seen.prior_gradient, seen.data_gradient))
    return f" (median gradient of the regulariser {own:.2g}, of the losses {data:.2g})"


def _unlike_scales(seen: History) -> Iterator[Finding]:
    raw = seen.data_gradient is not None
    sizes = {}
    for name in weighed(seen) if seen.losses else []:
        factor = 1.0 if raw else seen.loss_weights[name]
        values = np.abs(seen.losses[name] * factor)
        values = values[np.isfinite(values)]
        if len(values) and (size := float(np.median(values))) > 0:
            sizes[name] = size
    if not sizes:
        return
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    ratio = sizes[large] / sizes[small]
    if not ratio > _UNLIKE_SCALES:
        return
    what = "losses" if raw else "weighted losses"
    cure = (
        "Learned weights follow the scale: they flow to the smallest loss, whatever it "
        "means. Divide each loss by a typical value of its own, or let "
        "yoto.weightings.normalize(yoto.weightings.yoto(...)) do so."
        if raw
        else "The largest decides the step. Put yoto.weightings.normalize around the "
        "weighting, use yoto.weightings.scale_invariant or uncertainty, or divide each "
        "loss by a typical value of its own."
    )
    yield Finding(
        "scale",
        (large, small),
        f"The {what} differ {float(f'{ratio:.2g}'):,.0f} times in scale: "
        f"{large!r} is {sizes[large]:.3g}, {small!r} is {sizes[small]:.3g} in the "
        f"median of the {_rows(seen)}. {cure} If {small!r} is small because it is "
        "solved, drop it or leave this be.",
    )


def _another_gradient(seen: History) -> Iterator[Finding]:
    there = np.array([_there(seen, name) for name in seen.loss_weights])
    weights = np.where(there, list(seen.loss_weights.values()), 0.0)
    if seen.data_gradient is None or not seen.losses or np.any(weights.sum(0) > 1.1):
        return  # Not known, or of several LossLogits together.
    losses = [seen.losses[name] for name in seen.loss_weights]
    terms = weights * np.where(there, losses, 0.0)
    slopes = terms - weights * terms.sum(axis=0)
    squares = slopes**2
    # The primary loss, which is not known here, has no slope of its own.
    left_out = np.sum(squares, axis=0) - np.array([0 * squares[0], *squares])
    sizes = np.sqrt(np.maximum(left_out, 0))
    ratios = seen.data_gradient / np.where(
        sizes > 1e-4 * np.max(np.abs(terms), axis=0), sizes, np.nan
    )
    distance = np.min(np.abs(np.log(ratios)), axis=0)
    if not nearly_all(-distance) < -np.log(_OTHER_GRADIENT):
        return
    yield Finding(
        "gradient",
        tuple(seen.loss_weights),
        f"The gradient of the loss logits that arrives is {np.median(ratios[0]):.2g} "
        "times that of the composite loss of the recorded losses, in the median of the "
        f"{_rows(seen)}. monitoring.record must be the first link of the chain, where "
        "updates are gradients still; its losses= must be those that are "
        "differentiated, averaged over devices as the gradients are. If the loss is "
        "scaled on purpose, leave this be.",
    )


def nearly_all(values: np.ndarray) -> np.ndarray:
    """Upper 90 % quantile on the last axis; infinite if more than 10 % are NaN."""
    known = np.where(np.isnan(values), np.inf, values)
    return np.quantile(known, _NEARLY_ALL, axis=-1, method="higher")


def _rows(seen: History) -> str:
    return f"last {len(seen.steps)} rows (steps {seen.steps[0]} to {seen.steps[-1]})"


def some(shown: Iterable[str]) -> str:
    """Lists the first few, and the number of further ones."""
    shown = list(shown)
    rest = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + rest
