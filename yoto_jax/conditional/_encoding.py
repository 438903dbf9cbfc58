"""Encoding of loss weights as network inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import Weights
from yoto_jax.conditional._distributions import Distribution


def encode(weights: Weights, support: Distribution) -> jax.Array:
    r"""Encodes loss weights as network inputs.

    .. math::
      u_i = 2\, \frac{\log \lambda_i - \log \mathrm{low}_i}
                     {\log \mathrm{high}_i - \log \mathrm{low}_i} - 1
      \qquad (\text{LogUniform; without logarithms for Uniform and Dirichlet})

    Pinned weights carry no information and are dropped.

    Args:
      weights: Tree of arrays like the losses, all of shape ``(n,)``, or of scalars.
      support: The distribution that the model is trained with, as it was at the start.

    Returns:
      Float32 array ``(n, E)``, or ``(E,)`` for scalars, of ``E =``
      :func:`encoding_size`, within [-1, 1].

    Raises:
      TypeError: ``support`` is no distribution.
      ValueError: The weights do not match the support, have different shapes, or lie
        outside: a model knows nothing of weights it was not trained for. Under ``jit``
        and ``vmap``, where values are not known, each weight outside counts as the
        nearest one inside its own range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform({"fit": 1, "kl": 0.01}, {"fit": 1, "kl": 1})
      >>> weights = {"fit": jnp.ones(3), "kl": jnp.array([0.01, 0.1, 1.0])}
      >>> print(conditional.encode(weights, support).round(3))
      [[-1.]
       [ 0.]
       [ 1.]]

    References:
      Dosovitskiy and Djolonga, `You Only Train Once: Loss-Conditional Training of Deep
      Networks <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.

    .. warning::
      The authors' networks see raw logarithms of all weights. Standardising is ours.
    """
    _check_support(support)
    vectors = support.vectors(weights)
    _check_known(weights, vectors, support)
    varying = np.flatnonzero(np.array(support.free))
    return 2 * support.positions(vectors)[..., varying] - 1


def encoding_size(support: Distribution) -> int:
    """Returns the number of features of :func:`encode`, one for each free weight.

    Args:
      support: The distribution that the model is trained with.

    Returns:
      The number E, an ``int``.

    Raises:
      TypeError: ``support`` is no distribution.

    Examples:
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform({"fit": 1, "kl": 0.01}, {"fit": 1, "kl": 1})
      >>> conditional.encoding_size(support)
      1
    """
    _check_support(support)
    return sum(support.free)


def _check_known(weights: Weights, vectors: jax.Array, support: Distribution) -> None:
    """Raise if weights whose values are known lie outside the support."""
    arrays = (vectors, *jax.tree.leaves(support))
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return
    # Rounding to a narrow dtype may move a weight at the edge of its range outside.
    kinds = [jnp.result_type(x) for x in jax.tree.leaves(weights)]
    narrow = [k for k in kinds if jnp.issubdtype(k, jnp.floating)]
    slack = max([1e-4, *(float(jnp.finfo(k).eps) for k in narrow)])
    if trouble := support.outside(np.asarray(vectors, np.float64), slack):
        raise ValueError(f"{trouble}.")


def _check_support(support: Distribution) -> None:
    if not isinstance(support, Distribution):
        raise TypeError(
            "support must be a distribution, such as conditional.LogUniform(...), got "
            f"{type(support).__name__}."
        )
