"""Choice logits: learned parameters behind a choice, and what is decided of it."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import is_real
from yoto_jax._loss_logits import is_loss_logits, show_entry
from yoto_jax._losses import PyTree, listed
from yoto_jax._serialization import register_node


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChoiceLogits:
    r"""Logits :math:`a` of a choice: option n has probability Softmax(a)_n.

    A pytree node with one array leaf. Like :class:`yoto_jax.LossLogits`, it may sit
    anywhere in a tree of parameters, and the functions and transformations of this
    package find it there by its type. Build one with
    :func:`yoto_jax.init_choice_logits`.

    Attributes:
      logits: float32 of shape ``(N,)``, in the order of the options. Leading axes may
        be added by ``vmap`` or ``scan``.
      options: Names of the N options (static).

    Examples:
      >>> import yoto_jax as yoto
      >>> yoto.init_choice_logits(("relu", "tanh"))
      ChoiceLogits(relu=0, tanh=0)
    """

    logits: jax.Array
    options: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, as libraries ask parameters for it."""
        return self.logits.shape

    def __repr__(self) -> str:
        return f"ChoiceLogits({_entries(self.options, self.logits)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChoiceWeights:
    """Weights of the options of a choice, made by :func:`yoto_jax.choose`.

    Attributes:
      weights: float32 of shape ``(N,)``, of sum 1; float64 if the logits are.
      options: Names of the N options (static).
    """

    weights: jax.Array
    options: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"ChoiceWeights({_entries(self.options, self.weights)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HardChoice:
    """One option of a choice, made by :func:`yoto_jax.harden`.

    A pytree node without leaves if the index is a Python integer, which is static then:
    programs are compiled for this option alone. With one leaf if it is an array.

    Attributes:
      index: Position of the option, an integer or an int32 array.
      options: Names of the N options (static).
    """

    index: int | jax.Array
    options: tuple[str, ...]

    @property
    def option(self) -> str:
        """Name of the option; an error if the index is an array."""
        if not isinstance(self.index, int):
            raise TypeError(
                f"which of {listed(self.options)} it is, is known only when the "
                "program runs: harden outside of jit and vmap for a static choice."
            )
        return self.options[self.index]

    def __repr__(self) -> str:
        if isinstance(self.index, int):
            return f"HardChoice({self.option!r})"
        return f"HardChoice(one of {listed(self.options)})"


def _flatten(choice: HardChoice) -> tuple[tuple[Any, ...], Any]:
    if isinstance(choice.index, int):
        return (), (choice.options, choice.index)
    return ((jax.tree_util.GetAttrKey("index"), choice.index),), (choice.options, None)


def _unflatten(static: Any, children: Iterable[Any]) -> HardChoice:
    options, index = static
    return HardChoice(next(iter(children), index), options)


jax.tree_util.register_pytree_with_keys(HardChoice, _flatten, _unflatten)


def is_choice_logits(x: Any) -> bool:
    """Whether ``x`` is a :class:`ChoiceLogits`, for ``is_leaf``."""
    return isinstance(x, ChoiceLogits)


def is_hyperparameter(x: Any) -> bool:
    """Whether ``x`` holds logits, of losses or of a choice, for ``is_leaf``."""
    return is_loss_logits(x) or is_choice_logits(x)


def is_choice(x: Any) -> bool:
    """Whether ``x`` is a choice, decided or not, for ``is_leaf``."""
    return isinstance(x, ChoiceLogits | ChoiceWeights | HardChoice)


def init_choice_logits(
    options: Iterable[str], *, probabilities: PyTree = None
) -> ChoiceLogits:
    r"""Initialises the logits of a choice.

    .. math::
      a_n = \log p_n

    Args:
      options: Names of the options, or a dict by name, such as that of the branches.
      probabilities: Initial ones, up to a common factor (positive, no unit): one
        number for each option, in their order or a dict by name. ``None`` prefers none.

    Returns:
      :class:`ChoiceLogits` with float32 logits of shape ``(N,)``.

    Raises:
      TypeError: A name is no string, or a probability no number.
      ValueError: No options, a name twice, or probabilities that are not positive and
        finite or do not fit the options.

    Examples:
      >>> import yoto_jax as yoto
      >>> yoto.init_choice_logits(("conv", "skip"), probabilities=(3, 1))
      ChoiceLogits(conv=1.099, skip=0)

    References:
      Liu et al., `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019, Eq. 2.
    """
    names = _names(options)
    if probabilities is None:
        values = [1.0] * len(names)
    elif isinstance(probabilities, dict):
        if set(probabilities) != set(names):
            raise ValueError(
                f"probabilities must have the options {listed(names)}, got "
                f"{listed(probabilities)}."
            )
        values = [probabilities[name] for name in names]
    else:
        try:
            values = list(probabilities)
        except TypeError:  # a number
            values = [probabilities]
        if len(values) != len(names):
            raise ValueError(
                f"probabilities must be one number for each of the {len(names)} "
                f"options {listed(names)}, got {len(values)}."
            )
    for name, value in zip(names, values, strict=True):
        if not is_real(value) or np.ndim(value):
            raise TypeError(
                f"the probability of {name!r} must be a number, got {value!r}."
            )
        if not 0 < float(value) < math.inf:
            raise ValueError(
                f"the probability of {name!r} must be positive and finite, got {value}."
            )
    logits = np.log(np.array(values, np.float64)).astype(np.float32)
    return ChoiceLogits(jnp.asarray(logits), names)


def _names(options: Iterable[str]) -> tuple[str, ...]:
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise TypeError(
            f"options must be names, such as ('relu', 'tanh'), got {options!r}."
        )
    names = tuple(options)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of an option must be a string, got {name!r}.")
    if not names:
        raise ValueError("options is empty: there is nothing to choose from.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"options must differ in name, got {listed(twice)} twice.")
    return names


def check_choice_logits(choice: ChoiceLogits) -> None:
    """Checks that there is one floating-point logit for each option."""
    logits, options = choice.logits, choice.options
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"a choice must hold floating-point logits, got {got}.")
    if logits.shape[-1:] != (len(options),):
        raise ValueError(
            f"a choice must hold {len(options)} logits for the options "
            f"{listed(options)}, got shape {logits.shape}."
        )


def choice_logits_in(tree: PyTree) -> list[tuple[str, ChoiceLogits]]:
    """All choice logits of a tree, with their places."""
    return [
        (jax.tree_util.keystr(path), x)
        for path, x in jax.tree.leaves_with_path(tree, is_leaf=is_choice_logits)
        if is_choice_logits(x) and jax.tree.leaves(x)
    ]


def _entries(options: Sequence[str], values: Any) -> str:
    return ", ".join(
        f"{name}={show_entry(values, n)}" for n, name in enumerate(options)
    )


def _write(static: Any) -> bytes:
    return json.dumps(static).encode()


def _reader(make: Callable[..., Any]) -> Callable[[bytes], Any]:
    return lambda written: make(*json.loads(written))


register_node(
    ChoiceLogits,
    lambda static, children: ChoiceLogits(*children, *static),
    check=check_choice_logits,
    static=(_write, _reader(lambda options: (tuple(options),))),
)
register_node(
    ChoiceWeights,
    lambda static, children: ChoiceWeights(*children, *static),
    static=(_write, _reader(lambda options: (tuple(options),))),
)
register_node(
    HardChoice,
    _unflatten,
    static=(_write, _reader(lambda options, index: (tuple(options), index))),
)
