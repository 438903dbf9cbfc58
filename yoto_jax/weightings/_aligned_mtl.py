"""Aligned multi-task learning."""

from typing import Literal

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import dot, spectrum, unit_trace
from yoto_jax._weighting import LossWeighting


def aligned_mtl(
    *, preference: PyTree = None, scale: Literal["min", "median", "mean"] = "min"
) -> LossWeighting:
    r"""Aligns the principal components of the gradients: condition number 1.

    The gradients are replaced by the orthogonal ones of equal norm that are closest to
    them, and those are combined as the preference says:

    .. math::
      G = V \mathrm{diag}(l) V^\top, \qquad
      w = \sqrt{s}\; V_r\, \mathrm{diag}(l_r)^{-1/2}\, V_r^\top p

    over the eigenvalues :math:`l_r` above rounding, where s is the smallest of them.

    Args:
      preference: p, one number per loss or one for all. 1/K if none is given; the
        authors' code has 1, which gives K times the gradient.
      scale: What s is of the eigenvalues: ``"min"`` as in the paper, ``"median"`` or
        ``"mean"``.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the Gramian; its weights have at most
      the Euclidean norm of the preference, and are 0 if all gradients are zero.

    Raises:
      ValueError: ``scale`` is none of these. In ``init`` and ``update``: the preference
        does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> weighting = yoto.weightings.aligned_mtl()
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # One gradient per row.
      >>> weights, _ = weighting.update(losses, weighting.init(losses), gramian=J @ J.T)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.559, 'b': 0.408}

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, 2023, Eq. 9 and Algorithm 1.

    .. warning::
      Weights may be negative. Gradients that nearly depend on each other linearly give
      a small s and small steps, and s jumps when an eigenvalue falls below rounding, K
      eps of the largest as in the authors' code: in float32 a gradient 2,000 times
      shorter than another one has the weight 0.
    """
    if scale not in ("min", "median", "mean"):
        raise ValueError(f"scale must be 'min', 'median' or 'mean', got {scale!r}.")

    def preferred(spec: LossSpec) -> jax.Array:
        return spec.preference(preference)

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses
        values, vectors, kept = spectrum(unit_trace(gramian))
        size, rank = spec.size, jnp.sum(kept)
        if scale == "mean":
            square = jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1)
        elif scale == "median":  # they ascend: the middle of the last ones
            low, high = (2 * size - rank - 1) // 2, (2 * size - rank) // 2
            middle = jnp.clip(jnp.stack([low, high]), 0, size - 1)
            square = jnp.mean(values[middle])
        else:
            square = values[jnp.clip(size - rank, 0, size - 1)]
        ratios = jnp.where(kept, square / jnp.where(kept, values, 1), 0)
        aligned = jnp.sqrt(ratios) * dot(vectors.T, preferred(spec))
        return dot(vectors, aligned), inner

    return make_weighting(
        lambda spec: (), update, needs=("gramian",), first_weights=preferred
    )
