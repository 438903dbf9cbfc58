"""Loss weights in units of gradient norms."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._checks import check_positive
from yoto_jax._losses import Losses, Params, PyTree, find_loss, loss_names, split
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax.gradients._jacobian import value_and_jacobian
from yoto_jax.gradients._statistics import statistics_of


def gradient_norms(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    r"""The Euclidean norms of the gradients of all losses.

    .. math:: n_k = \|\nabla_\theta L_k\|

    Args:
      loss_fn: ``loss_fn(params, *args) -> losses``, any tree of scalars.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      axis_name: See :func:`yoto_jax.value_and_grad`.
      chunk_size: How many gradients are computed at a time (``None``: all).

    Returns:
      ``fn(params, *args, **kwargs) -> norms``, scalars of float32 at least in a tree
      like the losses; 0 for a loss that the batch lacks. Average over a few batches.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> loss_fn = lambda w: {"fit": jnp.sum((w - 1) ** 2), "size": jnp.sum(w**2)}
      >>> norms = yoto.racing.gradient_norms(loss_fn)(jnp.array([1.0, 2.0]))
      >>> print({name: round(float(norm), 2) for name, norm in norms.items()})
      {'fit': 2.0, 'size': 4.47}

    .. warning::
      Norms change in training, most of all in its first steps: weights that are right
      at the start need not stay so.
    """
    jacobian_of = value_and_jacobian(
        loss_fn, has_aux=has_aux, axis_name=axis_name, chunk_size=chunk_size
    )

    def fn(params: Params, *args: Any, **kwargs: Any) -> PyTree:
        losses, rows = jacobian_of(params, *args, **kwargs)
        if has_aux:
            losses, _ = losses
        if isinstance(losses, MaskedLosses):
            losses = losses.losses
        found = statistics_of(rows, ["norms"])["norms"]
        return split(found, jax.tree.structure(losses))

    return fn


def weights_by_norms(
    norms: PyTree, primary: str | int, share: PyTree = 1.0, *, most: float = 1e6
) -> Losses:
    r"""Weights that make auxiliary gradients a given share as long as the primary one.

    .. math:: w_k = \min(c_k \, n_p / n_k, m), \qquad w_p = 1.

    A few shares, such as 0.1, 1 and 10, cover what takes many ratios of raw losses, as
    units of losses span decades and units of gradient norms hardly one.

    Args:
      norms: n, from :func:`gradient_norms`, averaged over a few batches.
      primary: p, the path of one loss, or its index in a sequence of losses.
      share: c, one number for all auxiliary losses, or a tree like the norms, in which
        the primary's does not matter. 0 leaves a loss out.
      most: m, the largest weight (positive); also that of a loss without a gradient.

    Returns:
      float32 weights, a tree like the norms. Under ``jit`` they are NaN for a loss
      whose norm is not finite, and for all others if the primary's is not.

    Raises:
      ValueError: ``primary`` is unknown, a norm is no scalar, ``share`` does not fit
        the norms or is negative, ``most`` is not positive, or, outside ``jit``, a norm
        is not finite or the primary's is 0.

    Examples:
      >>> import yoto_jax as yoto
      >>> norms = {"ce": 2.0, "invariance": 0.5, "reconstruction": 8.0}
      >>> weights = yoto.racing.weights_by_norms(norms, "ce", share=0.1)
      >>> print({name: round(float(weight), 3) for name, weight in weights.items()})
      {'ce': 1.0, 'invariance': 0.4, 'reconstruction': 0.025}
    """
    leaves, structure = jax.tree.flatten(norms)
    names = loss_names(structure)
    position = find_loss("primary", primary, norms)
    check_positive(most=most)
    for name, leaf in zip(names, leaves, strict=True):
        if jnp.ndim(leaf):
            raise ValueError(
                f"the norm of {name!r} must be a scalar, got shape {jnp.shape(leaf)}: "
                "average over batches first."
            )
    vector = jnp.stack([jnp.asarray(x, jnp.float32) for x in leaves])
    shares = _shares(share, structure, names, position)
    if not isinstance(vector, jax.core.Tracer):
        _check_norms(vector, names, position)
    ratio = vector[position] / jnp.where(vector > 0, vector, 1.0)
    weights = jnp.where(vector > 0, jnp.minimum(shares * ratio, most), most)
    weights = jnp.where(shares > 0, weights, 0.0)
    usable = jnp.isfinite(vector) & jnp.isfinite(vector[position])
    weights = jnp.where(usable, weights, jnp.nan)
    return split(weights.at[position].set(1.0), structure)


def _shares(
    share: PyTree,
    structure: jax.tree_util.PyTreeDef,
    names: tuple[str, ...],
    primary: int,
) -> jax.Array:
    given = jax.tree.structure(share)
    scalars = all(jnp.ndim(x) == 0 for x in jax.tree.leaves(share))
    if given not in (structure, jax.tree.structure(0)) or not scalars:
        raise ValueError(
            f"share must be one number or a tree like the norms ({', '.join(names)}), "
            f"got {share!r}."
        )
    shares = jnp.stack([jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(share)])
    if given == structure:
        shares = shares.at[primary].set(1.0)
    if not isinstance(shares, jax.core.Tracer) and not bool(jnp.all(shares >= 0)):
        raise ValueError(f"share must not be negative, got {share!r}.")
    return jnp.broadcast_to(shares, (structure.num_leaves,))


def _check_norms(norms: jax.Array, names: tuple[str, ...], primary: int) -> None:
    for name, norm in zip(names, norms, strict=True):
        if not bool(jnp.isfinite(norm)) or norm < 0:
            raise ValueError(f"the gradient norm of {name!r} is {norm}.")
    if norms[primary] == 0:
        raise ValueError(
            f"the primary loss {names[primary]!r} has no gradient: nothing to measure "
            "the others by."
        )
