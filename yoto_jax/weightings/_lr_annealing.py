"""Learning rate annealing for physics-informed networks."""

from typing import Any, Literal

import jax

from yoto_jax._checks import check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._averages import averaged, bounded_ratio


def lr_annealing(
    reference: str | int,
    *,
    decay: float = 0.9,
    statistic: Literal["max", "mean"] = "max",
    eps: float = 1e-6,
) -> LossWeighting:
    r"""Weights that bring all gradients to the size of one loss's gradient.

    .. math::
      \hat w_i = \frac{\max_\theta |\nabla L_r|}{\mathrm{mean}_\theta |\nabla L_i|},
      \qquad w_i \leftarrow \beta w_i + (1 - \beta) \hat w_i, \qquad w_r = 1,

    with the largest and the mean absolute entry of the gradients. The average starts at
    1 and includes the gradients of the present update.

    Args:
      reference: r, the residual of the equation in the paper: the path of one loss, or
        its index in a sequence of losses.
      decay: :math:`\beta` of the moving average, in [0, 1); :math:`1 - \alpha` in the
        paper.
      statistic: ``"max"`` as above, or ``"mean"`` for the mean of the reference
        gradient as well, as in NVIDIA's PhysicsNeMo.
      eps: :math:`\hat w` is at most 1/eps, which is what a loss without a gradient
        gets.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs absolute
      values of the gradients; its weights are not negative, and 1 for the reference.

    Raises:
      ValueError: An option out of its range. In ``init``: an unknown ``reference``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"boundary": 0.1, "residual": 4.0}
      >>> weighting = yoto.weightings.lr_annealing("residual")
      >>> seen = {"max_abs": jnp.array([0.5, 2.0]), "mean_abs": jnp.array([0.1, 0.4])}
      >>> weights, state = weighting.update(losses, weighting.init(losses), **seen)
      >>> print({name: round(float(w), 2) for name, w in weights.items()})
      {'boundary': 2.9, 'residual': 1.0}

    References:
      Wang, Teng and Perdikaris, `Understanding and mitigating gradient pathologies in
      physics-informed neural networks <https://arxiv.org/abs/2001.04536>`_, 2020,
      Algorithm 1.

    .. warning::
      Means are taken of the absolute values, over all entries at once; an absolute
      value of a mean, or a mean of means over layers, is another rule.
    """
    check_positive(eps=eps)
    if statistic not in ("max", "mean"):
        raise ValueError(f"statistic must be 'max' or 'mean', got {statistic!r}.")
    needs = ("max_abs", "mean_abs") if statistic == "max" else ("mean_abs",)

    def position(spec: LossSpec) -> int:
        return spec.position("reference", reference)

    def target(
        losses: jax.Array, spec: LossSpec, *, mean_abs: jax.Array, **rest: jax.Array
    ) -> jax.Array:
        r = position(spec)
        size = rest["max_abs"][r] if statistic == "max" else mean_abs[r]
        return bounded_ratio(size, mean_abs, eps).at[r].set(1.0)

    def learns(spec: LossSpec, **statistics: jax.Array) -> Any:
        return True if spec.present is None else spec.present[position(spec)]

    return averaged(target, decay, needs, check=position, learns=learns)
