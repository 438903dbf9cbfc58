"""Gradients of the parameters: all of them, or a part."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from yoto_jax._checks import check_flag
from yoto_jax._jaxlib import check_jaxlib
from yoto_jax._losses import (
    Params,
    PyTree,
    State,
    Weights,
    listed,
    loss_names,
    path_name,
)
from yoto_jax._numerics import stacked
from yoto_jax._varying import vary_over
from yoto_jax._weighting import LossWeighting
from yoto_jax.gradients._devices import mean_losses, mean_over
from yoto_jax.gradients._output import without_effect
from yoto_jax.gradients._pass import Batch, Pass
from yoto_jax.gradients._rows import (
    add_axis,
    combine_rows,
    cotangents_of,
    one_hot,
    one_hots,
    rows_of,
    tangent_of,
)
from yoto_jax.gradients._statistics import squared_norm, statistics_of

Part = Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True, eq=False)
class OfParameters:
    """The source that :func:`of_parameters` makes."""

    select: Part | None = None
    unweighted: Part | None = None
    chunk_size: int | None = None
    keep: bool = True

    def forward(self, batch: Batch) -> Pass:
        return _ParametersPass(self, batch)


def of_parameters(
    *,
    select: Callable[[Any], Any] | None = None,
    unweighted: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    keep: bool = True,
) -> OfParameters:
    r"""Takes per-loss gradients of the parameters: K backward passes.

    .. math::
      J_k = \nabla_\theta L_k, \qquad \text{update} = \sum_k w_k J_k .

    Args:
      select: ``select(params) -> part``, such as ``lambda params: params["last"]``. The
        weighting then sees gradients of that part alone: K backward passes down to
        there, and one all the way for the update.
      unweighted: ``unweighted(params) -> part``: parameters that descend the plain sum
        of the losses, such as the losses' own heads. The weighting sees, and weighs,
        only the gradients of the remaining parameters.
      chunk_size: Number of gradients computed at a time (``None``: all in one
        ``vmap``). It bounds the memory of the backward passes.
      keep: Whether the K gradients are kept until the weights are known. False saves
        memory for one more backward pass: they are not stored. With ``chunk_size`` no
        more than that many are there at any time: the Gramian is then :math:`J (J^\top
        e_k)`, a forward-mode pass along each gradient, which ``loss_fn`` has to allow.
        (With ``select`` they are never kept.)

    Returns:
      The value of ``gradients=`` in :func:`yoto_jax.value_and_grad`.

    Raises:
      ValueError: ``chunk_size`` is not a positive integer. In the call: ``select`` or
        ``unweighted`` returns something else than a part of the parameters, or the
        selected part has no effect on one of the losses.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> loss_fn = lambda p: {"a": (p["u"] * p["v"]) ** 2, "b": (p["v"] - 1) ** 2}
      >>> weighting = yoto.weightings.upgrad()
      >>> step = yoto.value_and_grad(
      ...     loss_fn,
      ...     weighting,
      ...     gradients=yoto.of_parameters(select=lambda p: p["v"]),
      ... )
      >>> params = {"u": jnp.array(2.0), "v": jnp.array(0.5)}
      >>> losses, grads, state = step(params, weighting.init({"a": 0.0, "b": 0.0}))
      >>> print(f'{grads["u"]:.3f} {state.loss_weights["a"]:.3f}')
      0.625 0.625
    """
    check_chunk_size(chunk_size)
    check_flag(keep=keep)
    for name, part in (("select", select), ("unweighted", unweighted)):
        if part is not None and not callable(part):
            raise TypeError(
                f"{name} must be a function of the parameters, such as "
                f"lambda params: params['encoder'], got {part!r}."
            )
    return OfParameters(select, unweighted, chunk_size, keep)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless this is a number of gradients, or None."""
    is_count = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (is_count and chunk_size > 0):
        raise ValueError(
            f"chunk_size must be a positive integer or None, got {chunk_size!r}."
        )


