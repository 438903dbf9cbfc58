"""Conditioning of any model on its loss weights by modulated parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from yoto_jax._checks import as_key
from yoto_jax._losses import Params, PyTree, path_name
from yoto_jax.conditional._film import SLOPE, affine, check_sizes, init_mlp, mlp

Where = Callable[[tuple[Any, ...], jax.Array], bool]


def init_modulation(
    key: jax.Array | int,
    encoding_size: int,
    params: Params,
    *,
    hidden: Sequence[int] = (64,),
    where: Where | None = None,
) -> dict[str, Any]:
    """Initialises the parameters of :func:`modulated`, at first the identity.

    Args:
      key: A random key, or an integer seed.
      encoding_size: Size E of the encoding of loss weights.
      params: The parameters of the model, or their shapes.
      hidden: Widths of the hidden layers that all modulations share.
      where: ``where(path, leaf)`` says which parameters are modulated. Default: all of
        floating point that have at least one axis.

    Returns:
      A dict: ``"trunk"``, the shared layers, and ``"heads"``, a kernel and a bias, zero
      at the start, for each modulated parameter, by its path.

    Raises:
      TypeError: ``key`` is neither a key nor a seed, or a size is no integer.
      ValueError: No parameter is modulated, or a size that cannot be.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3), "scale": 1.0}
      >>> modulation = conditional.init_modulation(jax.random.key(0), 1, params)
      >>> sorted(modulation["heads"])
      ['bias', 'kernel']
    """
    check_sizes(encoding_size, 1, hidden)
    chosen = _chosen(params, where)
    if not chosen:
        raise ValueError("no parameter is modulated: params has no arrays, or where.")
    width = (encoding_size, *hidden)[-1]
    heads = {
        name: {
            "kernel": jnp.zeros((width, leaf.shape[-1]), jnp.float32),
            "bias": jnp.zeros((leaf.shape[-1],), jnp.float32),
        }
        for name, leaf in chosen.items()
    }
    trunk = init_mlp(as_key(key), (encoding_size, *hidden), 1.0)
    return {"trunk": trunk, "heads": heads}


def modulated(
    params: Params, modulation: dict[str, Any], encoding: jax.Array
) -> PyTree:
    r"""Modulates the parameters of a model for one weighting of its losses.

    .. math::
      W' = W \operatorname{diag}(1 + s(c)), \quad b' = b + t(c)

    FiLM of every layer, folded into the parameters: those of one axis are shifted, all
    others (the biases of Flax's attention, or of stacked layers, among them) are scaled
    along their last axis. The result replaces ``params`` anywhere: gradients flow
    through it, and it is an ordinary model, with no cost at inference.

    Args:
      params: The parameters of the model. Output features are on the last axis, as in
        Flax.
      modulation: From :func:`init_modulation`.
      encoding: Encoding ``(E,)`` of one weighting. For several of them, as with draws
        per group of a batch, use ``jax.vmap`` over the encodings.

    Returns:
      A tree like ``params``, with its dtypes.

    Raises:
      ValueError: The encoding is not one weighting's, or the modulation is of a model
        with other parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from yoto_jax import conditional
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> modulation = conditional.init_modulation(jax.random.key(0), 1, params)
      >>> same = conditional.modulated(params, modulation, jnp.array([0.5]))
      >>> print((same["kernel"] == params["kernel"]).all())
      True

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018, of which this is
      another parameterisation. Dosovitskiy and Djolonga, `You Only Train Once
      <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.
    """
    if encoding.ndim != 1:
        raise ValueError(
            "modulated takes the encoding of one weighting, of shape (E,); got shape "
            f"{encoding.shape}. Use vmap for several."
        )
    heads = modulation["heads"]
    first = (*modulation["trunk"], *heads.values())[0]["kernel"].shape[0]
    if encoding.shape != (first,):
        raise ValueError(
            f"the modulation is for encodings of size {first}, got {encoding.shape[0]}."
        )
    if first == 0:
        return params
    hidden = encoding
    if modulation["trunk"]:
        hidden = jax.nn.leaky_relu(mlp(modulation["trunk"], encoding), SLOPE)
    flat, structure = jax.tree.flatten_with_path(params)
    left = set(heads)
    leaves = []
    for path, leaf in flat:
        name = path_name(path)
        if name not in heads:
            leaves.append(leaf)
            continue
        left.discard(name)
        by = affine(heads[name], hidden)
        if by.shape != leaf.shape[-1:]:
            raise ValueError(
                f"the modulation of {name!r} has {by.shape[0]} features, but the "
                f"parameter has shape {leaf.shape}."
            )
        by = by.reshape((1,) * (leaf.ndim - 1) + by.shape)
        changed = leaf * (1 + by) if leaf.ndim > 1 else leaf + by
        leaves.append(changed.astype(leaf.dtype))
    if left:
        raise ValueError(f"params lacks what the modulation is for: {sorted(left)}.")
    return structure.unflatten(leaves)


def _chosen(params: Params, where: Where | None) -> dict[str, Any]:
    chosen = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        shape = getattr(leaf, "shape", ())
        if not math.prod(shape) or not shape:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if where is None or where(path, leaf):
            if (name := path_name(path)) in chosen:
                raise ValueError(
                    f"two parameters have the same path {name!r}: rename one."
                )
            chosen[name] = leaf
    return chosen
