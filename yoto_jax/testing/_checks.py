"""The contract of a weighting, one function for each promise."""

import types
from collections.abc import Callable, Mapping
from typing import Any

from yoto_jax._losses import Losses
from yoto_jax._weighting import LossWeighting
from yoto_jax.testing._steps import (
    check_bad_batches,
    check_eager,
    check_gradient,
    check_precision,
    check_scan_and_vmap,
    check_training,
    check_zero_gradients,
)
from yoto_jax.testing._trial import Trial
from yoto_jax.testing._updates import (
    check_absent_losses,
    check_bad_numbers,
    check_errors,
    check_fewer_losses,
    check_order,
    check_promotion,
    check_state,
)


def check_weighting(
    weighting: LossWeighting,
    losses: Losses = None,
    *,
    about: str | int | None = None,
    statistics: Mapping[str, Callable[..., Any]] | None = None,
    order_matters: bool = False,
) -> None:
    """Checks the whole contract of a weighting on a small problem.

    Types that never change, one trace, the same under ``scan`` and ``vmap``, the
    gradient of the weighted sum, batches that are not finite, absent losses, low
    precision and double, the order of the losses, and errors that name what is wrong.

    Args:
      weighting: What is checked.
      losses: A tree whose structure the losses have, see :class:`Trial`.
      about: The loss that it singles out, such as a primary one, see :class:`Trial`.
      statistics: Functions for statistics of its own, see :class:`Trial`.
      order_matters: Whether weights may depend on the place of a loss among the others.

    Returns:
      None.

    Raises:
      AssertionError: It does not keep a promise; the message says which.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax.testing import check_weighting
      >>> def update(losses, inner, spec):
      ...     return spec.softmax(losses), inner
      >>> check_weighting(yoto.make_weighting(lambda spec: (), update))
    """
    trial = Trial(weighting, losses, about=about, statistics=statistics)
    for name, check in _CHECKS.items():
        if not (order_matters and name in ("fewer losses", "order")):
            check(trial)


_CHECKS: Mapping[str, Callable[[Trial], None]] = types.MappingProxyType(
    {
        "state": check_state,
        "training": check_training,
        "eager": check_eager,
        "scan and vmap": check_scan_and_vmap,
        "gradient": check_gradient,
        "zero gradients": check_zero_gradients,
        "bad batches": check_bad_batches,
        "bad numbers": check_bad_numbers,
        "absent losses": check_absent_losses,
        "fewer losses": check_fewer_losses,
        "order": check_order,
        "precision": check_precision,
        "promotion": check_promotion,
        "errors": check_errors,
    }
)


def checks() -> Mapping[str, Callable[[Trial], None]]:
    """What :func:`check_weighting` checks of a :class:`Trial`, one by one.

    Returns:
      A read-only mapping of names to functions that raise ``AssertionError``, in the
      order in which :func:`check_weighting` calls them.

    Examples:
      >>> import yoto_jax as yoto
      >>> from yoto_jax.testing import Trial, checks
      >>> trial = Trial(yoto.weightings.random())
      >>> for name in ("state", "bad numbers", "absent losses"):
      ...     checks()[name](trial)
    """
    return _CHECKS
