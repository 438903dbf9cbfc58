"""Choices decided: softly for training, for good afterwards."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._checks import as_key, is_real
from yoto_jax._choice_logits import (
    ChoiceLogits,
    ChoiceWeights,
    HardChoice,
    check_choice_logits,
    choice_logits_in,
    is_choice,
    is_choice_logits,
)
from yoto_jax._losses import Params, PyTree, listed, path_name
from yoto_jax._numerics import softmax, upcast

Method = Literal["softmax", "gumbel", "straight_through"]
METHODS = ("softmax", "gumbel", "straight_through")


def choose(
    key: Any,
    logits: PyTree,
    temperature: Any = 1.0,
    *,
    method: Method = "softmax",
) -> Any:
    r"""Weighs the options of every choice in a tree, in a way that has gradients.

    .. math::
      w = \mathrm{Softmax}(a / \tau), \quad
      w = \mathrm{Softmax}((a + g) / \tau), \quad
      w = \mathrm{onehot}(\arg\max_n (a + g)_n)

    for ``"softmax"``, ``"gumbel"`` and ``"straight_through"``, with g from the standard
    Gumbel distribution. The last one is hard forwards and has the gradient of the
    second backwards; without a key g is 0. With g, option n comes first with
    probability Softmax(a)_n, whatever the temperature.

    Args:
      key: A random key or a seed, new in every step. May be ``None`` where nothing is
        random: ``"softmax"`` draws nothing, ``"straight_through"`` takes the likeliest.
      logits: :class:`ChoiceLogits`, or a tree of parameters with any number of them,
        such as all of the model's; each has noise of its own. :class:`ChoiceWeights`
        and :class:`HardChoice` are decided and stay.
      temperature: :math:`\tau` (positive; unit: that of a logit), a number or a scalar
        array, such as an Optax schedule of the step: ``schedule(step)``.
      method: Which of the three.

    Returns:
      The same tree with :class:`ChoiceWeights` for :class:`ChoiceLogits`; float32, or
      float64 if the logits are. Under ``jit``, a temperature that is not positive makes
      all weights NaN, a NaN logit those of its choice; infinite logits have limits.

    Raises:
      TypeError: No number for ``temperature``, or no key where one is needed.
      ValueError: An unknown ``method``, a temperature that is not positive and finite,
        a tree without choices, or a choice with another number of logits than options.

    Examples:
      >>> import yoto_jax as yoto
      >>> a = yoto.init_choice_logits(("relu", "tanh"), probabilities=(3, 1))
      >>> yoto.choose(None, a)
      ChoiceWeights(relu=0.75, tanh=0.25)
      >>> yoto.choose(None, a, 0.5)
      ChoiceWeights(relu=0.9, tanh=0.1)
      >>> yoto.choose(None, a, method="straight_through")
      ChoiceWeights(relu=1, tanh=0)

    References:
      Liu et al., `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019, Eq. 2. Jang et al.,
      `Gumbel-softmax <https://arxiv.org/abs/1611.01144>`_, 2017, Eq. 2, Section 2.2.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {listed(METHODS)}, got {method!r}.")
    _check_temperature(temperature)
    if not any(map(is_choice, jax.tree.leaves(logits, is_leaf=is_choice))):
        raise ValueError("logits hold no choice (see init_choice_logits).")
    if method == "gumbel" and key is None:
        raise TypeError("method 'gumbel' needs a random key, new in every step.")
    draws = None if key is None or method == "softmax" else as_key(key)
    numbers = itertools.count()  # The n-th choice has the n-th part of the key.

    def decide(x: Any) -> Any:
        if not (is_choice_logits(x) and jax.tree.leaves(x)):
            return x
        check_choice_logits(x)
        own = None if draws is None else jax.random.fold_in(draws, next(numbers))
        weights = _weights(own, upcast(x.logits), temperature, method)
        return ChoiceWeights(weights, x.options)

    return jax.tree.map(decide, logits, is_leaf=is_choice)


def _weights(
    key: jax.Array | None, a: jax.Array, temperature: Any, method: Method
) -> jax.Array:
    if key is not None:
        a = a + jax.random.gumbel(key, a.shape, a.dtype)
    soft = _tempered(a, jnp.asarray(temperature, a.dtype))
    if method != "straight_through":
        return soft
    hard = jax.nn.one_hot(jnp.argmax(a, axis=-1), a.shape[-1], dtype=a.dtype)
    return hard + (soft - lax.stop_gradient(soft))


