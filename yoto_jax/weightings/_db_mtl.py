"""Gradients that are all as long as the longest one."""

import jax
import jax.numpy as jnp

from yoto_jax._loss_spec import LossSpec
from yoto_jax._make_weighting import make_weighting
from yoto_jax._solvers import safe_divide
from yoto_jax._weighting import LossWeighting


def db_mtl() -> LossWeighting:
    r"""Dual balancing: every gradient as long as the longest one.

    .. math::
      w_k = \frac{\max_j \|g_j\|}{\|g_k\|}.

    In the method :math:`g_k` is a running mean of gradients of :math:`\log L_k`. Let
    ``loss_fn`` return logarithms, and put ``per_loss(optax.ema(...), losses)`` in front
    of ``aggregate``; in ``value_and_grad`` there is no mean. The guide to weightings
    has all of it.

    Returns:
      A :class:`yoto_jax.LossWeighting` that needs the norms of the gradients. Its
      weights are 1 or more; 0 of a gradient that is zero.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> loss_fn = lambda w: {"fit": jnp.log((w - 4.0) ** 2), "size": jnp.log(w**2)}
      >>> weighting = yoto.weightings.db_mtl()
      >>> state = weighting.init({"fit": 0.0, "size": 0.0})
      >>> step = yoto.value_and_grad(loss_fn, weighting)
      >>> losses, grad, state = step(jnp.float32(1.0), state)  # -2/3 and 2
      >>> print({name: round(float(w), 3) for name, w in state.loss_weights.items()})
      {'fit': 3.0, 'size': 1.0}

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023, Section 3.

    .. warning::
      The weight of a gradient near zero grows without bound. The authors' code adds
      1e-8 to losses and to norms; here nothing is added to norms.
    """

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec, *, norms: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        del losses, spec
        return safe_divide(jnp.max(norms), norms), inner

    return make_weighting(lambda spec: (), update, needs=("norms",))
