"""Smooth Chebyshev scalarization."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_not_negative, check_positive
from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import PyTree
from yoto_jax._make_weighting import make_weighting
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import LossWeighting
from yoto_jax.weightings._bounds import LARGEST_RATIO


@serializable_state
class StchState(NamedTuple):
    """What :func:`stch` remembers of its first updates."""

    warmup_sum: jax.Array  # (K,) losses
    warmup_count: jax.Array  # int32 (K,)


def stch(
    *,
    smoothing: float = 1.0,
    preference: PyTree = None,
    ideal: PyTree = 0.0,
    form: Literal["linear", "log"] = "linear",
    warmup: int = 0,
) -> LossWeighting:
    r"""The gradient of a smooth maximum of the losses (smooth Chebyshev).

    The linear form is of the losses, the logarithmic one relative to a nadir n:

    .. math::
      w_i = p_i\, \mathrm{Softmax}_i \frac{p_i (L_i - z_i)}{\mu}, \qquad
      w_i = \frac{K}{L_i}\, \mathrm{Softmax}_i \frac{\log (L_i / n_i)}{\mu}.

    Weight moves to the largest losses. The linear form is the gradient of
    :func:`yoto_jax.conditional.smooth_chebyshev`.

    Args:
      smoothing: :math:`\mu`; in the unit of the weighted losses in the linear form.
      preference: p of the linear form: one number, one per loss in the order of
        ``jax.tree.leaves``, or a tree like the losses. 1/K if none is given.
      ideal: z of the linear form, the best values of the losses, given likewise.
      form: Which of the two.
      warmup: Updates of the logarithmic form whose average losses become the nadir. In
        these, the weights are :math:`1 / L_i`. With 0, the nadir is 1.

    Returns:
      A :class:`yoto_jax.LossWeighting`; in the logarithmic form for positive losses
      alone, whose weighted losses sum to K.

    Raises:
      ValueError: An option out of its range, or one of the other form. In ``init``:
        arguments that do not fit the losses. In ``update`` of the logarithmic form
        outside ``jit``: a loss is not positive.

    Examples:
      >>> import yoto_jax as yoto
      >>> losses = {"depth": 1.0, "camera": 3.0}
      >>> weighting = yoto.weightings.stch(smoothing=0.5)
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> print({name: round(float(w), 3) for name, w in weights.items()})
      {'camera': 0.44, 'depth': 0.06}

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, 2024. The logarithmic form is that of the
      authors' multi-task experiments.

    .. warning::
      In :func:`yoto_jax.weightings.yoto`, weight moves to the *smallest* losses.
    """
    check_positive(smoothing=smoothing)
    check_not_negative(warmup=warmup)
    if form == "linear":
        if isinstance(warmup, int | float) and warmup != 0:
            raise ValueError(f"warmup is for form='log' alone, got {warmup}.")
        return _linear(smoothing, preference, ideal)
    if form != "log":
        raise ValueError(f"form must be 'linear' or 'log', got {form!r}.")
    if preference is not None:
        raise ValueError(f"preference is for form='linear' alone, got {preference}.")
    if not (isinstance(ideal, int | float) and ideal == 0):
        raise ValueError(f"ideal is for form='linear' alone, got {ideal}.")
    return _logarithmic(smoothing, warmup)


def _linear(smoothing: float, preference: PyTree, ideal: PyTree) -> LossWeighting:
    def preferences(spec: LossSpec) -> jax.Array:
        return spec.preference(preference)

    def ideals(spec: LossSpec) -> jax.Array:
        return spec.vector("ideal", ideal)

    def init(spec: LossSpec) -> tuple[()]:
        ideals(spec)  # To be told now if they do not fit.
        return ()

    def update(
        losses: jax.Array, inner: tuple[()], spec: LossSpec
    ) -> tuple[jax.Array, tuple[()]]:
        p = preferences(spec)
        distances = p * (losses - ideals(spec)) / smoothing
        # Without the minimum, a compiler may take the largest distance, rounded, from
        # the same distance before it is rounded: of large ones more than exp can take.
        distances = jnp.minimum(distances, LARGEST_RATIO)
        return p * spec.softmax(distances), inner

    return make_weighting(
        init,
        update,
        first_weights=lambda spec: preferences(spec) / spec.size,
    )


def _logarithmic(smoothing: float, warmup: int) -> LossWeighting:
    def init(spec: LossSpec) -> StchState:
        return StchState(spec.full(0.0), jnp.zeros((spec.size,), jnp.int32))

    def update(
        losses: jax.Array, inner: StchState, spec: LossSpec
    ) -> tuple[jax.Array, StchState]:
        logs, count = jnp.log(losses), inner.warmup_count
        nadir = jnp.where(count > 0, inner.warmup_sum / jnp.maximum(count, 1), 1.0)
        shares = spec.log_softmax((logs - jnp.log(nadir)) / smoothing)
        warm = count < warmup
        weights = jnp.where(warm, 1.0, spec.count * jnp.exp(shares)) / losses
        return weights, StchState(
            warmup_sum=inner.warmup_sum + jnp.where(warm, losses, 0.0),
            warmup_count=count + warm.astype(jnp.int32),
        )

    return make_weighting(init, update, positive=True)
