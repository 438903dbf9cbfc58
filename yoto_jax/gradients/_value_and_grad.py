"""The engine: losses, the gradients that a weighting needs, and one update."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Concatenate, Literal, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp

from yoto_jax._jaxlib import warn_of_jaxlib
from yoto_jax._losses import Params, PyTree, State, find_loss, split
from yoto_jax._masked_mean import MaskedLosses
from yoto_jax._params import check_params
from yoto_jax._varying import Axes, check_axes, named_axes, vary_over
from yoto_jax._weighting import (
    GRADIENT_STATISTICS,
    LossWeighting,
    and_present,
    check_weighting,
    mask_weights,
    weights_of,
)
from yoto_jax.gradients._devices import Devices, mean_over, spread_of
from yoto_jax.gradients._parameters import OfParameters
from yoto_jax.gradients._pass import Batch, GradientSource, Pass
from yoto_jax.gradients._statistics import if_due, replace_row
from yoto_jax.gradients._steering import Steering

P = TypeVar("P")  # parameters
L = TypeVar("L")  # losses
A = TypeVar("A")  # auxiliary output
S = TypeVar("S")  # state of a weighting
L_co = TypeVar("L_co", covariant=True)


class ValueAndGrad(Protocol[P, L_co]):
    """What :func:`value_and_grad` returns."""

    def __call__(
        self, params: P, state: S, /, *args: Any, **kwargs: Any
    ) -> tuple[L_co, P, S]:
        """Losses, the gradient of their weighted sum, the weighting's next state."""
        ...


@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[P, ...], L],
    weighting: LossWeighting,
    *,
    has_aux: Literal[False] = False,
    gradients: GradientSource | None = None,
    steering: Steering | None = None,
    statistics: Mapping[str, Callable[..., Any]] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
) -> ValueAndGrad[P, L]: ...


@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[P, ...], tuple[L, A]],
    weighting: LossWeighting,
    *,
    has_aux: bool,
    gradients: GradientSource | None = None,
    steering: Steering | None = None,
    statistics: Mapping[str, Callable[..., Any]] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
) -> ValueAndGrad[P, tuple[L, A]]: ...


def value_and_grad(
    loss_fn: Callable[..., Any],
    weighting: LossWeighting,
    *,
    has_aux: bool = False,
    gradients: GradientSource | None = None,
    steering: Steering | None = None,
    statistics: Mapping[str, Callable[..., Any]] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    param_specs: PyTree | None = None,
) -> Callable[..., Any]:
    r"""Losses, the gradient of their weighted sum, and the weighting's next state.

    .. math::
      \nabla_\theta \sum_k w_k L_k(\theta) = J^T w, \qquad
      w = \mathrm{weighting}(L, J J^T).

    Args:
      loss_fn: ``loss_fn(params, *args) -> losses``, any tree of scalars, or
        :class:`yoto_jax.MaskedLosses` where a batch may lack the labels of some.
      weighting: Any :class:`yoto_jax.LossWeighting`.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      gradients: Where per-loss gradients are taken: :func:`yoto_jax.of_parameters` (the
        default, all of them), or :func:`yoto_jax.of_representation`.
      steering: Where a weighting with a downstream loss looks at it:
        :func:`yoto_jax.on_training` (the default), :func:`yoto_jax.on_validation`.
      statistics: Functions ``(params, *args) -> (K,) or a tree like the losses`` for
        whatever else the weighting needs, by the name it asks for; ``(K, K)`` for
        ``"cross_gramian"``.
      axis_name: Axis, or axes, of ``pmap`` or ``shard_map`` that the batch is spread
        over: losses and gradients are averaged over it before a weight is formed, and
        come out averaged. Under ``jit`` with sharded arrays nothing is needed.
      param_specs: ``PartitionSpec`` of the parameters, as in ``in_specs``, where
        ``shard_map`` spreads them over devices. Gradients come out in the same parts.

    Returns:
      ``fn(params, state, *args, **kwargs) -> (losses, grads, state)``; with
      ``on_validation``, ``fn(params, state, validation, *args, **kwargs)``. ``losses``
      are unweighted, ``(losses, aux)`` if ``has_aux``. ``state`` comes from
      ``weighting.init(losses)``; its ``loss_weights`` are those just used.

    Raises:
      TypeError: A loss is not a floating-point number.
      ValueError: Losses are not scalars or do not match the state, or a
        statistic that the weighting needs is not provided.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> def loss_fn(w, x):
      ...     return {"fit": jnp.mean((x @ w - 1) ** 2), "size": jnp.sum(w**2)}
      >>> w, x = jnp.array([0.5, -1.0]), jnp.eye(2)
      >>> weighting = yoto.weightings.upgrad()
      >>> state = weighting.init(jax.eval_shape(loss_fn, w, x))
      >>> step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
      >>> losses, grads, state = step(w, state, x)
      >>> print(grads, state.loss_weights["size"])
      [ 0.25 -2.  ] 0.5

    .. warning::
      A batch that is not finite leaves the state as it was, but for its counter
      ``num_skipped``; the gradient still carries the batch's NaN
      (``optax.apply_if_finite`` keeps it from the parameters).
    """
    engine = _Engine(
        loss_fn=loss_fn,
        weighting=_check_weighting(weighting, statistics or {}),
        has_aux=has_aux,
        gradients=OfParameters() if gradients is None else _check_source(gradients),
        steering=Steering() if steering is None else _check_steering(steering),
        statistics=statistics or {},
        axes=named_axes(axis_name),
        param_specs=param_specs,
    )
    engine.steering.check(weighting)

    def fn(
        params: Params, state: State, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, PyTree, Any]:
        check_axes(engine.axes)
        check_params(params)
        _check_is_state(state)
        warn_of_jaxlib()
        validation, args = engine.steering.take(args)
        return _Step(engine, params, state, args, kwargs, validation).take()

    return fn


