"""Equal gradient norms by a moving average."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import (
    check_all_positive,
    check_counts,
    check_decay,
    check_positive,
)
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._numerics import running_mean, select
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._averages import averaged
from yoto_jax.weightings._wrappers import hold

WARMUP, LEAST = 0.02, 10
"""Share of the steps in which gradient norms are measured, and how many at least."""


@serializable_state
class NormsState(NamedTuple):
    """A running mean of gradient norms."""

    average_norms: jax.Array  # (K,)
    num_seen: jax.Array  # int32 (K,), batches they are of


def grad_norm_balance(
    primary: str | int | None = None,
    share: PyTree = 1.0,
    *,
    preference: PyTree = None,
    decay: float = 0.9,
    average: Literal["weights", "norms"] = "weights",
    eps: float = 1e-5,
) -> LossWeighting:
    r"""Weights that make the gradients of all losses equally long, or in given ratios.

    .. math::
      \hat w_i = \frac{p_i \bar n}{n_i + \varepsilon p_i \bar n}, \qquad
      \bar n = \frac1K \sum_j n_j, \qquad
      w \leftarrow \beta w + (1 - \beta) \hat w,

    where :math:`n_i` is the gradient norm of the loss without its weight, and p the
    preference. With a primary loss q, :math:`c_i \, n_q` takes the place of
    :math:`p_i \bar n`, and :math:`w_q = 1`: the gradient of loss i is :math:`c_i` times
    as long as that of q, and a batch in which q has none teaches nothing. The average
    starts at 1 and takes the gradients of an update in before the update uses it. With
    ``average="norms"`` the norms are averaged and not the weights, from the first batch
    on, so that one batch with a very short gradient makes no very large weight.

    Args:
      primary: q, the path of one loss, or its index in a sequence of losses; ``None``
        for the mean of all norms.
      share: c, with a primary loss; positive. One number, or one for each loss, in a
        tree like the losses, where that of the primary loss is not looked at.
      preference: p, without a primary loss: one positive number per loss, in a tree
        like the losses or in their order. Brought to mean 1; equal if none is given.
      decay: :math:`\beta` of the moving average, in [0, 1).
      average: What is averaged, ``"weights"`` as in the paper, or ``"norms"``: the
        plain mean until it has seen :math:`1 / (1 - \beta)` batches.
      eps: Relative to :math:`p_i \bar n`: :math:`\hat w` is at most 1/eps, which is
        what a loss without a gradient gets; if norms are averaged, one that never had
        one gets 1.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign, which needs the
      gradient norms; its weights are positive, without a primary loss with a harmonic
      mean near 1. It may be run every k updates alone, see
      :func:`yoto_jax.weightings.every`.

    Raises:
      ValueError: ``decay`` is not in [0, 1), or ``eps``, ``share`` or ``preference`` is
        not positive. ``average`` is neither. ``share`` without ``primary``, or
        ``preference`` with it. In ``init``: an unknown ``primary``, or a ``share`` or
        ``preference`` that does not fit the losses.

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
    _check_ratios(share, preference, primary)

    def position(spec: LossSpec) -> int:
        return spec.position("primary", primary)

    def wanted(spec: LossSpec, norms: jax.Array) -> jax.Array:
        if primary is not None:
            return spec.vector("share", share) * norms[position(spec)]
        return spec.ratios(preference) * spec.mean(norms)

    def target(losses: jax.Array, spec: LossSpec, *, norms: jax.Array) -> jax.Array:
        size = wanted(spec, norms)
        # Nothing to balance, or to measure by.
        some = size > 0
        weights = jnp.where(some, size / jnp.where(some, norms + eps * size, 1.0), 1.0)
        return weights if primary is None else weights.at[position(spec)].set(1.0)

    def learns(spec: LossSpec, *, norms: jax.Array) -> jax.Array:
        return norms[position(spec)] > 0

    def check(spec: LossSpec) -> None:
        wanted(spec, spec.full(1.0))  # Names and ratios have to fit the losses.

    teaches = None if primary is None else learns
    if average == "norms":
        return _of_average_norms(target, decay, check=check, learns=teaches)
    return averaged(target, decay, ("norms",), check=check, learns=teaches)


