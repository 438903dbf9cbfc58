"""Equal gradient norms by a moving average."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import check_decay, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import running_mean
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._averages import averaged


@serializable_state
class NormsState(NamedTuple):
    """A running mean of gradient norms."""

    average_norms: jax.Array  # (K,)
    num_seen: jax.Array  # int32 (K,), batches they are of


def grad_norm_balance(
    primary: str | int | None = None,
    share: PyTree = 1.0,
    *,
    decay: float = 0.9,
    average: Literal["weights", "norms"] = "weights",
    eps: float = 1e-5,
) -> LossWeighting:
    r"""Weights that make the gradients of all losses equally long.

    .. math::
      \hat w_i = \frac{\bar n}{n_i + \varepsilon \bar n}, \qquad
      \bar n = \frac1K \sum_j n_j, \qquad
      w \leftarrow \beta w + (1 - \beta) \hat w,

    where :math:`n_i` is the gradient norm of the loss without its weight. With a
    primary loss p, :math:`c_i \, n_p` takes the place of :math:`\bar n`, and
    :math:`w_p = 1`: the gradient of loss i is :math:`c_i` times as long as that of p,
    and a batch in which p has none teaches nothing. The average starts at 1 and takes
    the gradients of an update in before the update uses it. With ``average="norms"``
    the norms are averaged and not the weights, from the first batch on, so that one
    batch with a very short gradient makes no very large weight.

    Args:
      primary: p, the path of one loss, or its index in a sequence of losses; ``None``
        for the mean of all norms.
      share: c, with a primary loss; positive. One number, or one for each loss, in a
        tree like the losses, where that of the primary loss is not looked at.
      decay: :math:`\beta` of the moving average, in [0, 1).
      average: What is averaged, ``"weights"`` as in the paper, or ``"norms"``: the
        plain mean until it has seen :math:`1 / (1 - \beta)` batches.
      eps: Relative to :math:`\bar n`: :math:`\hat w` is at most 1/eps, which is what a
        loss without a gradient gets; if norms are averaged, one that never had one
        gets 1.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs the
      gradient norms; its weights are positive, without a primary loss with a harmonic
      mean near 1. It may be run every k updates alone, see
      :func:`yoto_jax.weightings.every`.

    Raises:
      ValueError: ``decay`` is not in [0, 1), or ``eps`` or ``share`` is not positive.
        ``average`` is neither. ``share`` without ``primary``. In ``init``: an unknown
        ``primary``, or a ``share`` that does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import yoto_jax as yoto
      >>> losses = {"boundary": 0.1, "residual": 4.0}
      >>> weighting = yoto.weightings.grad_norm_balance(decay=0.0)
      >>> state, norms = weighting.init(losses), jnp.array([1.0, 3.0])
      >>> weights, state = weighting.update(losses, state, norms=norms)
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'boundary': 2.0, 'residual': 0.667}

    References:
      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023, and its code, jaxpi.

    .. warning::
      The paper has the sum of the norms in place of their mean; the mean is what its
      code has. This is neither :func:`yoto_jax.weightings.gradnorm` nor
      :func:`yoto_jax.weightings.lr_annealing`. On several devices, average the
      gradients first and then take norms: an average of the devices' weights is another
      rule.
    """
    check_positive(eps=eps)
    if average not in ("weights", "norms"):
        raise ValueError(f"average must be 'weights' or 'norms', got {average!r}.")
    _check_share(share, primary)

    def position(spec: LossSpec) -> int:
        return spec.position("primary", primary)

    def shares(spec: LossSpec) -> jax.Array:
        return spec.vector("share", share)

    def target(losses: jax.Array, spec: LossSpec, *, norms: jax.Array) -> jax.Array:
        anchored = primary is not None
        size = shares(spec) * norms[position(spec)] if anchored else spec.mean(norms)
        # Nothing to balance, or to measure by.
        some = size > 0
        weights = jnp.where(some, size / jnp.where(some, norms + eps * size, 1.0), 1.0)
        return weights.at[position(spec)].set(1.0) if anchored else weights

    def learns(spec: LossSpec, *, norms: jax.Array) -> jax.Array:
        return norms[position(spec)] > 0

    def reference(spec: LossSpec) -> int:
        shares(spec)  # They have to fit the losses.
        return position(spec)

    if average == "norms":

        def of_average(
            losses: jax.Array, spec: LossSpec, *, norms: jax.Array
        ) -> jax.Array:
            return jnp.where(norms > 0, target(losses, spec, norms=norms), 1.0)

        check = shares if primary is None else reference
        return _of_average_norms(of_average, decay, check=check)
    if primary is None:
        return averaged(target, decay, ("norms",))
    return averaged(target, decay, ("norms",), reference=reference, learns=learns)


def _check_share(share: PyTree, primary: str | int | None) -> None:
    for value in jax.tree.leaves(share):
        traced = isinstance(value, jax.core.Tracer)
        check_positive(share=value if traced else np.min(value))
    known = not isinstance(share, jax.core.Tracer)
    if primary is None and known and not (np.ndim(share) == 0 and share == 1):
        raise ValueError("share is one of the primary loss's gradient: name primary.")


def _of_average_norms(
    target: Callable[..., jax.Array],
    decay: float,
    *,
    check: Callable[[LossSpec], Any],
) -> LossWeighting:
    """``target(losses, spec, norms=)`` of a running mean of the gradient norms.

    The mean is the plain one until the decay takes over. ``target`` is told 0 for a
    loss that no batch has had. What ``check(spec)`` raises, ``init`` raises.
    """
    check_decay(decay=decay)

    def init(spec: LossSpec) -> NormsState:
        check(spec)
        return NormsState(spec.full(0.0), spec.full(0.0).astype(jnp.int32))

    def update(
        losses: jax.Array, inner: NormsState, spec: LossSpec, *, norms: jax.Array
    ) -> tuple[jax.Array, NormsState]:
        memory = decay / (1.0 - decay)
        mean = running_mean(inner.average_norms, norms, inner.num_seen, memory, decay)
        if spec.present is not None:
            mean = jnp.where(spec.present, mean, inner.average_norms)
        state = NormsState(mean, inner.num_seen + 1)
        return target(losses, spec, norms=mean), state

    return make_weighting(init, update, needs=("norms",))
