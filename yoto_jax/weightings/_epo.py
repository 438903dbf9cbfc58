"""Exact Pareto optimality along a ray of preferences."""

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_all_positive, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import safe_divide, solve_simplex_qp
from yoto_jax._weighting import LossWeighting


def epo(
    *, preference: PyTree = None, ideal: PyTree = 0.0, horizon: float = 1.0
) -> LossWeighting:
    r"""Descends to the point of the Pareto front where all weighted losses are equal.

    With :math:`d_k = p_k (L_k - z_k)`, the weighted losses, and :math:`h_k = p_k g_k`,
    their gradients, the weights are in the ratios of :math:`p_k \lambda_k`, where

    .. math::
      \lambda = \arg\max_{\lambda \ge 0,\; 1^\top \lambda = 1}\
      \sum_k \lambda_k d_k - \frac\eta2 \Bigl\| \sum_k \lambda_k h_k \Bigr\|^2,
      \qquad \eta = \tau \frac{\sum_k |d_k|}{\sum_k \|h_k\|^2} .

    The largest weighted loss falls; others may rise, and so it goes along a front of
    any shape. If the front misses the ray, it stops where the largest one is least.

    Args:
      preference: p, one positive number per loss, in a tree like the losses or in their
        order; equal if none is given. In the end L - z is in the ratios of 1/p.
      ideal: z, the best values of the losses, given likewise, or one number.
      horizon: :math:`\tau`, how far ahead losses are taken as linear, in the time in
        which one comes down to z: long is slow, short goes to and fro about the ray.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the losses and the Gramian; its
      weights are non-negative, many of them exactly zero, and sum to 1.

    Raises:
      ValueError: ``preference`` or ``horizon`` is not positive. In ``init``: an
        argument does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> weighting = yoto.weightings.epo(preference={"a": 4.0, "b": 1.0})
      >>> losses, gramian = {"a": 1.0, "b": 3.0}, jnp.array([[1.0, -1.0], [-1.0, 4.0]])
      >>> state = weighting.init(losses)
      >>> weights, _ = weighting.update(losses, state, gramian=gramian)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'a': 0.717, 'b': 0.283}

    References:
      Mahapatra and Rajan, `Multi-Task Learning with User Preferences: Gradient Descent
      with Controlled Ascent in Pareto Optimization
      <https://proceedings.mlr.press/v119/mahapatra20a.html>`_, 2020.

    .. warning::
      The paper has two linear programmes and a threshold between them, within which it
      may stop beside the ray; here it is one, quadratic: the documentation derives it.
    """
    check_all_positive(preference=preference)
    check_positive(horizon=horizon)

    def init(spec: LossSpec) -> tuple[()]:
        spec.ratios(preference)  # They have to fit the losses.
        spec.vector("ideal", ideal)
        return ()

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, gramian: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        p = spec.of_present(spec.ratios(preference))
        p = p / jnp.maximum(jnp.max(p), jnp.finfo(p.dtype).tiny)  # no overflow
        distances = p * (losses - spec.vector("ideal", ideal))
        products = p[:, None] * gramian * p[None, :]
        shares = solve_simplex_qp(
            horizon * safe_divide(products, spec.mean(jnp.diagonal(products))),
            safe_divide(distances, spec.mean(jnp.abs(distances))),
            spec.present,
        )
        weights = p * shares
        return safe_divide(weights, jnp.sum(weights)), inner

    return make_weighting(
        init,
        update,
        needs=("losses", "gramian"),
        first_weights=LossSpec.equal,
    )
