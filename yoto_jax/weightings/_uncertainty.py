"""Homoscedastic uncertainty as the loss weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree, listed
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LOG_LIMIT
from yoto_jax.weightings._inner_optimizer import chosen, descend, init_each

_FACTORS = {"regression": 0.5, "classification": 1.0}


@serializable_state
class UncertaintyState(NamedTuple):
    """What :func:`uncertainty` has learned."""

    log_variances: jax.Array  # (K,)
    opt_state: optax.OptState  # with counters for each loss


def uncertainty(
    *,
    kind: PyTree = "regression",
    optimizer: optax.GradientTransformation | None = None,
    initial: PyTree = 0.0,
) -> LossWeighting:
    r"""Weights by learned noise variances, one for each loss.

    .. math::
      \min_{\theta, s} \sum_i \left[ c_i e^{-s_i} L_i(\theta) + \tfrac12 s_i \right],
      \qquad w_i = c_i e^{-s_i}, \qquad s_i = \log \sigma_i^2,

    with :math:`c_i = 1/2` for the squared error of a regression and :math:`c_i = 1` for
    the cross-entropy of a classification. For fixed losses :math:`s` settles at
    :math:`w_i = 1 / (2 L_i)`, whatever the kind.

    Args:
      kind: ``"regression"``, ``"classification"``, or one of them for each loss: a tree
        like the losses, a dict by the names of the losses, or a sequence.
      optimizer: What steps on the log-variances; ``optax.adam(0.025)`` if none is
        given.
      initial: First log-variances: one number, one per loss, or a tree like the losses.

    Returns:
      A :class:`yoto_jax.LossWeighting` for positive losses. The weights have the unit
      of one over the loss; they lie between :math:`c_i e^{-20}` and :math:`c_i e^{20}`.
      Those of an update are the ones before its step.

    Raises:
      ValueError: In ``init``: ``kind`` or ``initial`` does not fit the losses. In
        ``update`` outside ``jit``: a loss is not positive.

    Examples:
      >>> import jax
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 0.5, "label": 2.0}
      >>> kind = {"depth": "regression", "label": "classification"}
      >>> weighting = yoto.weightings.uncertainty(kind=kind)
      >>> state = weighting.init(losses)
      >>> update = jax.jit(weighting.update)
      >>> for _ in range(300):
      ...     weights, state = update(losses, state)
      >>> print({name: round(float(w), 2) for name, w in weights.items()})
      {'depth': 1.0, 'label': 0.25}

    References:
      Kendall, Gal and Cipolla, `Multi-Task Learning Using Uncertainty to Weigh Losses
      for Scene Geometry and Semantics <https://arxiv.org/abs/1705.07115>`_, 2018,
      Eqs. 7 and 10.

    .. warning::
      The log-variances are clipped to [-20, 20]. In the paper, the weight of a loss
      that goes to 0 grows without bound.
    """
    tx = chosen(optimizer, optax.adam(0.025))

    def variances(spec: LossSpec) -> jax.Array:
        return jnp.clip(spec.vector("initial", initial), -LOG_LIMIT, LOG_LIMIT)

    def weights(log_variances: jax.Array, spec: LossSpec) -> jax.Array:
        return _factors(kind, spec) * jnp.exp(-log_variances)

    def init(spec: LossSpec) -> UncertaintyState:
        log_variances = variances(spec)
        return UncertaintyState(log_variances, init_each(tx, log_variances))

    def update(
        losses: jax.Array, inner: UncertaintyState, spec: LossSpec
    ) -> tuple[jax.Array, UncertaintyState]:
        used = weights(inner.log_variances, spec)
        log_variances, state = descend(
            tx,
            0.5 - used * losses,
            inner.opt_state,
            inner.log_variances,
            spec.present,
        )
        log_variances = jnp.clip(log_variances, -LOG_LIMIT, LOG_LIMIT)
        return used, UncertaintyState(log_variances, state)

    return make_weighting(
        init,
        update,
        positive=True,
        first_weights=lambda spec: weights(variances(spec), spec),
    )


def _factors(kind: Any, spec: LossSpec) -> jax.Array:
    """The constant in front of every loss."""
    kinds: list[Any] = []
    if isinstance(kind, str):
        kinds = [kind] * spec.size
    elif isinstance(kind, dict) and set(kind) == set(spec.names):
        kinds = [kind[name] for name in spec.names]
    elif jax.tree.structure(kind) == spec.structure:
        kinds = jax.tree.leaves(kind)
    elif isinstance(kind, list | tuple):
        kinds = list(kind)
    if len(kinds) != spec.size or any(k not in list(_FACTORS) for k in kinds):
        raise ValueError(
            "kind must be 'regression' or 'classification', or one of them for each "
            f"loss ({listed(spec.names)}), got {kind!r}."
        )
    return jnp.stack([jnp.full((), _FACTORS[k], spec.dtype) for k in kinds])
