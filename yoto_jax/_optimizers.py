"""Optimizers that learn loss logits along with the model: Algorithm 1 and its kin."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from yoto_jax._checks import check_rate
from yoto_jax._hyperparameter_decay import Entropy, add_hyperparameter_decay
from yoto_jax._loss_logits import choose_present, is_loss_logits
from yoto_jax._losses import PyTree

Mask = PyTree | Callable[[optax.Params], PyTree]


def label_loss_logits(params: PyTree) -> PyTree:
    """Label loss logits ``"loss_logits"`` and all else ``"model"``, for ``partition``.

    Args:
      params: Any tree of parameters.

    Returns:
      A tree like ``params`` with one string for each array and each ``LossLogits``.

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
    return jax.tree.map(
        lambda x: "loss_logits" if is_loss_logits(x) else "model",
        params,
        is_leaf=is_loss_logits,
    )


def sgdw(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    hyperparameter_decay: optax.ScalarOrSchedule = 1.0,
    *,
    entropy: Entropy = "all",
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

    with the gradients :math:`g, h` of the composite loss. See "Choosing rho and
    epsilon" in the README.

    Args:
      learning_rate: :math:`\eta`, a scalar or a schedule.
      momentum: :math:`\beta`.
      weight_decay: :math:`\lambda`, for all but loss logits; scalar or schedule.
      hyperparameter_decay: :math:`\rho`, for loss logits alone; scalar or schedule.
      entropy: Which losses the entropy spans, see :func:`yoto_jax.regularizer`.
      mask: Which parameters the weight decay applies to, as in ``optax.adamw``.
      nesterov: Whether to use Nesterov momentum.
      accumulator_dtype: Dtype of the momentum, default that of the parameters.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``, and
      takes the ``present=`` of :func:`yoto_jax.composite_loss`.

    Raises:
      TypeError: A rate, a dtype or ``mask`` is of another type.
      ValueError: An argument out of its range, or no ``params`` in ``update``.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> losses = {"fit": 2.0, "size": 1.0}  # The smaller one gains weight.
      >>> mu = yoto.init_loss_logits(losses, primary="fit")
      >>> tx = yoto.sgdw(0.1)
      >>> grads = jax.grad(yoto.composite_loss, argnums=1)(losses, mu)
      >>> updates, state = tx.update(grads, tx.init(mu), mu)
      >>> print(optax.apply_updates(mu, updates))  # It was -2.303.
      LossLogits(fit=None, size=-2.284)

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025.

    .. warning::
      The paper recommends rho of 20 to 200, which pins the weights at the regulariser's
      own optimum. Where the learning rate times rho passes 9 the logits oscillate.
    """
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    check_rate("momentum", momentum, below=1)
    _check_dtype("accumulator_dtype", accumulator_dtype)
    decays = optax.chain(
        add_hyperparameter_decay(hyperparameter_decay, entropy=entropy),
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
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Algorithm 1 with AdamW in place of SGD with momentum.

    .. math::
      w_t = w_{t-1} - \eta_t (\hat g_t + \lambda w_{t-1}), \quad
      \mu_t = \mu_{t-1} - \eta_t (\hat h_t + \rho \nabla L_r(\mu_{t-1})),

    with Adam's normalised gradients :math:`\hat g, \hat h` of the composite loss.

    Args:
      learning_rate: :math:`\eta`, a scalar or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the denominator.
      eps_root: Added under the square root.
      mu_dtype: Dtype of the first moment.
      weight_decay: :math:`\lambda`, for all but loss logits; scalar or schedule.
      mask: Which parameters the weight decay applies to.
      hyperparameter_decay: :math:`\rho`, for loss logits alone; scalar or schedule.
      entropy: Which losses the entropy spans, see :func:`yoto_jax.regularizer`.
      nesterov: Whether to use Nesterov momentum.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params``, and
      takes the ``present=`` of :func:`yoto_jax.composite_loss`.

    Raises:
      TypeError: A rate, a dtype or ``mask`` is of another type.
      ValueError: An argument out of its range, or no ``params`` in ``update``.

    Examples:
      >>> import jax, optax, yoto_jax as yoto
      >>> losses = {"fit": 2.0, "size": 1.0}  # The smaller one gains weight.
      >>> mu = yoto.init_loss_logits(losses, primary="fit")
      >>> tx = yoto.adamw(0.1)
      >>> grads = jax.grad(yoto.composite_loss, argnums=1)(losses, mu)
      >>> updates, state = tx.update(grads, tx.init(mu), mu)
      >>> print(optax.apply_updates(mu, updates))  # It was -2.303.
      LossLogits(fit=None, size=-2.103)

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025.

    .. warning::
      The paper has rho = 20, where weights hardly move. Far below 10, losses that push
      a weight steadily drive it to 0.
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
                add_hyperparameter_decay(hyperparameter_decay, entropy=entropy),
                optax.add_decayed_weights(weight_decay, _but_loss_logits(mask)),
                optax.scale_by_learning_rate(learning_rate),
            )
        )
    )


def _hold_absent(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Hold logits of absent losses and their moments, given ``present=``."""

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        present: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        new, after = inner.update(updates, state, params, present=present, **extra_args)
        if present is None:
            return new, after
        still = optax.tree.zeros_like(updates)
        return choose_present(present, (new, after), (still, state))

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}.")


