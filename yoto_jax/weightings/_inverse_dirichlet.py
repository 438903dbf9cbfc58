"""Inverse Dirichlet weighting of physics-informed networks."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._averages import averaged, bounded_ratio


def inverse_dirichlet(*, decay: float = 0.5, eps: float = 1e-6) -> LossWeighting:
    r"""Weights that give the entries of all gradients one standard deviation.

    .. math::
      \hat w_i = \frac{\max_j \mathrm{std}_\theta \nabla L_j}
      {\mathrm{std}_\theta \nabla L_i}, \qquad
      w_i \leftarrow \beta w_i + (1 - \beta) \hat w_i,

    with standard deviations over all entries of a gradient. The average starts at 1 and
    includes the gradients of the present update.

    Args:
      decay: :math:`\beta` of the moving average, in [0, 1); :math:`\alpha` in the
        paper.
      eps: :math:`\hat w` is at most 1/eps, which is what a loss without a gradient
        gets.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs the
      standard deviations; its weights are at least 1.

    Raises:
      ValueError: ``decay`` is not in [0, 1), or ``eps`` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"boundary": 0.1, "residual": 4.0}
      >>> weighting = yoto.weightings.inverse_dirichlet()
      >>> std = jnp.array([0.5, 2.0])
      >>> weights, _ = weighting.update(losses, weighting.init(losses), std=std)
      >>> print({name: round(float(w), 2) for name, w in weights.items()})
      {'boundary': 2.5, 'residual': 1.0}

    References:
      Maddu et al., `Inverse Dirichlet Weighting Enables Reliable Training of Physics
      Informed Neural Networks <https://arxiv.org/abs/2107.00940>`_, 2021.

    .. warning::
      The weight of a loss without a gradient is bounded, and in the paper infinite.
      Where the entries of a gradient have a mean near zero, its standard deviation is
      its norm but for a constant factor, and this is
      :func:`yoto_jax.weightings.grad_norm_balance` with another common factor.
    """
    check_positive(eps=eps)

    def target(losses: jax.Array, spec: LossSpec, *, std: jax.Array) -> jax.Array:
        del losses
        return bounded_ratio(jnp.max(std), std, eps)

    return averaged(target, decay, ("std",))
