"""Weightings to race when nothing is known of the losses."""

from collections.abc import Sequence

from yoto_jax._checks import check_counts, check_positive
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._grad_norm_balance import calibrated
from yoto_jax.weightings._static import equal


def portfolio(
    primary: str | int, steps: int, *, shares: Sequence[float] = (0.1, 1.0, 10.0)
) -> dict[str, LossWeighting]:
    r"""Makes arms for unknown losses: equal weights, and weights by gradient norms.

    For each share c the weights make the gradient of every auxiliary loss c times as
    long as that of the primary one, over the first two per cent of the steps, and are
    held from then on: :func:`yoto_jax.weightings.calibrated`.

    Args:
      primary: The path of the primary loss, or its index in a sequence of losses.
      steps: Of the lane that wins, as in :func:`plan`.
      shares: c, positive: one arm for each.

    Returns:
      Weightings by name, for :func:`one_of` and :func:`alone`.

    Raises:
      ValueError: A share or ``steps`` is not positive, or two shares are equal.

    Examples:
      >>> import yoto_jax as yoto
      >>> arms = yoto.racing.portfolio("ce", steps=4000)
      >>> print(*arms, sep=", ")
      equal, share 0.1, share 1, share 10
      >>> race = yoto.racing.plan(4000, len(arms), cuts=[(0.2, 1)])
      >>> print(f"{race.runs:.1f} runs")
      1.6 runs

    .. note::
      What it is worth on our problems: ``docs/understand/search.md``.
    """
    check_counts(steps=steps)
    for share in shares:
        check_positive(share=share)
    arms = {f"share {c:g}": calibrated(primary, steps, share=c) for c in shares}
    if len(arms) < len(shares):
        raise ValueError(f"shares must differ, got {tuple(shares)}.")
    return {"equal": equal(), **arms}