@jax.custom_jvp
def _tempered(a: jax.Array, temperature: jax.Array) -> jax.Array:
    """Softmax of a / temperature, NaN unless the temperature is positive."""
    weights = softmax(_scaled(a, temperature), False)
    return jnp.where(temperature > 0, weights, jnp.nan)


@_tempered.defjvp
def _tempered_jvp(primals, tangents):
    a, temperature = primals
    weights = _tempered(a, temperature)
    scaled = jnp.where(weights == 0, 0.0, _scaled(a, temperature))  # no -inf
    slope = (tangents[0] - scaled * tangents[1]) / temperature
    slope = jnp.where(weights == 0, 0.0, slope)
    mean = jnp.sum(weights * slope, axis=-1, keepdims=True)
    return weights, weights * (slope - mean)


def _scaled(a: jax.Array, temperature: jax.Array) -> jax.Array:
    """Distances to the largest logit: infinite logits have their limits."""
    largest = jnp.max(a, axis=-1, keepdims=True)
    return jnp.where(a == largest, 0.0, (a - largest) / temperature)


def _check_temperature(temperature: Any) -> None:
    if isinstance(temperature, jax.core.Tracer):
        known = None
    elif callable(temperature):
        raise TypeError(
            "temperature must be a number, got a function: of a schedule give its "
            "value at the step, schedule(step)."
        )
    elif not is_real(temperature):
        raise TypeError(f"temperature must be a number, got {temperature!r}.")
    else:
        known = temperature
    if jnp.shape(temperature):
        raise ValueError(
            f"temperature must be a scalar, got shape {jnp.shape(temperature)}; use "
            "vmap for several."
        )
    if known is not None and not 0 < float(known) < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {known}.")


def apply_choice(choice: Any, branches: Any, *operands: Any) -> PyTree:
    r"""Mixes the branches of a choice by its weights, or runs the one that is chosen.

    .. math::
      y = \sum_n w_n \, y_n(x)

    Args:
      choice: :class:`ChoiceWeights`, of all branches of which outputs are mixed, or
        :class:`HardChoice`, of which no other branch is run, nor traced if its index is
        static. With an index that is an array, ``lax.switch`` takes the branch when the
        program runs; under ``vmap`` over such indices all branches run.
      branches: One for each option, a dict by name or a sequence in the order of the
        options: functions of the operands, or outputs.
      *operands: What functions are called with.

    Returns:
      A tree like the outputs, of their shapes and dtypes; sums are in float32 or wider.

    Raises:
      TypeError: ``choice`` is not decided (see :func:`choose`), or of something else;
        functions and outputs are mixed up; an output is of integers, or another dtype.
      ValueError: Branches do not match the options, outputs are of different shapes,
        or weights have leading axes (use ``vmap``).

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> branches = {"relu": jax.nn.relu, "tanh": jnp.tanh}
      >>> a = yoto.init_choice_logits(branches, probabilities=(3, 1))
      >>> x = jnp.array([-1.0, 2.0])
      >>> weights = yoto.choose(None, a)
      >>> print([f"{y:.3f}" for y in yoto.apply_choice(weights, branches, x)])
      ['-0.190', '1.741']
      >>> print(yoto.apply_choice(yoto.harden(a), branches, x))
      [0. 2.]

    References:
      Liu et al., `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019, Eq. 2.

    .. warning::
      A mixture is of numbers: NaN of a branch with weight 0 is NaN, in gradients too.
    """
    if not isinstance(choice, ChoiceWeights | HardChoice):
        hint = ": decide it by choose or harden" if is_choice_logits(choice) else ""
        raise TypeError(
            "choice must be a ChoiceWeights or a HardChoice, got "
            f"{type(choice).__name__}{hint}."
        )
    ordered = _in_order(choice.options, branches)
    functions = _are_functions(choice.options, ordered, operands)
    if isinstance(choice, HardChoice) and isinstance(choice.index, int):
        chosen = ordered[choice.index]
        return chosen(*operands) if functions else chosen
    what = choice.weights if isinstance(choice, ChoiceWeights) else choice.index
    axes = 1 if isinstance(choice, ChoiceWeights) else 0
    if jnp.ndim(what) != axes:
        raise ValueError(
            f"this choice has leading axes, of shape {jnp.shape(what)}: apply it under "
            "vmap over them."
        )
    if isinstance(choice, HardChoice):
        runs = ordered if functions else [lambda y=y: y for y in ordered]
        _check_alike(choice.options, [jax.eval_shape(run, *operands) for run in runs])
        return lax.switch(choice.index, runs, *operands)
    outputs = [run(*operands) for run in ordered] if functions else ordered
    _check_alike(choice.options, outputs, mixed=True)
    return jax.tree.map(lambda *ys: _mixed(choice.weights, ys), *outputs)


