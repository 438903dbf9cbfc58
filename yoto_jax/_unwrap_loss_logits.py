"""Loss logits inside NNX variables, bare for an optimizer. Imports no Flax."""

from typing import Any

import jax
import optax

from yoto_jax._choice_logits import is_hyperparameter
from yoto_jax._losses import Params, PyTree, State


def unwrap_loss_logits(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Unwraps loss logits from ``flax.nnx.Variable`` for the inner transformation.

    ``nnx.Optimizer`` initialises a transformation with variables and updates it with
    their values: one that keeps a copy of loss logits fails in its second step.
    :func:`yoto_jax.adamw` and :func:`yoto_jax.sgdw` unwrap them; put it
    around any other optimizer, and around a wrapper that accumulates or averages, such
    as ``optax.MultiSteps``, even with ours inside. Without it the update fails with
    a "node type mismatch".

    Args:
      inner: Any transformation.

    Returns:
      The same transformation; it changes nothing without NNX variables.

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

    def init_fn(params: Params) -> optax.OptState:
        return inner.init(unwrap(params))

    def update_fn(
        updates: Params, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        new, state = inner.update(unwrap(updates), state, unwrap(params), **extra_args)
        return jax.tree.unflatten(
            jax.tree.structure(updates), jax.tree.leaves(new)
        ), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_wrapped(x: Any) -> bool:
    """Whether ``x`` is a ``flax.nnx.Variable`` of loss logits or of choice logits."""
    return hasattr(x, "get_raw_value") and is_hyperparameter(x.get_raw_value())
