"""Where a weighting with a downstream loss looks at that loss."""

import dataclasses
from typing import Any

import jax

from yoto_jax._checks import check_flag, check_not_negative
from yoto_jax._weighting import LossWeighting


@dataclasses.dataclass(frozen=True, eq=False)
class Steering:
    """The choice that :func:`on_training` or :func:`on_validation` makes."""

    validation: bool = False
    all_losses: bool = False
    lookahead: Any = 0.0

    @property
    def looks_ahead(self) -> bool:
        """Whether a virtual step is computed: one of traced length may be."""
        at_once = isinstance(self.lookahead, int | float) and self.lookahead == 0
        return not at_once

    @property
    def moves(self) -> bool:
        """Whether the downstream gradient is taken apart from the other gradients."""
        return self.looks_ahead or (self.validation and not self.all_losses)

    def check(self, weighting: LossWeighting) -> None:
        """Raise unless the weighting can be steered this way."""
        if not self.validation and not self.looks_ahead:
            return
        if weighting.downstream is None:
            raise ValueError(
                "steering= is for weightings that follow a downstream loss, such as "
                "yoto.weightings.grap('label'): leave it out."
            )
        if self.moves and not {"gramian", "alignment"} & set(weighting.needs):
            raise ValueError(
                "steering= moves the downstream gradient, which this weighting never "
                f"sees: it needs {weighting.needs} alone."
            )

    def take(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of the validation batch, and those of the training batch."""
        if not self.validation:
            return (), args
        if not args:
            raise TypeError(
                "with steering=on_validation(), give the arguments of the validation "
                "batch after the state: fn(params, state, (held_out,), batch)."
            )
        validation, *rest = args
        if not isinstance(validation, tuple):
            raise TypeError(
                "with steering=on_validation(), what follows the state must be a tuple "
                "of arguments in place of the training batch's, such as (held_out,), "
                f"got {type(validation).__name__}."
            )
        return validation, tuple(rest)


def on_training(*, lookahead: jax.typing.ArrayLike = 0.0) -> Steering:
    r"""Takes the downstream gradient on the training batch: the default.

    .. math::
      d = \nabla L_\text{down}\Bigl(\theta - \eta \sum_k w_k \nabla L_k(\theta)\Bigr)

    Args:
      lookahead: :math:`\eta`, the learning rate of a virtual step with the weights used
        last. The downstream gradient is taken after it; 0 means no step.

    Returns:
      The value of ``steering=`` in :func:`yoto_jax.value_and_grad`.

    Raises:
      ValueError: ``lookahead`` is negative.

    Examples:
      >>> import yoto_jax as yoto
      >>> loss_fn = lambda w: {"label": (w - 1) ** 2, "aux": w**2, "far": (w - 3) ** 2}
      >>> weighting = yoto.weightings.auto_lambda("label")
      >>> step = yoto.value_and_grad(
      ...     loss_fn, weighting, steering=yoto.on_training(lookahead=0.1)
      ... )
      >>> losses, grad, state = step(0.0, weighting.init(loss_fn(0.0)))
      >>> print(losses["far"])
      9.0

    References:
      Liu et al., `Auto-Lambda <https://arxiv.org/abs/2202.03091>`_, 2022, for the
      virtual step.
    """
    check_not_negative(lookahead=lookahead)
    return Steering(lookahead=lookahead)


def on_validation(
    *, all_losses: bool = False, lookahead: jax.typing.ArrayLike = 0.0
) -> Steering:
    r"""Takes the downstream gradient on a separate validation batch.

    The function that :func:`yoto_jax.value_and_grad` returns then takes the arguments
    of that batch, a tuple, after the state: ``fn(params, state, (held_out,), batch)``.

    Args:
      all_losses: True: all gradients come from the validation batch. False: only the
        downstream gradient does, and its inner products with those of the training
        batch are exact directional derivatives (``jax.jvp``).
      lookahead: Learning rate of a virtual step before the downstream gradient, see
        :func:`on_training`.

    Returns:
      The value of ``steering=`` in :func:`yoto_jax.value_and_grad`.

    Raises:
      ValueError: ``lookahead`` is negative.

    Examples:
      >>> import yoto_jax as yoto
      >>> def loss_fn(w, x):
      ...     return {"label": (w - x) ** 2, "aux": w**2, "far": (w - 3) ** 2}
      >>> weighting = yoto.weightings.grap("label")
      >>> step = yoto.value_and_grad(loss_fn, weighting, steering=yoto.on_validation())
      >>> state = weighting.init({"label": 0.0, "aux": 0.0, "far": 0.0})
      >>> losses, grad, state = step(1.0, state, (2.0,), 0.5)
      >>> print(losses["label"])
      0.25

    References:
      Karpukhin and Savchenko, `When Losses Align <https://arxiv.org/abs/2605.07756>`_,
      2026.
    """
    check_not_negative(lookahead=lookahead)
    check_flag(all_losses=all_losses)
    return Steering(validation=True, all_losses=all_losses, lookahead=lookahead)
