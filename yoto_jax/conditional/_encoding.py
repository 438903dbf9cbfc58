"""Encoding of loss weights as network inputs."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import check_integers
from yoto_jax._losses import PyTree
from yoto_jax.conditional._distributions import Box, Distribution

Transform = Literal["standardize", "log"]


def encode(
    weights: PyTree,
    support: Distribution,
    *,
    fourier: int = 0,
    transform: Transform = "standardize",
) -> jax.Array:
    r"""Encodes loss weights as network inputs.

    .. math::
      u_i = 2\, \frac{\log \lambda_i - \log \mathrm{low}_i}
                     {\log \mathrm{high}_i - \log \mathrm{low}_i} - 1
      \qquad (\text{LogUniform; without logarithms for Uniform and Dirichlet})

    Pinned weights carry no information and are dropped.

    Args:
      weights: Tree of arrays like the losses, all of shape ``(n,)``, or of scalars.
      support: The distribution that the model is trained with, as it was at the start.
      fourier: Number of octaves F of further features :math:`\sin(2^k \pi u_i),
        \cos(2^k \pi u_i),\ k < F`, for models that have to react sharply.
      transform: ``"standardize"`` as above, or ``"log"``: raw logarithms of all
        weights, pinned ones too, in the order of ``jax.tree.leaves``.

    Returns:
      Float32 array ``(n, E)``, or ``(E,)`` for scalars, of ``E =``
      :func:`encoding_size`. Within [-1, 1] if standardised.

    Raises:
      TypeError: ``support`` is no distribution, or ``fourier`` no integer.
      ValueError: The weights do not match the support, have different shapes, or lie
        outside (under ``jit`` and ``vmap`` each counts as the nearest one inside);
        unknown options; or ``"log"`` for weights that can be 0.

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
      The reference takes raw logarithms, ``transform="log"``; standardising is ours.
    """
    _check_options(support, fourier, transform)
    vectors = support.vectors(weights)
    _check_known(weights, vectors, support)
    if isinstance(support, Box) and transform == "log":
        features = jnp.log(support.nearest(vectors))
    else:
        varying = np.flatnonzero(np.array(support.free))
        features = 2 * support.positions(vectors)[..., varying] - 1
    octaves = [2**k * jnp.pi * features for k in range(fourier)]
    waves = [wave(x) for x in octaves for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([features, *waves], axis=-1)


def encoding_size(
    support: Distribution, *, fourier: int = 0, transform: Transform = "standardize"
) -> int:
    """Returns the number of features that :func:`encode` gives.

    Args:
      support: The distribution that the model is trained with.
      fourier: As in :func:`encode`.
      transform: As in :func:`encode`.

    Returns:
      The number E, an ``int``.

    Raises:
      TypeError: ``support`` is no distribution, or ``fourier`` no integer.
      ValueError: Unknown options; or ``"log"`` for weights that can be 0.

    Examples:
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform({"fit": 1, "kl": 0.01}, {"fit": 1, "kl": 1})
      >>> conditional.encoding_size(support)
      1
      >>> conditional.encoding_size(support, fourier=2)
      5
    """
    _check_options(support, fourier, transform)
    base = len(support.free) if transform == "log" else sum(support.free)
    return base * (1 + 2 * fourier)


def _check_known(weights: PyTree, vectors: jax.Array, support: Distribution) -> None:
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


def _check_options(support: Distribution, fourier: int, transform: str) -> None:
    if not isinstance(support, Distribution):
        raise TypeError(
            "support must be a distribution, such as conditional.LogUniform(...), got "
            f"{type(support).__name__}."
        )
    check_integers(fourier=fourier)
    if fourier < 0:
        raise ValueError(f"fourier must not be negative, got {fourier}.")
    if transform not in ("standardize", "log"):
        raise ValueError(
            f"transform must be 'standardize' or 'log', got {transform!r}."
        )
    if transform == "standardize":
        return
    if not isinstance(support, Box):
        raise ValueError("weights that sum to 1 can be 0: they have no logarithm.")
    known = not isinstance(support.low, jax.core.Tracer)
    if known and not (np.asarray(support.low) > 0).all():
        raise ValueError(f"transform 'log' needs positive weights, got {support}.")
