"""What may stand in a tree of parameters."""

import sys
from typing import Any

import jax

from yoto_jax._loss_logits import PyTree, path_name

_NNX = (
    "params holds an NNX module ({name}). Its batch statistics and random streams "
    "would change in a copy and be lost: use yoto_jax.nnx.value_and_grad, which "
    "updates the module. Or give the parameters alone: graphdef, params, rest = "
    "nnx.split(model, nnx.Param, ...), and in loss_fn model = nnx.merge(graphdef, "
    "params, rest, copy=True), whose new state can be handed out as aux."
)
_EQUINOX = (
    "parameter {path!r} is no array but a {kind}, as Equinox modules may hold. "
    "Differentiate their arrays alone: params, static = eqx.partition(model, "
    "eqx.is_inexact_array), and in loss_fn model = eqx.combine(params, static)."
)
_OTHER = (
    "parameter {path!r} is no array but a {kind}. Keep what is not differentiated out "
    "of params: loss_fn may get it as another argument, or know it already."
)


def check_params(params: PyTree) -> None:
    """Raise for modules with a state of their own, and for leaves that are no arrays.

    Flax and Equinox are looked up among what is imported: a module of theirs cannot
    come from anywhere else.
    """
    found = _modules(params, "flax.nnx")
    if found:
        raise TypeError(_NNX.format(name=type(found[0]).__name__))
    for path, x in jax.tree.leaves_with_path(params):
        if not (hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)):
            message = _EQUINOX if _modules(params, "equinox") else _OTHER
            kind = type(x).__name__
            raise TypeError(message.format(path=path_name(path), kind=kind))


def _modules(params: PyTree, package: str) -> list[Any]:
    kind = getattr(sys.modules.get(package), "Module", None)
    if kind is None:
        return []
    is_module = lambda x: isinstance(x, kind)
    return [x for x in jax.tree.leaves(params, is_leaf=is_module) if is_module(x)]
