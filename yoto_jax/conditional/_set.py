"""An objective for a few models that share many losses."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_positive
from yoto_jax._losses import Losses, PyTree, Weights, path_name
from yoto_jax._numerics import upcast
from yoto_jax.conditional._objective import smooth_chebyshev, smooth_maximum


def smooth_chebyshev_set(
    losses: Losses,
    weights: Weights,
    *,
    smoothing: float = 1.0,
    ideal: PyTree = 0.0,
) -> jax.Array:
    r"""Smooth Chebyshev of a set of models: each loss counts where it is smallest.

    .. math::
      \mu \log \sum_i \exp \frac{\lambda_i (m_i - z_i)}{\mu}, \qquad
      m_i = -\mu \log \sum_k \exp \frac{-l_i(x_k)}{\mu}

    for loss i of model k. With little smoothing it is the largest weighted loss, each
    taken of the model that does best on it: a few models share many losses among them.
    With one model it is :func:`smooth_chebyshev`.

    Args:
      losses: Tree of arrays ``(k, ...)`` of one shape, with the models on the first
        axis, as ``jax.vmap`` of a loss function over stacked parameters returns them.
      weights: Tree like the losses, arrays of the remaining shape: scalars for losses
        ``(k,)``. They are the same for all models.
      smoothing: The :math:`\mu` of both, in the unit of the losses; positive.
      ideal: The :math:`z_i`, as in :func:`smooth_chebyshev`.

    Returns:
      Array of the remaining shape: a scalar for losses ``(k,)``.

    Raises:
      ValueError: A loss has no axis of models, shapes or trees do not match, ``ideal``
        does not fit the losses, or ``smoothing`` is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> targets = jnp.array([0.0, 0.1, 0.9, 1.0])  # four losses, two models
      >>> loss_fn = lambda x: [(x - target) ** 2 for target in targets]
      >>> def composite(xs):
      ...     losses = jax.vmap(loss_fn)(xs)
      ...     return conditional.smooth_chebyshev_set(losses, [1.0] * 4, smoothing=0.01)
      >>> step = jax.jit(lambda xs: xs - 0.1 * jax.grad(composite)(xs))
      >>> xs = jnp.array([0.4, 0.6])
      >>> for _ in range(200):
      ...     xs = step(xs)
      >>> print(xs.round(2))
      [0.05 0.95]

    References:
      Lin et al., `Few for Many <https://arxiv.org/abs/2405.19650>`_, 2024, Eq. 8, with
      one :math:`\mu` for all soft minima, as in their experiments.
    """
    check_positive(smoothing=smoothing)

    def soft_minimum(path: tuple[object, ...], x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0:
            raise ValueError(
                f"loss {path_name(path)!r} must have an axis of models, got a scalar."
            )
        return -smooth_maximum(-upcast(jnp.asarray(x)), smoothing, axis=0)

    smallest = jax.tree.map_with_path(soft_minimum, losses)
    shapes = sorted({jnp.shape(x) for x in jax.tree.leaves(losses)})
    if len(shapes) > 1:
        raise ValueError(f"all losses must have one shape, got {shapes}.")
    return smooth_chebyshev(smallest, weights, smoothing=smoothing, ideal=ideal)
