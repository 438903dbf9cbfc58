"""Weights from the neural tangent kernel."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._checks import check_positive
from yoto_jax._jaxlib import check_jaxlib
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import Params, PyTree
from yoto_jax._numerics import upcast
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._averages import averaged, bounded_ratio


def ntk(
    *,
    decay: float = 0.9,
    reduction: Literal["mean", "sum"] = "mean",
    eps: float = 1e-6,
) -> LossWeighting:
    r"""Weights that make all terms converge at the same rate of the tangent kernel.

    .. math::
      \hat w_i = \frac{\bar K}{K_i}, \qquad
      K_i = \frac1{N_i} \sum_x \left\| \nabla_\theta r_i(x; \theta) \right\|^2, \qquad
      w \leftarrow \beta w + (1 - \beta) \hat w,

    where :math:`r_i(x; \theta)` is the residual, or the prediction, of term i at the
    point x, and :math:`\bar K` the mean of the :math:`K_j`, which come from
    :func:`yoto_jax.weightings.ntk_diagonal`. The average starts at 1.

    Args:
      decay: :math:`\beta` of the moving average, in [0, 1).
      reduction: Whether :math:`\bar K` is the mean of the :math:`K_j` or, as in the
        paper, their sum. Together with traces :math:`N_i K_i` in place of the means,
        the sum gives the weights of the paper.
      eps: Relative to :math:`\bar K`: :math:`\hat w` is at most 1/eps, which is what a
        term without a gradient gets.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs
      ``ntk_diagonal``, (K,) or a tree like the losses. The kernel is expensive: run it
      every k updates alone, see :func:`yoto_jax.weightings.every`.

    Raises:
      ValueError: An option out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"boundary": 0.1, "residual": 4.0}
      >>> weighting = yoto.weightings.ntk(decay=0.0)
      >>> state, diagonal = weighting.init(losses), jnp.array([1.0, 9.0])
      >>> weights, state = weighting.update(losses, state, ntk_diagonal=diagonal)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'boundary': 5.0, 'residual': 0.556}

    References:
      Wang, Yu and Perdikaris, `When and why PINNs fail to train: A neural tangent
      kernel perspective <https://arxiv.org/abs/2007.14527>`_, 2020.
      With the mean: Wang et al., `An Expert's Guide
      <https://arxiv.org/abs/2308.08468>`_, 2023, in its code, jaxpi.

    .. warning::
      NVIDIA's rule of this name is :func:`ntk_surrogate`.
    """
    check_positive(eps=eps)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")

    def target(
        losses: jax.Array, spec: LossSpec, *, ntk_diagonal: jax.Array
    ) -> jax.Array:
        total = (spec.mean if reduction == "mean" else spec.sum)(ntk_diagonal)
        return bounded_ratio(total, ntk_diagonal, eps)

    return averaged(target, decay, ("ntk_diagonal",))


def ntk_surrogate(*, decay: float = 0.9, eps: float = 1e-6) -> LossWeighting:
    r"""A cheap stand-in for the tangent kernel, as in NVIDIA's PhysicsNeMo.

    .. math::
      \hat w_i = \frac{\sum_j K_j}{K_i}, \qquad
      K_i = \left\| \nabla_\theta \sqrt{L_i} \right\| = \frac{n_i}{2 \sqrt{L_i}}, \qquad
      w \leftarrow \beta w + (1 - \beta) \hat w,

    where :math:`n_i` is the gradient norm of the loss without its weight. The average
    starts at 1 and includes the gradients of the present update.

    Args:
      decay: :math:`\beta` of the moving average, in [0, 1).
      eps: Relative to the sum: :math:`\hat w` is at most 1/eps, which is what a loss
        without a gradient gets.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses, which needs the gradient
      norms; its weights are positive, with a harmonic mean near K.

    Raises:
      ValueError: ``decay`` is not in [0, 1), or ``eps`` is not positive. In ``update``
        outside ``jit``: a loss is not positive. Inside ``jit`` such a batch leaves the
        weights as they were.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"boundary": 0.25, "residual": 4.0}
      >>> weighting = yoto.weightings.ntk_surrogate(decay=0.0)
      >>> state, norms = weighting.init(losses), jnp.array([1.0, 12.0])
      >>> weights, state = weighting.update(losses, state, norms=norms)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'boundary': 4.0, 'residual': 1.333}

    References:
      NVIDIA, `PhysicsNeMo Sym <https://github.com/NVIDIA/physicsnemo-sym>`_, 2025,
      where it is called NTK.

    .. warning::
      This is not the diagonal of the tangent kernel, see :func:`ntk` for that. A mean
      of squares over many points has one gradient, the kernel one for every point; and
      the kernel squares its norms.
    """
    check_positive(eps=eps)

    def target(losses: jax.Array, spec: LossSpec, *, norms: jax.Array) -> jax.Array:
        slopes = norms / (2.0 * jnp.sqrt(losses))
        return bounded_ratio(spec.sum(slopes), slopes, eps)

    return averaged(target, decay, ("losses", "norms"), positive=True)


def ntk_diagonal(
    residual_fn: Callable[[Any, Any], jax.Array],
    params: Params,
    points: PyTree,
    *,
    batch_size: int | None = None,
) -> jax.Array:
    r"""Mean over points of the squared gradient norm of a residual.

    .. math::
      \frac1N \sum_x \left\| \nabla_\theta r(x; \theta) \right\|^2,

    the trace of the tangent kernel of r over the number of points.

    Args:
      residual_fn: ``residual_fn(params, point) -> scalar``, r at a single point.
      params: Parameters :math:`\theta`, a tree of floating-point arrays.
      points: Points x, an array or a tree of arrays with a leading axis of length N.
      batch_size: How many points to differentiate at once; all of them if none is
        given, which holds N gradients in memory.

    Returns:
      A float32 scalar (float64 if the gradients are), not negative.

    Raises:
      TypeError: The residual is not a scalar.
      ValueError: There are no points, or leading axes that differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> points = jnp.array([1.0, 2.0, 3.0])
      >>> residual = lambda params, x: params["w"] * x + params["b"]  # Gradient (x, 1).
      >>> params = {"w": jnp.float32(0.5), "b": jnp.float32(0.0)}
      >>> print(round(float(yoto.weightings.ntk_diagonal(residual, params, points)), 3))
      5.667

    References:
      Wang, Yu and Perdikaris, `When and why PINNs fail to train: A neural tangent
      kernel perspective <https://arxiv.org/abs/2007.14527>`_, 2020.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(points)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            "points must have one leading axis, of the same positive length in every "
            f"leaf, got {[jnp.shape(leaf) for leaf in jax.tree.leaves(points)]}."
        )

    check_jaxlib()

    def squared_norm(point: Any) -> jax.Array:
        gradient = jax.grad(residual_fn)(params, point)
        squares = [jnp.sum(upcast(leaf) ** 2) for leaf in jax.tree.leaves(gradient)]
        return jnp.sum(jnp.stack(squares))

    if batch_size is None:
        return jnp.mean(jax.vmap(squared_norm)(points))
    return jnp.mean(lax.map(squared_norm, points, batch_size=batch_size))