def _but_loss_logits(mask: Mask | None) -> Callable[[optax.Params], PyTree]:
    """``mask`` with every ``LossLogits`` taken out."""

    def but_loss_logits(params: optax.Params) -> PyTree:
        chosen = True if mask is None else mask(params) if callable(mask) else mask
        for choice in jax.tree.leaves(chosen):
            if isinstance(choice, str):
                raise TypeError(f"mask must hold True and False, got {choice!r}.")
        return jax.tree.map(
            lambda choice, subtree: jax.tree.map(
                lambda x: not is_loss_logits(x) and choice,
                subtree,
                is_leaf=is_loss_logits,
            ),
            chosen,
            params,
            is_leaf=is_loss_logits,
        )

    return but_loss_logits


def _add(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Add to the updates what ``inner`` makes of zeros."""

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        zeros = optax.tree.zeros_like(updates)
        added, state = inner.update(zeros, state, params, **extra_args)
        return jax.tree.map(lambda u, a: u + a, updates, added), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def unwrap_loss_logits(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Show ``inner`` all loss logits bare, outside any ``flax.nnx.Variable``.

    ``nnx.Optimizer`` initialises a transformation with variables and updates it with
    their values. Between the two it turns a variable whose value is a container, as a
    :class:`LossLogits` is, into another container, and the second step fails in any
    transformation that keeps a copy of the parameters. A state that has never seen the
    variable is left whole. :func:`yoto_jax.adamw` and :func:`yoto_jax.sgdw` do this
    themselves. Put it around all of an optimizer of your own, and around a wrapper
    that accumulates or averages, such as ``optax.MultiSteps``, even with ours inside.

    Args:
      inner: Any transformation.

    Returns:
      The same transformation; without NNX variables, in every respect.

    Examples:
      >>> import optax, yoto_jax as yoto
      >>> from flax import nnx
      >>> from yoto_jax.nnx import CompositeLoss, unwrap_loss_logits
      >>> model = CompositeLoss({"a": 0.0, "b": 0.0}, "a")
      >>> tx = optax.chain(yoto.add_hyperparameter_decay(0.1), optax.lion(1e-3))
      >>> optimizer = nnx.Optimizer(model, unwrap_loss_logits(tx), wrt=nnx.Param)
      >>> for _ in range(2):
      ...     grads = nnx.grad(lambda m: m({"a": 1.0, "b": 2.0}))(model)
      ...     _ = optimizer.update(model, grads)
    """
    inner = optax.with_extra_args_support(inner)

    def unwrap(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: x.get_raw_value() if _is_wrapped(x) else x,
            tree,
            is_leaf=_is_wrapped,
        )

    def init_fn(params: PyTree) -> optax.OptState:
        return inner.init(unwrap(params))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        new, state = inner.update(unwrap(updates), state, unwrap(params), **extra_args)
        return jax.tree.unflatten(
            jax.tree.structure(updates), jax.tree.leaves(new)
        ), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_wrapped(x: Any) -> bool:
    """Whether ``x`` is a ``flax.nnx.Variable`` of loss logits. Imports no Flax."""
    return hasattr(x, "get_raw_value") and is_loss_logits(x.get_raw_value())