def _mixed(weights: jax.Array, outputs: Sequence[Any]) -> jax.Array:
    arrays = [jnp.asarray(y) for y in outputs]
    terms = []
    for n, y in enumerate(arrays):
        wide = upcast(y) if jnp.issubdtype(y.dtype, jnp.floating) else y
        terms.append(weights[n].astype(wide.dtype) * wide)
    return sum(terms[1:], terms[0]).astype(arrays[0].dtype)


def _in_order(options: Sequence[str], branches: Any) -> list[Any]:
    if isinstance(branches, dict):
        missing = [name for name in options if name not in branches]
        others = [name for name in branches if name not in options]
        if missing or others:
            named = (("missing", missing), ("unexpected", others))
            text = "; ".join(f"{what}: {listed(x)}" for what, x in named if x)
            raise ValueError(
                f"branches do not match the options {listed(options)}; {text}."
            )
        return [branches[name] for name in options]
    if not isinstance(branches, list | tuple):
        raise TypeError(
            "branches must be a dict by option, or a sequence in the order of the "
            f"options, got {type(branches).__name__}."
        )
    if len(branches) != len(options):
        raise ValueError(
            f"there must be one branch for each of the {len(options)} options "
            f"{listed(options)}, got {len(branches)}."
        )
    return list(branches)


def _are_functions(
    options: Sequence[str], branches: Sequence[Any], operands: Sequence[Any]
) -> bool:
    outputs = [n for n, b in zip(options, branches, strict=True) if not callable(b)]
    if outputs and len(outputs) < len(options):
        raise TypeError(
            f"branches must all be functions, or all be outputs: {listed(outputs)} "
            "cannot be called."
        )
    if outputs and operands:
        raise TypeError("branches are outputs, not functions: they take no operands.")
    return not outputs


def _check_alike(
    options: Sequence[str], outputs: Sequence[Any], mixed: bool = False
) -> None:
    """Checks that the outputs of all branches have one structure, shape and dtype."""
    first, structure = jax.tree.flatten_with_path(outputs[0])
    for option, output in zip(options, outputs, strict=True):
        leaves, own = jax.tree.flatten(output)
        if own != structure:
            raise ValueError(
                f"branches {options[0]!r} and {option!r} have different outputs: "
                f"{structure} and {own}."
            )
        for (path, one), other in zip(first, leaves, strict=True):
            where = f" at {path_name(path)!r}" if path else ""
            if jnp.shape(one) != jnp.shape(other):
                raise ValueError(
                    f"branches {options[0]!r} and {option!r} have outputs of different "
                    f"shapes{where}: {jnp.shape(one)} and {jnp.shape(other)}."
                )
            types = [jax.dtypes.result_type(x) for x in (one, other)]
            if types[0] != types[1]:
                raise TypeError(
                    f"branches {options[0]!r} and {option!r} have outputs of different "
                    f"dtypes{where}: {types[0]} and {types[1]}."
                )
            if mixed and not jnp.issubdtype(types[0], jnp.inexact):
                raise TypeError(
                    f"the output of branch {option!r}{where} is {types[0]}, which "
                    "weights cannot mix: harden the choice, or give real numbers."
                )