def calibrated(primary: str | int, steps: int, share: PyTree = 1.0) -> LossWeighting:
    r"""Weights by the gradient norms of the first steps, constant from then on.

    .. math::
      w_i = c_i \frac{\bar n_q}{\bar n_i}, \qquad w_q = 1,

    where :math:`\bar n_i` is a running mean of the gradient norm of loss i over the
    first two per cent of the steps (ten at least), q the primary loss and c the share:
    the gradient of every auxiliary loss is c times as long as the primary one's. Later
    steps compute no gradients of single losses and cost what they cost with fixed
    weights. The mean is a plain one over the first hundred steps; in a run of more than
    5,000, it forgets these as the norms go on to change (decay 0.99).

    Args:
      primary: q, the path of the primary loss, or its index in a sequence of losses.
      steps: Steps of the whole run, a positive integer.
      share: c, positive: one number, or one for each loss, in a tree like the losses,
        where that of the primary loss is not looked at.

    Returns:
      A :class:`yoto_jax.LossWeighting`, for losses of any sign: :func:`hold` around
      :func:`grad_norm_balance` with ``average="norms"`` and ``decay=0.99``. A loss that
      never had a gradient in these steps weighs 1.

    Raises:
      TypeError: ``steps`` is no integer.
      ValueError: ``steps`` or ``share`` is not positive. In ``init``: an unknown
        ``primary``, or a ``share`` that does not fit the losses.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> def loss_fn(w):
      ...     return {"fit": jnp.sum((w - 1) ** 2), "size": 1000 * jnp.sum(w**2)}
      >>> weighting = yoto.weightings.calibrated("fit", steps=500)
      >>> value_and_grad = jax.jit(yoto.value_and_grad(loss_fn, weighting))
      >>> w, state = jnp.full(2, 0.5), weighting.init({"fit": 0.0, "size": 0.0})
      >>> for _ in range(20):
      ...     losses, grads, state = value_and_grad(w, state)
      >>> print(f"{state.loss_weights['size']:.4f}")
      0.0010

    .. note::
      "Share 1" in the benchmarks, where it comes nearest to a search of fifteen runs
      for the price of one: ``docs/understand/search.md``.
    """
    check_counts(steps=steps)
    balance = grad_norm_balance(primary, share, decay=0.99, average="norms")
    return hold(balance, after=max(LEAST, int(WARMUP * steps)))


def _check_ratios(share: PyTree, preference: PyTree, primary: str | int | None) -> None:
    check_all_positive(share=share, preference=preference)
    if primary is not None and preference is not None:
        raise ValueError(
            "preference is for losses without a primary one: with it, share is the "
            "ratio to its gradient."
        )
    known = not isinstance(share, jax.core.Tracer)
    if primary is None and known and not (np.ndim(share) == 0 and share == 1):
        raise ValueError(
            "share is one of the primary loss's gradient: name primary, or take "
            "preference for ratios between all."
        )


def _of_average_norms(
    target: Callable[..., jax.Array],
    decay: float,
    *,
    check: Callable[[LossSpec], Any],
    learns: Callable[..., jax.Array] | None,
) -> LossWeighting:
    """``target(losses, spec, norms=)`` of a running mean of the gradient norms.

    The mean is the plain one until the decay takes over. A loss that never had a
    gradient weighs 1. What ``check(spec)`` raises, ``init`` raises. ``learns(spec,
    norms=)`` tells whether a batch says anything; if not, the mean is held.
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
        if learns is not None:
            state = select(learns(spec, norms=norms), state, inner)
            mean = state.average_norms
        weights = target(losses, spec, norms=mean)
        return jnp.where(mean > 0, weights, 1.0), state

    return make_weighting(init, update, needs=("norms",))
