"""Layers and gradients for Flax NNX. Needs ``pip install yoto_jax[flax]``."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

try:
    from flax import errors, nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.nnx needs Flax: pip install 'yoto_jax[flax]'"
    ) from error

from yoto_jax._composite_loss import composite_loss
from yoto_jax._loss_logits import init_loss_logits, loss_weights
from yoto_jax._losses import Losses, Present, PyTree, State
from yoto_jax._unwrap_loss_logits import unwrap_loss_logits as unwrap_loss_logits
from yoto_jax._weighting import LossWeighting
from yoto_jax.conditional._film import (
    SLOPE,
    is_empty,
    modulate,
    open_gate,
)
from yoto_jax.gradients._output import split_aux
from yoto_jax.gradients._pass import GradientSource
from yoto_jax.gradients._representation import OfRepresentation
from yoto_jax.gradients._steering import Steering
from yoto_jax.gradients._value_and_grad import value_and_grad as _value_and_grad


class CompositeLoss(nnx.Module):
    r"""Composite loss layer: :math:`L_e = \sum_i \mathrm{Softmax}(\mu)_i\, l_i`.

    The loss logits are an ``nnx.Param``. Train them with :func:`yoto_jax.adamw` or
    :func:`yoto_jax.sgdw` in an ``nnx.Optimizer`` like any other parameter, or with an
    optimizer of your own inside :func:`unwrap_loss_logits`.

    Args:
      losses: Tree of scalar losses, or of anything with their shape and dtype.
      primary: Path or index of the primary loss, or ``None``.
      epsilon: Initial weights relative to the primary loss, see
        :func:`yoto_jax.init_loss_logits`.
      rngs: Not used.

    Attributes:
      loss_logits: The parameter.

    Examples:
      >>> from yoto_jax.nnx import CompositeLoss
      >>> layer = CompositeLoss({"depth": 0.0, "camera": 0.0}, "depth", epsilon=0.25)
      >>> print(round(float(layer({"depth": 2.0, "camera": 1.0})), 2))
      1.8
      >>> weights = layer.loss_weights
      >>> print({name: round(float(weight), 2) for name, weight in weights.items()})
      {'camera': 0.2, 'depth': 0.8}

    References:
      Sakaridis, `You Only Train Once <https://arxiv.org/abs/2506.04349>`_, 2025,
      Section 3.1.
    """

    def __init__(
        self,
        losses: Losses,
        primary: str | int | None,
        *,
        epsilon: PyTree = 0.1,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs  # Accepted as all NNX modules do; nothing here is random.
        self.loss_logits = nnx.Param(init_loss_logits(losses, primary, epsilon=epsilon))

    def __call__(self, losses: Losses, *, present: Present | None = None) -> jax.Array:
        """Composite loss of a tree of scalar losses, of those that are present."""
        return composite_loss(losses, self.loss_logits.get_value(), present=present)

    @property
    def loss_weights(self) -> PyTree:
        """The current loss weights, a tree like the losses."""
        return loss_weights(self.loss_logits.get_value())


class FiLM(nnx.Module):
    r"""FiLM: scales and shifts every feature by functions of the loss weights.

    .. math::
      y = (1 + s(c))\, x + t(c)

    The layer changes nothing at the start, exactly: its last kernel is zero. Put it
    behind ``nnx.Linear`` or ``nnx.Conv`` and before the nonlinearity, or behind the
    normalisation of an attention block. See :func:`yoto_jax.conditional.film`.

    Args:
      encoding_size: Size E of the encoding of the loss weights, see
        :func:`yoto_jax.conditional.encoding_size`. With 0 the layer does nothing.
      features: Number C of features to modulate.
      hidden: Widths of the hidden layers between encoding and modulation. ``()`` is a
        linear map: the choice behind a trunk of your own that several layers share.
      dtype: Of the computation of scale and shift; default: that of its inputs.
      param_dtype: Of the parameters.
      rngs: Random streams; ``params`` is used.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from yoto_jax.nnx import FiLM
      >>> layer = FiLM(1, 8, hidden=(16,), rngs=nnx.Rngs(0))
      >>> images, encoding = jnp.ones((2, 4, 4, 8)), jnp.array([[-1.0], [1.0]])
      >>> print((layer(images, encoding) == images).all())
      True

    References:
      Perez et al., `FiLM <https://arxiv.org/abs/1709.07871>`_, 2018. Dosovitskiy and
      Djolonga, `You Only Train Once
      <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.
    """

    def __init__(
        self,
        encoding_size: int,
        features: int,
        *,
        hidden: Sequence[int] = (256,),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        zeros = nnx.initializers.zeros_init()
        self.encoding_size = encoding_size
        pairs = list(itertools.pairwise((encoding_size, *hidden, 2 * features)))
        if encoding_size == 0:  # Nothing to be told: nothing to learn from.
            pairs = []
        self.layers = nnx.List(
            nnx.Linear(
                *pair,
                kernel_init=zeros if i == len(pairs) - 1 else first,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for i, pair in enumerate(pairs)
        )

    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Modulated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if is_empty(encoding, self.encoding_size):
            return x
        c = encoding
        for i, layer in enumerate(self.layers):
            c = layer(nnx.leaky_relu(c, SLOPE) if i else c)
        return modulate(x, *jnp.split(c, 2, axis=-1))


class Gate(nnx.Module):
    r"""Multiplies every feature by a gate, a function of the loss weights.

    .. math::
      y = 2\, \sigma(W c + b)\, x

    Exactly the identity at the start. See :func:`yoto_jax.conditional.gate`.

    Args:
      encoding_size: Size E of the encoding of the loss weights. With 0 the layer does
        nothing.
      features: Number C of features to gate.
      dtype: Of the computation of the gate; default: that of its inputs.
      param_dtype: Of the parameters.
      rngs: Random streams, accepted as all NNX modules do; nothing here is random.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from yoto_jax.nnx import Gate
      >>> x, encoding = jnp.arange(6.0).reshape(2, 3), jnp.array([[-1.0], [1.0]])
      >>> print((Gate(1, 3, rngs=nnx.Rngs(0))(x, encoding) == x).all())
      True

    References:
      Bae et al., `Multi-Rate VAE <https://arxiv.org/abs/2212.03905>`_, 2023.
    """

    def __init__(
        self,
        encoding_size: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.encoding_size = encoding_size
        if encoding_size == 0:
            return  # Nothing to be told: nothing to learn from.
        self.linear = nnx.Linear(
            encoding_size,
            features,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, encoding: jax.Array) -> jax.Array:
        """Gated features ``(n, ..., C)``, for an encoding ``(n, E)``."""
        if is_empty(encoding, self.encoding_size):
            return x
        return open_gate(x, self.linear(encoding))


def value_and_grad(
    loss_fn: Callable[..., Any],
    weighting: LossWeighting,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    gradients: GradientSource | None = None,
    steering: Steering | None = None,
    statistics: Mapping[str, Callable[..., Any]] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
) -> Callable[..., Any]:
    r"""Losses, the gradient of their weighted sum, and the weighting's next state.

    :func:`yoto_jax.value_and_grad` for NNX modules. Whatever the forward pass changes
    in the module (batch statistics, counts of random streams, caches) is updated in
    place, as by ``nnx.value_and_grad``: once in a call, with the values of one forward
    pass on ``args``, however many gradients the weighting looks at. What is run for
    ``steering`` and ``statistics`` leaves no trace.

    Args:
      loss_fn: ``loss_fn(model, *args) -> losses``, any tree of scalars. Random streams
        or other modules that it changes must be part of ``model``.
      weighting: Any :class:`yoto_jax.LossWeighting`.
      wrt: Filter of the variables to differentiate, as that of the ``nnx.Optimizer``.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      gradients: As in :func:`yoto_jax.value_and_grad`. ``yoto.of_parameters`` selects
        from the ``nnx.State`` of ``wrt``: ``select=lambda params: params.encoder``.
        With ``yoto.of_representation(encoder)``, ``encoder(model, *args) -> z`` and
        ``loss_fn(model, z, *args)``, which sees the module as the encoder left it.
        Batch statistics are passed on as they are; any other variable that the encoder
        changes, such as an ``nnx.Cache``, is part of z, and so is what it sows: methods
        that count entries see it. To watch an encoder, take ``nnx.capture``.
      steering: As in :func:`yoto_jax.value_and_grad`.
      statistics: Functions ``(model, *args) -> (K,)``, by name.
      axis_name: As in :func:`yoto_jax.value_and_grad`.
      param_specs: As in :func:`yoto_jax.value_and_grad`.

    Returns:
      ``fn(model, state, *args, **kwargs) -> (losses, grads, state)``, or with
      ``on_validation`` ``fn(model, state, validation, *args, **kwargs)``. ``grads`` is
      an ``nnx.State``, for ``optimizer.update(model, grads)``.

    Raises:
      ValueError: ``wrt`` finds nothing in the module, or ``loss_fn`` changes more of it
        than its variables and arrays.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> from flax import nnx
      >>> from yoto_jax.nnx import value_and_grad
      >>> def loss_fn(model, x):
      ...     y = model(x)
      ...     return {"fit": jnp.mean((y - 1) ** 2), "size": jnp.mean(y**2)}
      >>> model = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> weighting = yoto.weightings.upgrad()
      >>> state = weighting.init({"fit": 0.0, "size": 0.0})
      >>> step = nnx.jit(value_and_grad(loss_fn, weighting))
      >>> losses, grads, state = step(model, state, 4 * jnp.eye(2))
      >>> print(grads.bias[...], model.mean[...])
      [-0.5 -0.5] [1. 1.]
    """

    def pure_loss(
        params: nnx.State, rest: "_Rest", *args: Any, **kwargs: Any
    ) -> tuple[PyTree, Any]:
        return of_model(rest.merge(params), params, rest, *args, **kwargs)

    def pure_heads(
        params: nnx.State, passed: Any, rest: "_Rest", *args: Any, **kwargs: Any
    ) -> tuple[PyTree, Any]:
        z, changed = passed
        model = rest.merge(params)
        nnx.update(model, _show(changed))
        return of_model(model, params, rest, z, *args, **kwargs)

    def of_model(
        model: Any, params: nnx.State, rest: "_Rest", *args: Any, **kwargs: Any
    ) -> tuple[PyTree, Any]:
        out = _call(loss_fn, model, *args, **kwargs)
        losses, aux = split_aux(out, has_aux)
        return losses, (aux, rest.changes(params, model))

    def pure_encoder(
        params: nnx.State, rest: "_Rest", *args: Any, **kwargs: Any
    ) -> tuple[PyTree, nnx.State]:
        assert encoder is not None
        model = rest.merge(params)
        z = _call(encoder, model, *args, **kwargs)
        return z, _hide(rest.changes(params, model))

    def pure(statistic: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, rest, *args, **kwargs: _call(
            statistic, rest.merge(params), *args, **kwargs
        )

    encoder = None
    if isinstance(gradients, OfRepresentation):
        encoder = gradients.encoder
        gradients = dataclasses.replace(gradients, encoder=pure_encoder)
    engine = _value_and_grad(
        pure_loss if encoder is None else pure_heads,
        weighting,
        has_aux=True,
        gradients=gradients,
        steering=steering,
        statistics={name: pure(f) for name, f in (statistics or {}).items()},
        axis_name=axis_name,
        param_specs=param_specs,
    )

    def fn(
        model: Any, state: State, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, nnx.State, Any]:
        graphdef, params, others = nnx.split(model, wrt, ...)
        if not jax.tree.leaves(params):
            raise ValueError(
                f"wrt={wrt} finds no variable in {type(model).__name__}: the model is "
                "the first argument, fn(model, state, ...)."
            )
        rest = _Rest(graphdef, others)
        if steering is not None and steering.validation:
            validation, args = steering.take(args)
            args = ((rest, *validation), rest, *args)
        else:
            args = (rest, *args)
        (losses, (aux, changed)), grads, state = engine(params, state, *args, **kwargs)
        _update(model, changed)
        return ((losses, aux) if has_aux else losses), grads, state

    return fn


@dataclasses.dataclass(frozen=True)
class _Rest:
    """All of a module but what is differentiated."""

    graphdef: Any
    others: nnx.State

    def merge(self, params: nnx.State) -> Any:
        """The module, in a copy."""
        return nnx.merge(self.graphdef, params, self.others, copy=True)

    def changes(self, params: nnx.State, model: Any) -> nnx.State:
        """What in a module has another value than at first, or is new."""
        old = dict(nnx.to_flat_state(nnx.merge_state(params, self.others)))
        changed = nnx.from_flat_state(
            (path, value)
            for path, value in nnx.to_flat_state(nnx.state(model))
            if path not in old or not _is_same(old[path], value)
        )
        updated = self.merge(params)
        nnx.update(updated, changed)
        if nnx.graphdef(updated) != nnx.graphdef(model):
            raise ValueError(
                f"the forward pass changes {type(model).__name__} in more than the "
                "values of its variables and arrays: it removes or replaces a part, or "
                "sets an attribute that is no array. Keep what changes in an "
                "nnx.Variable."
            )
        return changed


def _is_same(old: Any, new: Any) -> bool:
    old, new = jax.tree.leaves(old), jax.tree.leaves(new)
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _call(f: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return f(model, *args, **kwargs)
    except errors.TraceContextError as error:
        error.add_note(
            "yoto_jax.nnx.value_and_grad keeps the state of its first argument alone. "
            "Make random streams and other modules that change a part of that: "
            "nnx.Dict(model=model, rngs=rngs)."
        )
        raise


def _update(model: Any, changed: nnx.State) -> None:
    """Assign what has changed, if the module belongs to the current trace."""
    live = dict(nnx.to_flat_state(nnx.state(model)))
    try:
        for path, _ in nnx.to_flat_state(changed):
            variable = live.get(path)
            if isinstance(variable, nnx.Variable):  # nnx.update would not check it
                variable.set_raw_value(variable.get_raw_value())
        nnx.update(model, changed)
    except errors.TraceContextError as error:
        error.add_note(
            "The module comes from outside of a jax.jit or another transformation. "
            "Give it to nnx.jit as an argument, or nnx.split it outside and nnx.merge "
            "it inside."
        )
        raise


# Batch statistics on their way from the encoder to the losses: as bits they have no
# gradient, and are not counted with the entries of the representation.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Bits:
    bits: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})


def _hide(changed: nnx.State) -> nnx.State:
    def hide(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return _Bits(lax.bitcast_convert_type(x, unsigned), x.dtype)

    return jax.tree.map(
        lambda v: jax.tree.map(hide, v) if isinstance(v, nnx.BatchStat) else v,
        changed,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )


def _show(changed: nnx.State) -> nnx.State:
    is_hidden = lambda x: isinstance(x, _Bits)
    show = lambda x: lax.bitcast_convert_type(x.bits, x.dtype) if is_hidden(x) else x
    return jax.tree.map(show, changed, is_leaf=is_hidden)