def harden(params: Params) -> Any:
    r"""Takes the likeliest option of every choice in a tree of parameters.

    .. math::
      n^* = \arg\max_n a_n

    The model is the same function, of the hardened tree: :func:`choose` leaves it as it
    is, and :func:`apply_choice` runs the branch that is left, alone.

    Args:
      params: Any tree with :class:`ChoiceLogits`, wherever they are.

    Returns:
      The same tree with :class:`HardChoice` for them: the index is static where the
      logits are one vector whose values are known, an int32 array of the leading axes
      under ``jit`` and ``vmap`` or of stacked logits. Of options that are equally
      likely the first; a NaN logit counts as the least likely one where it cannot
      raise. What :func:`apply_choice` leaves out costs no time; parameters of other
      options are still in the tree.

    Raises:
      ValueError: No choice in the tree, a choice with another number of logits than
        options, or a logit that is known to be NaN.

    Examples:
      >>> import yoto_jax as yoto
      >>> a = yoto.init_choice_logits(("conv", "skip"), probabilities=(1, 3))
      >>> yoto.harden({"w": 1.0, "block": a})
      {'block': HardChoice('skip'), 'w': 1.0}

    References:
      Liu et al., `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019, Section 2.1.

    .. warning::
      The discrete model is another one than the mixture: measure it. Optimizer states
      match the tree before; start new ones to train on.
    """
    if not any(map(is_choice, jax.tree.leaves(params, is_leaf=is_choice))):
        raise ValueError("params hold no choice to harden (see init_choice_logits).")
    for place, choice in choice_logits_in(params):
        check_choice_logits(choice)
        if _known(choice) and np.isnan(np.asarray(choice.logits, np.float64)).any():
            raise ValueError(
                f"the choice at {place or 'the root'} has a NaN logit: {choice!r}."
            )
    return jax.tree.map(
        lambda x: _hardened(x) if is_choice_logits(x) and jax.tree.leaves(x) else x,
        params,
        is_leaf=is_choice,
    )


def _known(choice: ChoiceLogits) -> bool:
    return not isinstance(choice.logits, jax.core.Tracer)


def _hardened(choice: ChoiceLogits) -> HardChoice:
    a = choice.logits
    index = jnp.argmax(jnp.where(jnp.isnan(a), -jnp.inf, a), axis=-1).astype(jnp.int32)
    static = _known(choice) and a.ndim == 1
    return HardChoice(int(index) if static else index, choice.options)


def steer_choices(grads: Params, held_out: Params) -> Any:
    r"""Takes the gradients of choices from a held-out loss, all else from training.

    .. math::
      (\nabla_w L_{\mathrm{train}}, \; \nabla_a L_{\mathrm{val}})

    First-order DARTS in one run: the optimizer steps on both at once.

    Args:
      grads: Gradients of the training loss, a tree with :class:`ChoiceLogits`.
      held_out: Those of the loss on held-out data, a tree like it.

    Returns:
      The tree with every :class:`ChoiceLogits` of ``held_out``. Under ``jit``, other
      gradients of the held-out loss are not computed.

    Raises:
      ValueError: The gradients hold no choice, or another tree.

    Examples:
      >>> import yoto_jax as yoto
      >>> import jax.numpy as jnp
      >>> a = yoto.init_choice_logits(("conv", "skip"))
      >>> held_out = yoto.ChoiceLogits(jnp.array([0.5, -0.5]), a.options)
      >>> yoto.steer_choices({"a": a, "w": 1.0}, {"a": held_out, "w": 2.0})
      {'a': ChoiceLogits(conv=0.5, skip=-0.5), 'w': 1.0}

    References:
      Liu et al., `DARTS <https://arxiv.org/abs/1806.09055>`_, 2019, Algorithm 1 with
      xi = 0.

    .. warning::
      A choice that the held-out loss does not depend on, such as one of augmentations
      or of training losses, has no gradient of first order and does not move.
    """
    if not choice_logits_in(grads):
        raise ValueError("grads hold no ChoiceLogits: there is nothing to steer.")
    if jax.tree.structure(grads) != jax.tree.structure(held_out):
        raise ValueError(
            f"held_out must be a tree like grads, {jax.tree.structure(grads)}, got "
            f"{jax.tree.structure(held_out)}."
        )
    return jax.tree.map(
        lambda x, y: y if is_choice_logits(x) else x,
        grads,
        held_out,
        is_leaf=is_choice_logits,
    )