class _ParametersPass(Pass):
    def __init__(self, source: OfParameters, batch: Batch) -> None:
        self.params = params = batch.params
        self.axes, self.spread = batch.devices
        self.chunk_size = source.chunk_size
        self.bounded = not source.keep and source.chunk_size is not None
        self.loss_fn = lambda p: batch.losses(p)[0]
        self.local_losses, pullback, (self.aux, self.present) = jax.vjp(
            batch.losses, params, has_aux=True
        )
        self.losses = mean_losses(self.local_losses, self.axes)
        self.selects = source.select is not None
        self.pull = lambda ct: pullback(ct)[0]
        self.seen, self.unweighted = _parts(params, source.select, source.unweighted)
        if self.selects:
            self.pull_seen = _pull_part(self.loss_fn, params, self.seen)
        else:
            self.pull_seen = lambda ct: _at(self.seen, self.pull(ct))
        # What is computed in a branch of a cond cannot be kept beyond it.
        due = batch.weighting.due is None
        self.keeps = source.keep and not self.selects and due
        self.kept: PyTree | None = None

    def _check_effect(self) -> None:
        """Raise for a loss without the selected part, unless it may be absent."""
        if self.present is not None:
            return
        part = _at(self.seen, self.params)
        jaxpr = jax.make_jaxpr(_of_part(self.loss_fn, self.params))(part).jaxpr
        names = loss_names(jax.tree.structure(self.losses))
        without = without_effect(jaxpr, range(len(jaxpr.invars)), names)
        if without:
            raise ValueError(
                f"the parameters that select= returns have no effect on "
                f"{listed(without)}: a gradient that is zero there means nothing to a "
                "weighting. Add such a loss to one that they have an effect on, or "
                "select parameters that all losses depend on."
            )

    def statistics(self, names: Sequence[str]) -> dict[str, jax.Array]:
        leaves = _at(self.seen, self.params).values()
        if not any(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves):
            raise ValueError(
                "none of the parameters that the weighting looks at is a "
                "floating-point array: there are no gradients to tell of."
            )
        if self.selects:
            self._check_effect()
        if self.keeps:
            rows = rows_of(self.pull, self.local_losses, self.chunk_size)
            self.kept = mean_over(rows, self.axes, self.spread)
            seen = _at(self.seen, self.kept)
        elif "gramian" in names and not self.bounded:
            rows = rows_of(self.pull_seen, self.local_losses, self.chunk_size)
            seen = self._average_at(self.seen, rows)
        else:
            return self._statistics_one_by_one(names)
        return statistics_of(seen, names, self._spread_at(self.seen))

    def _statistics_one_by_one(self, names: Sequence[str]) -> dict[str, jax.Array]:
        check_jaxlib()
        spread = self._spread_at(self.seen)
        rest = [name for name in names if name != "gramian"]
        products = self._products_with() if "gramian" in names else None

        def one(cotangents: PyTree) -> dict[str, jax.Array]:
            gradient = self._average_at(self.seen, self.pull_seen(cotangents))
            found = statistics_of(add_axis(gradient), rest, spread)
            found = {name: x[0] for name, x in found.items()}
            if products is not None:
                found["gramian"] = products(gradient)
            return found

        several = None if self.chunk_size == 1 else self.chunk_size
        found = lax.map(one, one_hots(self.local_losses), batch_size=several)
        if products is not None:
            found["gramian"] = (found["gramian"] + found["gramian"].T) / 2
        return found

    def _products_with(self) -> Callable[[dict[int, jax.Array]], jax.Array]:
        """Inner products with one gradient: derivatives of the losses along it."""
        of_part = _of_part(self.loss_fn, self.params)
        part = {
            index: x
            for index, x in _at(self.seen, self.params).items()
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        }
        _, push = jax.linearize(of_part, part)

        def products(gradient: dict[int, jax.Array]) -> jax.Array:
            # Real parts, as of pairs of numbers: JAX's gradients are conjugated.
            along = {index: jnp.conj(gradient[index]) for index in part}
            tangents = push(vary_over(along, self.axes))
            return stacked(mean_losses(tangents, self.axes))

        return products

    def direction(self, position: int) -> PyTree:
        return self._average(self.pull(one_hot(self.local_losses, position)))

    def along(self, v: PyTree) -> tuple[jax.Array, jax.Array]:
        leaves, structure = jax.tree.flatten(tangent_of(v, self.params))
        is_float0 = lambda x: x.dtype == jax.dtypes.float0
        v = structure.unflatten(
            x if index in self.seen or is_float0(x) else jnp.zeros_like(x)
            for index, x in enumerate(leaves)
        )
        tangent = vary_over(v, self.axes)
        _, tangents = jax.jvp(self.loss_fn, (self.params,), (tangent,))
        derivatives = stacked(mean_losses(tangents, self.axes))
        return derivatives, squared_norm(v, self.spread)

    def combine(
        self, weights: Weights, state: State, weighting: LossWeighting
    ) -> tuple[PyTree, Any]:
        del weighting
        if self.kept is not None:
            grads = combine_rows(self.kept, stacked(weights))
        else:
            cotangents = cotangents_of(weights, self.local_losses)
            grads = self._average(self.pull(cotangents))
        if self.unweighted:
            plain = self._plain_sum(jax.tree.map(jnp.ones_like, weights))
            leaves, structure = jax.tree.flatten(grads)
            leaves = [plain.get(index, leaf) for index, leaf in enumerate(leaves)]
            grads = structure.unflatten(leaves)
        return grads, state

    def _plain_sum(self, ones: PyTree) -> dict[int, jax.Array]:
        """The gradient of the plain sum of the losses, of the unweighted leaves."""
        if self.kept is not None:
            return combine_rows(_at(self.unweighted, self.kept), stacked(ones))
        pull = _pull_part(self.loss_fn, self.params, self.unweighted)
        cotangents = cotangents_of(ones, self.local_losses)
        return self._average_at(self.unweighted, pull(cotangents))

    def _average(self, tree: PyTree) -> PyTree:
        return mean_over(tree, self.axes, self.spread)

    def _average_at(self, indices: Sequence[int], part: PyTree) -> PyTree:
        return mean_over(part, self.axes, self._spread_at(indices))

    def _spread_at(self, indices: Sequence[int]) -> list[Any]:
        return [self.spread[index] for index in sorted(set(indices))]


