"""Regulariser of choice logits, and its decoupled form as an Optax link."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import is_real
from yoto_jax._choice_logits import (
    ChoiceLogits,
    check_choice_logits,
    is_choice_logits,
)
from yoto_jax._hyperparameter_decay import init_strength, strength_at
from yoto_jax._losses import Params, PyTree, State
from yoto_jax._numerics import softmax, upcast


def choice_regularizer(logits: ChoiceLogits | Any) -> jax.Array:
    r"""Distance of a choice from no preference: negated entropy plus log N.

    .. math::
      R(a) = \sum_n p_n \log p_n + \log N, \quad p = \mathrm{Softmax}(a), \qquad
      \frac{\partial R}{\partial a_n} = p_n \Bigl(a_n - \sum_m p_m a_m\Bigr)

    The Kullback-Leibler divergence of the probabilities from equal ones. Its minimum,
    0, is at equal logits; its supremum, log N, where one option has everything.

    Args:
      logits: :class:`ChoiceLogits` of N options. Leading axes are kept.

    Returns:
      Scalar in nats, or an array of the leading axes; float32, or float64 if the logits
      are. An infinite logit counts as its limit, NaN makes NaN.

    Raises:
      TypeError: ``logits`` are no :class:`ChoiceLogits`.
      ValueError: They hold another number of logits than there are options.

    Examples:
      >>> import yoto_jax as yoto
      >>> a = yoto.init_choice_logits(("conv", "skip"), probabilities=(3, 1))
      >>> print(f"{yoto.choice_regularizer(a):.4f}")  # log 2 - 0.5623
      0.1308

    References:
      The entropy of Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_,
      2025, Eq. 7, of a choice in the place of loss weights.
    """
    if not is_choice_logits(logits):
        raise TypeError(
            "logits must be a ChoiceLogits (see init_choice_logits), got "
            f"{type(logits).__name__}."
        )
    check_choice_logits(logits)
    return _regularizer(upcast(logits.logits))


@jax.custom_jvp
def _regularizer(a: jax.Array) -> jax.Array:
    p = softmax(a, False)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    # p is NaN, not 0, if a logit is.
    return jnp.sum(p * log_p, axis=-1) + math.log(a.shape[-1])


@_regularizer.defjvp
def _regularizer_jvp(primals, tangents):
    (a,), (tangent,) = primals, tangents
    return _regularizer(a), jnp.sum(_slope(a) * tangent, axis=-1)


def _slope(a: jax.Array) -> jax.Array:
    p = softmax(a, False)
    finite = jnp.where(jnp.isinf(a), 0.0, a)  # Their probability is 0, or all there is.
    return p * (finite - jnp.sum(p * finite, axis=-1, keepdims=True))


def check_choice_decay(choice_decay: Any) -> None:
    """Checks that a strength is finite; schedules and tracers pass."""
    if callable(choice_decay) or isinstance(choice_decay, jax.core.Tracer):
        return
    if not is_real(choice_decay) or jnp.shape(choice_decay):
        raise TypeError(
            "choice_decay must be a number, a scalar array or a schedule, got "
            f"{choice_decay!r}."
        )
    if not math.isfinite(float(choice_decay)):
        raise ValueError(f"choice_decay must be finite, got {choice_decay}.")


def add_choice_decay(
    choice_decay: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a multiple of the gradient of the regulariser to updates of choice logits.

    .. math::
      u_a \leftarrow u_a + \rho \, \nabla R(a)

    For every :class:`ChoiceLogits` in the parameters; all else passes unchanged. A
    positive strength draws a choice towards no preference, a negative one towards the
    option that it prefers already: a schedule from the first to the second explores,
    then decides. After Adam and before the learning rate the decay is decoupled.

    Args:
      choice_decay: :math:`\rho`, of either sign (in units of the update it is added to:
        of a loss for gradients, none after Adam), or a schedule of it.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``.

    Raises:
      TypeError: The strength is neither a number, nor a scalar array, nor a schedule.
      ValueError: It is not finite, or ``update`` misses ``params``.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> a = yoto.init_choice_logits(("conv", "skip"), probabilities=(3, 1))
      >>> tx = optax.chain(yoto.add_choice_decay(-1.0), optax.sgd(1.0))
      >>> zeros = jax.tree.map(jax.numpy.zeros_like, a)
      >>> updates, _ = tx.update(zeros, tx.init(a), a)
      >>> print(updates)  # towards "conv": 3/16 log 3
      ChoiceLogits(conv=0.206, skip=-0.206)

    References:
      After Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Eq. 8 and Algorithm 1.

    .. warning::
      The gradient vanishes at equal logits and where one option has everything: a
      negative strength decides no tie, and a positive one does not bring back an option
      that is gone. The softplus of Eq. 7 has no counterpart: no option is primary.
    """
    check_choice_decay(choice_decay)

    def init_fn(params: Params) -> optax.OptState:
        del params
        return init_strength(choice_decay)

    def update_fn(
        updates: Params, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_choice_decay needs the current choice logits: call "
                "update(updates, state, params)."
            )
        rho, state = strength_at(choice_decay, state)

        def decay(update: Any, param: Any) -> Any:
            # A mask or filter that works leaf by leaf empties a ChoiceLogits.
            if not (is_choice_logits(update) and jax.tree.leaves(update)):
                return update
            if not is_choice_logits(param):
                raise ValueError(
                    "the updates hold ChoiceLogits where the parameters hold a "
                    f"{type(param).__name__}."
                )
            check_choice_logits(param)
            moved = upcast(update.logits) + rho * _slope(upcast(param.logits))
            return ChoiceLogits(moved.astype(update.logits.dtype), update.options)

        updates = jax.tree.map(
            decay, updates, params, is_leaf=lambda x: x is None or is_choice_logits(x)
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