def _check_is_state(state: State) -> None:
    if weights_of(state) is None:
        raise TypeError(
            "the second argument must be the state of the weighting, which "
            f"weighting.init(losses) makes, got {type(state).__name__}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Engine:
    """What :func:`value_and_grad` was told."""

    loss_fn: Callable[..., Any]
    weighting: LossWeighting
    has_aux: bool
    gradients: GradientSource
    steering: Steering
    statistics: Mapping[str, Callable[..., Any]]
    axes: Axes
    param_specs: PyTree | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One call: batches are looked at, losses weighed, one gradient is taken."""

    engine: _Engine
    params: Params
    state: State
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    validation: tuple[Any, ...]

    def take(self) -> tuple[Any, PyTree, Any]:
        """Losses, gradient, state."""
        training = self._run(self.params, self.args, trains=True)
        watched = training
        if self.engine.steering.all_losses:
            watched = self._run(self.params, self.validation)
        weights, state = self._weigh(training, watched)
        weights = mask_weights(weights, training.present)
        grads, state = training.combine(weights, state, self.engine.weighting)
        losses = training.losses
        if training.present is not None:
            present = split(training.present, jax.tree.structure(losses))
            losses = MaskedLosses(losses, present)
        return (
            ((losses, training.aux) if self.engine.has_aux else losses),
            grads,
            state,
        )

    def _run(self, params: Params, args: tuple[Any, ...], trains: bool = False) -> Pass:
        engine = self.engine
        spread = spread_of(params, engine.param_specs, engine.axes)
        return engine.gradients.forward(
            Batch(
                loss_fn=engine.loss_fn,
                has_aux=engine.has_aux,
                params=vary_over(params, engine.axes),
                args=args,
                kwargs=self.kwargs,
                devices=Devices(engine.axes, spread),
                weighting=engine.weighting,
                trains=trains,
            )
        )

    def _weigh(self, training: Pass, watched: Pass) -> tuple[PyTree, Any]:
        """The weights, and the state with what the weighting has learned."""
        weighting = self.engine.weighting
        look = lambda: self._look(training, watched)
        seen, steers = if_due(weighting, self.state, look)
        if watched.present is None and steers is None:
            return weighting.update(watched.losses, self.state, **seen)
        structure = jax.tree.structure(watched.losses)
        present = watched.present
        if present is None:  # Of a training batch that has all, but does not steer.
            present = jnp.ones((structure.num_leaves,), jnp.bool_)
        if steers is not None:
            position = find_loss("downstream", weighting.downstream, training.losses)
            due = True if weighting.due is None else weighting.due(self.state)
            before = present[position]
            present = present.at[position].set(jnp.where(due, steers, before))
        told = split(present, structure)
        seen = and_present(weighting, seen, told)
        weights, state = weighting.update(watched.losses, self.state, **seen)
        if steers is not None or self.engine.steering.all_losses:
            # With what it holds for losses that the training batch alone has.
            weights = weights_of(state)
        return weights, state

    def _look(
        self, training: Pass, watched: Pass
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """Statistics, and whether the downstream loss is there (None: all are)."""
        weighting, steering = self.engine.weighting, self.engine.steering
        asked = [name for name in weighting.needs if name in GRADIENT_STATISTICS]
        seen: dict[str, Any] = watched.statistics(asked) if asked else {}
        seen |= self._other_statistics()
        aligned = "alignment" in weighting.needs
        if not aligned and not steering.moves:
            return seen, None
        position = find_loss("downstream", weighting.downstream, training.losses)
        shown = self._pass_of_downstream(training, watched)
        derivatives, squared = watched.along(shown.direction(position))
        if aligned:
            seen["alignment"] = derivatives
        else:
            gramian = seen["gramian"]
            seen["gramian"] = replace_row(gramian, position, derivatives, squared)
        if shown.present is None and watched.present is None:
            return seen, None
        there = True if shown.present is None else shown.present[position]
        return seen, jnp.asarray(there)

    def _pass_of_downstream(self, training: Pass, watched: Pass) -> Pass:
        """The pass whose downstream gradient steers."""
        steering = self.engine.steering
        if not steering.moves:
            return watched
        args = self.validation if steering.validation else self.args
        params = self._ahead(training) if steering.looks_ahead else self.params
        return self._run(params, args)

    def _ahead(self, training: Pass) -> PyTree:
        """The parameters after a virtual step with the weights used last."""
        weights = weights_of(self.state)
        weights = mask_weights(weights, training.present)
        silent = self.engine.weighting._replace(observe=None)
        descent, _ = training.combine(weights, self.state, silent)
        rate = self.engine.steering.lookahead

        def move(p: Any, g: Any) -> Any:
            still = g.dtype == jax.dtypes.float0
            return p if still else (p - rate * g).astype(jnp.result_type(p))

        return jax.tree.map(move, self.params, descent)

    def _other_statistics(self) -> dict[str, Any]:
        """What the user's own functions tell, averaged over the devices."""
        engine = self.engine
        found: dict[str, Any] = {}
        for name, statistic in engine.statistics.items():
            if any(spread_of(self.params, engine.param_specs, engine.axes)):
                raise ValueError(
                    f"statistics={{{name!r}: ...}} cannot tell anything of parameters "
                    "that param_specs= spreads over devices."
                )
            params = vary_over(self.params, engine.axes)
            local = statistic(params, *self.args, **self.kwargs)
            found[name] = mean_over(jax.tree.map(jnp.asarray, local), engine.axes)
        return found


def _check_weighting(
    weighting: Any, statistics: Mapping[str, Callable[..., Any]]
) -> LossWeighting:
    check_weighting(weighting)
    known = (*GRADIENT_STATISTICS, "losses", "alignment", *statistics)
    for name in weighting.needs:
        if name not in known:
            raise ValueError(
                f"this weighting needs {name!r}, which losses and gradients do not "
                f"tell: give statistics={{{name!r}: function}}."
            )
    return weighting


def _check_source(gradients: Any) -> GradientSource:
    if not hasattr(gradients, "forward"):
        raise TypeError(
            "gradients must be what yoto.of_parameters() or yoto.of_representation() "
            f"returns, got a {type(gradients).__name__}."
        )
    return gradients


def _check_steering(steering: Any) -> Steering:
    if not isinstance(steering, Steering):
        raise TypeError(
            "steering must be what yoto.on_training() or yoto.on_validation() returns, "
            f"got a {type(steering).__name__}."
        )
    return steering