# Parts of the parameters.


def _parts(
    params: Params, select: Part | None, unweighted: Part | None
) -> tuple[list[int], list[int]]:
    """Indices of the leaves that the weighting sees, and of those left unweighted."""
    count = len(jax.tree.leaves(params))
    apart = [] if unweighted is None else _leaf_indices(params, unweighted)
    if apart and len(set(apart)) == count:
        raise ValueError(
            "unweighted= names all parameters: none are left to be weighed."
        )
    if select is None:
        return [index for index in range(count) if index not in apart], apart
    seen = _leaf_indices(params, select)
    if set(seen) & set(apart):
        raise ValueError(
            "select= and unweighted= name the same parameters: the weights would come "
            "from gradients that they do not act on."
        )
    return seen, apart


def _leaf_indices(params: Params, part: Part) -> list[int]:
    """Which leaves a function picks out of a tree."""
    structure = jax.tree.structure(params)
    marks = [_Mark(index) for index in range(structure.num_leaves)]
    try:
        found = jax.tree.leaves(part(structure.unflatten(marks)))
    except TypeError:  # such as for an index into an array
        found = []
    except (KeyError, AttributeError) as error:
        names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"select and unweighted must return a part of the parameters: there is no "
            f"{error} in them; their arrays are {', '.join(names)}."
        ) from error
    indices = [mark.index for mark in found if isinstance(mark, _Mark)]
    if not indices or len(indices) != len(found):
        raise ValueError(
            "select and unweighted must return a part of the parameters as it is, such "
            "as lambda params: params['encoder'], with at least one array in it."
        )
    return indices


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Stands for one leaf."""

    index: int


def _at(indices: Sequence[int], tree: PyTree) -> dict[int, jax.Array]:
    """The leaves at these indices."""
    leaves = jax.tree.leaves(tree)
    return {index: leaves[index] for index in indices}


def _pull_part(
    f: Callable[[PyTree], PyTree], params: Params, indices: Sequence[int]
) -> Callable[[PyTree], dict[int, jax.Array]]:
    """A pullback to some leaves alone: what lies before them is never computed."""
    _, pullback = jax.vjp(_of_part(f, params), _at(indices, params))
    return lambda ct: pullback(ct)[0]


def _of_part(
    f: Callable[[PyTree], PyTree], params: Params
) -> Callable[[dict[int, jax.Array]], PyTree]:
    """A function of the parameters, as one of some leaves."""
    leaves, structure = jax.tree.flatten(params)

    def of_part(part: dict[int, jax.Array]) -> PyTree:
        merged = [part.get(index, leaf) for index, leaf in enumerate(leaves)]
        return f(structure.unflatten(merged))

    return of_part
