"""Checks of arguments whose values are known; tracers pass."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_REAL = (jnp.floating, jnp.integer, jnp.bool_)


def is_real(value: Any) -> bool:
    """Whether a value, or an array of one, is a real number; flags are none."""
    return not isinstance(value, bool) and hasattr(value, "__float__")


def _known(name: str, value: Any, kinds: str) -> float | None:
    """The value of a hyperparameter, or None if it is being traced."""
    if isinstance(value, jax.core.Tracer):
        return None
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(f"{name} must be {kinds}, got {value!r}.") from None


def check_hyperparameter(
    name: str, value: Any, holds: Callable[[float], bool], what: str
) -> None:
    """Checks that a number satisfies ``holds``; tracers pass."""
    number = _known(name, value, "a number")
    if number is not None and not holds(number):
        raise ValueError(f"{name} must {what}, got {value}.")


def check_flag(**values: Any) -> None:
    """Checks that options are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_transformation(**values: Any) -> None:
    """Checks that arguments are Optax transformations, not what makes them."""
    for name, value in values.items():
        if not hasattr(value, "init") or not hasattr(value, "update"):
            raise TypeError(
                f"{name} must be an Optax transformation, got a {type(value).__name__}."
            )


def check_positive(**values: Any) -> None:
    """Checks that hyperparameters are positive; tracers pass."""
    for name, value in values.items():
        check_hyperparameter(name, value, lambda x: x > 0, "be positive")


def check_all_positive(**values: Any) -> None:
    """Checks trees of numbers and vectors, all of them positive; tracers pass."""
    _check_all(check_positive, values)


def check_all_fractions(**values: Any) -> None:
    """Checks trees of numbers and vectors, all in [0, 1]; tracers pass."""
    _check_all(check_fraction, values)


def _check_all(check: Callable[..., None], values: dict[str, Any]) -> None:
    for name, tree in values.items():
        for value in jax.tree.leaves(tree):
            if isinstance(value, jax.core.Tracer):
                continue
            numbers = np.asarray(value)
            if not any(map(functools.partial(jnp.issubdtype, numbers.dtype), _REAL)):
                raise TypeError(f"{name} must hold numbers, got {value!r}.")
            for number in (np.min(numbers), np.max(numbers)):
                check(**{name: number})


def check_not_negative(**values: Any) -> None:
    """Checks that hyperparameters are not negative; tracers pass."""
    for name, value in values.items():
        check_hyperparameter(name, value, lambda x: x >= 0, "not be negative")


def check_decay(**values: Any) -> None:
    """Checks that decays are in [0, 1); tracers pass."""
    for name, value in values.items():
        check_hyperparameter(name, value, lambda x: 0 <= x < 1, "be in [0, 1)")


def check_fraction(**values: Any) -> None:
    """Checks that hyperparameters are in [0, 1]; tracers pass."""
    for name, value in values.items():
        check_hyperparameter(name, value, lambda x: 0 <= x <= 1, "be in [0, 1]")


def check_rate(name: str, value: Any, below: float = math.inf) -> None:
    """Checks that a rate is in [0, ``below``); schedules and tracers pass."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    kinds = "a number, a scalar array or a schedule"
    if getattr(value, "shape", ()):
        raise TypeError(f"{name} must be {kinds}, got {value!r}.")
    number = _known(name, value, kinds)
    if number is not None and not 0 <= number < below:
        limit = "finite" if below == math.inf else f"smaller than {below:g}"
        raise ValueError(f"{name} must be non-negative and {limit}, got {value}.")


def as_integer(name: str, value: Any) -> int:
    """An integer, or an array of one, as Python's; flags are none."""
    shown = f"a {type(value).__name__}" if hasattr(value, "__len__") else repr(value)
    wrong = TypeError(f"{name} must be an integer, got {shown}.")
    if isinstance(value, bool):
        raise wrong
    try:
        return operator.index(value)
    except TypeError:
        raise wrong from None


def check_counts(**values: Any) -> None:
    """Checks that numbers of steps are positive integers; tracers of integers pass."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
                raise TypeError(
                    f"{name} must be an integer, got {value.dtype}{value.shape}."
                )
            continue
        if as_integer(name, value) < 1:
            raise ValueError(f"{name} must be positive, got {value}.")


def check_integers(**values: Any) -> None:
    """Checks that arguments are integers."""
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {value!r}.")


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def as_key(key: Any) -> jax.Array:
    """Converts a key, typed or of ``jax.random.PRNGKey``, or a seed to a typed key."""
    if is_key(key):
        return key
    if hasattr(key, "dtype") and key.dtype == jnp.uint32 and jnp.ndim(key):
        return jax.random.wrap_key_data(key)
    if hasattr(key, "__index__") and not isinstance(key, bool):
        return jax.random.key(operator.index(key))
    raise TypeError(f"key must be jax.random.key(...) or an integer seed, got {key!r}.")
