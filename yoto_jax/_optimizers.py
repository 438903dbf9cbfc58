"""Optimizers that learn loss logits with the model: Algorithm 1 and its Adam form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_rate
from yoto_jax._choice_decay import add_choice_decay, check_choice_decay
from yoto_jax._choice_logits import is_choice_logits, is_hyperparameter
from yoto_jax._hyperparameter_decay import Entropy, add_hyperparameter_decay
from yoto_jax._loss_logits import choose_present, is_loss_logits
from yoto_jax._losses import Params, Present, PyTree, State
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits

Mask = PyTree | Callable[[optax.Params], PyTree]


def label_loss_logits(params: Params) -> PyTree:
    """Labels loss logits ``"loss_logits"`` and all else ``"model"``, for ``partition``.

    Choice logits, if there are any, get the label ``"choice_logits"``.

    Args:
      params: Any tree of parameters.

    Returns:
      A tree like ``params`` with one string for each array, each ``LossLogits`` and
      each ``ChoiceLogits``.

    Examples:
      An optimizer of their own for the loss logits:

      >>> import jax, jax.numpy as jnp, optax, yoto_jax as yoto
      >>> tx = optax.partition(
      ...     {
      ...         "model": optax.lion(1e-4, weight_decay=0.1),
      ...         "loss_logits": yoto.adamw(1e-2, hyperparameter_decay=0.5),
      ...     },
      ...     yoto.label_loss_logits,
      ... )
      >>> params = {"w": jnp.ones(2), "mu": yoto.init_loss_logits((0.0, 0.0), 0)}
      >>> yoto.label_loss_logits(params)
      {'mu': 'loss_logits', 'w': 'model'}
      >>> state = tx.init(params)
    """

    def label(x: Any) -> str:
        if is_choice_logits(x):
            return "choice_logits"
        return "loss_logits" if is_loss_logits(x) else "model"

    return jax.tree.map(label, params, is_leaf=is_hyperparameter)


def sgdw(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    hyperparameter_decay: optax.ScalarOrSchedule = 1.0,
    *,
    entropy: Entropy = "all",
    choice_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Algorithm 1: SGD with momentum, weight decay and hyperparameter decay.

    .. math::
      m_t &= \beta m_{t-1} + \eta_t g_t &
      w_t &= w_{t-1} - m_t - \eta_t \lambda w_{t-1} \\
      n_t &= \beta n_{t-1} + \eta_t h_t &
      \mu_t &= \mu_{t-1} - n_t - \eta_t \rho \nabla L_r(\mu_{t-1})

    with gradients :math:`g, h` with respect to the model and the logits. Both decays
    stay outside the momentum; the learning rate multiplies a gradient *before* it.

    Args:
      learning_rate: :math:`\eta`, a scalar or a schedule.
      momentum: :math:`\beta`.
      weight_decay: :math:`\lambda`, for all but loss logits; a scalar or a schedule.
      hyperparameter_decay: :math:`\rho`, for loss logits (unit: that of a loss).
      entropy: Losses that the entropy spans, see :func:`yoto_jax.regularizer`.
      choice_decay: Pull of choice logits, see :func:`yoto_jax.add_choice_decay`.
      mask: Parameters with weight decay, as in ``optax.adamw``; never loss logits.
      nesterov: Whether to use Nesterov momentum (not in the paper).
      accumulator_dtype: Dtype of the momentum, default that of the parameters.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``, and
      takes ``present=`` to hold the logits of absent losses and their moments: a tree
      of booleans like the losses, or a sequence of them if there are logits of several.

    Raises:
      TypeError: A rate, a dtype or ``mask`` is of another kind.
      ValueError: An argument is out of its range, or ``update`` misses ``params``.

    Examples:
      >>> import jax, yoto_jax as yoto
      >>> params = {"mu": yoto.init_loss_logits((2.0, 1.0), primary=0, epsilon=1.0)}
      >>> tx = yoto.sgdw(0.1)
      >>> grads = jax.grad(lambda p: yoto.composite_loss((2.0, 1.0), p["mu"]))(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{updates['mu'].learned[0]:.3f}")  # -0.1 * (-0.25 + 1.0 * 0.5)
      -0.025

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025.

    .. warning::
      The paper's rho of 20 to 200 pins the weights at the regulariser's optimum. Keep
      learning rate times rho below 9: see "Rho and epsilon" in the guides.
    """
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    check_rate("momentum", momentum, below=1)
    _check_dtype("accumulator_dtype", accumulator_dtype)
    decays = optax.chain(
        _decays(hyperparameter_decay, entropy, choice_decay),
        optax.add_decayed_weights(weight_decay, _but_loss_logits(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return unwrap_loss_logits(
        _hold_absent(
            optax.chain(
                optax.scale_by_learning_rate(learning_rate),
                optax.trace(momentum, nesterov, accumulator_dtype),
                _add(decays),
            )
        )
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    hyperparameter_decay: optax.ScalarOrSchedule = 10.0,
    *,
    entropy: Entropy = "all",
    choice_decay: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Algorithm 1 with AdamW in place of SGD with momentum.

    .. math::
      w_t = w_{t-1} - \eta_t (\hat g_t + \lambda w_{t-1}), \quad
      \mu_t = \mu_{t-1} - \eta_t (\hat h_t + \rho \nabla L_r(\mu_{t-1})),

    with Adam's normalised gradients. Without loss logits it is ``optax.adamw``.

    Args:
      learning_rate: :math:`\eta`, a scalar or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the denominator.
      eps_root: Added under the square root.
      mu_dtype: Dtype of the first moment (Optax's name; not the loss logits).
      weight_decay: :math:`\lambda`, for everything but loss logits; scalar or schedule.
      mask: Parameters with weight decay, as in ``optax.adamw``; never loss logits.
      hyperparameter_decay: :math:`\rho`, for loss logits (no unit); scalar or schedule.
      entropy: Losses that the entropy spans, see :func:`yoto_jax.regularizer`.
      choice_decay: Pull of choice logits, see :func:`yoto_jax.add_choice_decay`.
      nesterov: Whether to use Nesterov momentum.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``, and
      takes ``present=`` to hold the logits of absent losses and their moments: a tree
      of booleans like the losses, or a sequence of them if there are logits of several.

    Raises:
      TypeError: A rate, a dtype or ``mask`` is of another kind.
      ValueError: An argument is out of its range, or ``update`` misses ``params``.

    Examples:
      >>> import jax, yoto_jax as yoto
      >>> params = {"mu": yoto.init_loss_logits((2.0, 1.0), primary=0, epsilon=1.0)}
      >>> tx = yoto.adamw(0.01)
      >>> grads = jax.grad(lambda p: yoto.composite_loss((2.0, 1.0), p["mu"]))(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(f"{updates['mu'].learned[0]:.3f}")  # -0.01 * (-1.0 + 10.0 * 0.5)
      -0.040

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025.
      Loshchilov and Hutter, `AdamW <https://arxiv.org/abs/1711.05101>`_, 2019.

    .. warning::
      The paper uses rho = 20. Below 10, weights may vanish: see "Rho and epsilon".
    """
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    for name, value in {**rates, "eps": eps, "eps_root": eps_root}.items():
        check_rate(name, value)
    for name, value in {"b1": b1, "b2": b2}.items():
        check_rate(name, value, below=1)
    _check_dtype("mu_dtype", mu_dtype)
    return unwrap_loss_logits(
        _hold_absent(
            optax.chain(
                optax.scale_by_adam(
                    b1=b1,
                    b2=b2,
                    eps=eps,
                    eps_root=eps_root,
                    mu_dtype=mu_dtype,
                    nesterov=nesterov,
                ),
                _decays(hyperparameter_decay, entropy, choice_decay),
                optax.add_decayed_weights(weight_decay, _but_loss_logits(mask)),
                optax.scale_by_learning_rate(learning_rate),
            )
        )
    )


def _hold_absent(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Keeps dtypes of updates and, given ``present=``, logits of absent losses."""

    def update_fn(
        updates: Params,
        state: State,
        params: Params | None = None,
        *,
        present: Present | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        new, after = inner.update(updates, state, params, present=present, **extra_args)
        new = _as_wide(new, updates, updates if params is None else params)
        if present is None:
            return new, after
        still = optax.tree.zeros_like(new)
        return choose_present(present, (new, after), (still, state))

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _as_wide(new: PyTree, updates: Params, params: Params) -> PyTree:
    """In the wider dtype of gradient and parameter: a schedule of a decay is float32.

    In that of gradients alone, a small decay of float32 parameters would be rounded
    away where gradients are bfloat16.
    """

    def cast(x: Any, gradient: Any, param: Any) -> Any:
        if x is None:
            return None
        own, other = jnp.result_type(gradient), jnp.result_type(param)
        wider = jnp.issubdtype(other, jnp.inexact) and other.itemsize > own.itemsize
        return x.astype(other if wider else own)

    return jax.tree.map(cast, new, updates, params, is_leaf=lambda x: x is None)


def _decays(
    hyperparameter_decay: optax.ScalarOrSchedule,
    entropy: Entropy,
    choice_decay: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Both decays as one link, whose state has a count for each schedule."""
    check_choice_decay(choice_decay)
    of_losses = add_hyperparameter_decay(hyperparameter_decay, entropy=entropy)
    if isinstance(choice_decay, int | float) and choice_decay == 0:
        return of_losses
    of_choices = add_choice_decay(choice_decay)
    if callable(choice_decay):
        return optax.chain(of_losses, of_choices)

    def update_fn(
        updates: Params, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        new, state = of_losses.update(updates, state, params, **extra_args)
        return of_choices.update(new, optax.EmptyState(), params)[0], state

    return optax.GradientTransformationExtraArgs(of_losses.init, update_fn)


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}.")


def _but_loss_logits(mask: Mask | None) -> Callable[[optax.Params], PyTree]:
    """Excludes every ``LossLogits`` and ``ChoiceLogits`` from ``mask``."""

    def but_loss_logits(params: optax.Params) -> PyTree:
        chosen = True if mask is None else mask(params) if callable(mask) else mask
        for choice in jax.tree.leaves(chosen):
            if isinstance(choice, str):
                raise TypeError(f"mask must hold True and False, got {choice!r}.")
        return jax.tree.map(
            lambda choice, subtree: jax.tree.map(
                lambda x: not is_hyperparameter(x) and choice,
                subtree,
                is_leaf=is_hyperparameter,
            ),
            chosen,
            params,
            is_leaf=is_hyperparameter,
        )

    return but_loss_logits


def _add(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Adds the output of ``inner`` for zero updates to the updates."""

    def update_fn(
        updates: Params, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        zeros = optax.tree.zeros_like(updates)
        added, state = inner.update(zeros, state, params, **extra_args)
        return jax.tree.map(lambda u, a: u + a, updates, added), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
