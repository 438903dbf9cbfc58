"""Serialisation of our pytree nodes by ``jax.export`` and ``flax.serialization``."""

import contextlib
import functools
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

Kind = TypeVar("Kind", bound=type)

_FLAX = "flax.serialization"
_state_dicts: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def serializable_state(kind: Kind) -> Kind:
    """Registers a named tuple with ``jax.export``."""
    jax.export.register_namedtuple_serialization(
        kind, serialized_name=_public_name(kind)
    )
    return kind


# States of Optax inside ours, unless another library has registered them.
for _kind in (
    optax.EmaState,
    optax.EmptyState,
    optax.MaskedState,
    optax.ScaleByAdamState,
    optax.ScaleByScheduleState,
    optax.TraceState,
):
    with contextlib.suppress(ValueError):
        jax.export.register_namedtuple_serialization(
            _kind, serialized_name=f"optax.{_kind.__name__}"
        )


def register_node(
    kind: type,
    from_children: Callable[..., Any],
    check: Callable[[Any], None] = lambda node: None,
    static: tuple[Callable[[Any], bytes], Callable[[Any], Any]] | None = None,
) -> None:
    """Registers a pytree node with ``jax.export`` and ``flax.serialization``.

    Args:
      kind: A registered class with named leaves. Its static data are a tree structure
        and a JSON value (a tuple, a number or None).
      from_children: ``from_children(static, leaves)`` makes a node.
      check: Raises if a restored node is incomplete.
      static: How other static data are written to bytes and read back.
    """
    write, read = static or (_write_static, _read_static)
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=_public_name(kind),
        serialize_auxdata=write,
        deserialize_auxdata=read,
        from_children=from_children,
    )

    def from_state_dict(node: Any, state: dict[str, Any]) -> Any:
        names = _named_leaves(node)
        if names.keys() != state.keys():
            raise ValueError(
                f"the state dict of a {kind.__name__} must hold {sorted(names)}, "
                f"got {sorted(state)}."
            )
        leaves = [state[name] for name in names]
        restored = jax.tree.unflatten(jax.tree.structure(node), leaves)
        if leaves:
            check(restored)
        return restored

    _state_dicts[kind] = (_named_leaves, from_state_dict)
    if _FLAX in sys.modules:
        _tell_flax(sys.modules[_FLAX], kind)


def _public_name(kind: type) -> str:
    """Public path of a class: files stay readable when private modules move."""
    public = [part for part in kind.__module__.split(".") if not part.startswith("_")]
    return ".".join([*public, kind.__name__])


def _named_leaves(node: Any) -> dict[str, Any]:
    """Leaves of a node by attribute name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(node)
    }


def _write_static(static: tuple[Any, Any]) -> bytes:
    # Losses may be in containers of the user, registered with jax.export, which writes
    # tree structures only as arguments of a program: here, of the identity.
    structure, rest = static
    scalar = jax.ShapeDtypeStruct((), "float32")
    losses = structure.unflatten([scalar] * structure.num_leaves)
    program = jax.export.export(jax.jit(lambda losses: losses))(losses)
    return json.dumps([bytes(program.serialize()).hex(), rest]).encode()


def _read_static(written: bytes) -> tuple[Any, Any]:
    program, rest = json.loads(written)
    structure = jax.export.deserialize(bytearray.fromhex(program)).out_tree
    return structure, tuple(rest) if isinstance(rest, list) else rest


# Flax looks types up in a registry. The core does not import Flax: where it is imported
# after us, our types are added at the end of that import.


def _tell_flax(flax: types.ModuleType, kind: type) -> None:
    flax.register_serialization_state(kind, *_state_dicts[kind])


class _Finder:
    """Import hook that registers our types once ``flax.serialization`` is loaded."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _FLAX:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec and spec.loader:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module)
        return spec


def _execute(execute: Callable[..., None], module: types.ModuleType) -> None:
    execute(module)
    if module.__name__ == _FLAX:  # A loader may serve other modules, too.
        for kind in _state_dicts:
            _tell_flax(module, kind)


if _FLAX not in sys.modules:
    sys.meta_path.insert(0, _Finder())
