"""Checks of parameter trees."""

import sys
from collections.abc import Callable
from typing import Any

import jax

from yoto_jax._losses import Params, path_name

_NNX = (
    "params holds an NNX module ({name}). Its batch statistics and random streams "
    "would change in a copy and be lost: use yoto_jax.nnx.value_and_grad, which "
    "updates the module. Or give the parameters alone: graphdef, params, rest = "
    "nnx.split(model, nnx.Param, ...), and in loss_fn model = nnx.merge(graphdef, "
    "params, rest, copy=True), whose new state can be handed out as aux."
)
_EQUINOX = (
    "{what} is no array but a {kind}, as Equinox modules may hold. Differentiate their "
    "arrays alone: params, static = eqx.partition(model, eqx.is_inexact_array), and in "
    "loss_fn model = eqx.combine(params, static)."
)
_OTHER = (
    "{what} is no array but a {kind}. Keep what is not differentiated out of params: "
    "loss_fn may get it as another argument, or know it already."
)


def check_params(params: Params) -> None:
    """Rejects NNX modules, and leaves that are not arrays."""
    # Looked up among the imported modules: a module of Flax or Equinox implies them.
    is_nnx, is_equinox = _is_module_of("flax.nnx"), _is_module_of("equinox")
    for path, node in jax.tree.leaves_with_path(
        params, is_leaf=lambda x: is_nnx(x) or is_equinox(x)
    ):
        if is_nnx(node):
            raise TypeError(_NNX.format(name=type(node).__name__))
        # A number in an Equinox module says how to compute, such as whether to drop.
        plain = () if is_equinox(node) else (bool, int, float, complex)
        for rest, x in jax.tree.leaves_with_path(node):
            if not (hasattr(x, "dtype") or isinstance(x, plain)):
                name = path_name((*path, *rest))
                raise TypeError(
                    (_EQUINOX if is_equinox(node) else _OTHER).format(
                        what=f"parameter {name!r}" if name else "params",
                        kind=type(x).__name__,
                    )
                )


def _is_module_of(package: str) -> Callable[[Any], bool]:
    kind = getattr(sys.modules.get(package), "Module", ())
    return lambda x: isinstance(x, kind)
