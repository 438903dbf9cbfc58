"""Whether losses conflict: their gradients, looked at now and then."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from yoto_jax._loss_spec import LossSpec
from yoto_jax._losses import (
    Losses,
    Params,
    Present,
    PyTree,
    State,
    stack_present,
)
from yoto_jax._numerics import all_finite, stacked
from yoto_jax._params import check_params
from yoto_jax._serialization import serializable_state
from yoto_jax._weighting import (
    LossWeighting,
    and_present,
    check_state,
    check_weighting,
    of_inner,
    without_absent,
)
from yoto_jax.gradients._devices import Devices
from yoto_jax.gradients._parameters import OfParameters
from yoto_jax.gradients._pass import Batch, GradientSource, Pass
from yoto_jax.monitoring._history import (
    downstream_of,
    fetch_rows,
    find_one,
    names_of,
)
from yoto_jax.monitoring._record import (
    Columns,
    check_size,
    columns_of,
    empty_ring,
    is_due,
    write_values,
)
from yoto_jax.weightings._static import equal
from yoto_jax.weightings._wrappers import observing_inner

_ROUNDING = 1e-5  # Of the cosine of float32 gradients.
_CANCELLED = 1e-6  # Of the squared length that the gradients could add up to: float32.


@serializable_state
class WatchedState(NamedTuple):
    """State of :func:`watched`: a ring buffer like that of :class:`HistoryState`."""

    calls: jax.Array  # int32 scalar
    row_steps: jax.Array  # int32 (length + 1,), -1 where nothing has been written
    rows: jax.Array  # float32 (length + 1, columns): the weights, which losses there
    # are, the lower triangle of the Gramian
    columns: tuple[Columns, ...]  # no arrays: names
    inner: Any

    loss_weights = of_inner("loss_weights")
    num_updates = of_inner("num_updates")
    num_skipped = of_inner("num_skipped")


def watched(
    weighting: LossWeighting,
    *,
    every: jax.typing.ArrayLike = 100,
    length: int = 100,
) -> LossWeighting:
    r"""Records the Gramian of the gradients every few updates, for any weighting.

    .. math::
      G_{ij} = \langle g_i, g_j \rangle, \qquad g_k = \nabla L_k,

    and the loss weights at every so many steps, for :func:`conflicts`. With a weighting
    that needs no gradients, K more backward passes are made at the steps looked at,
    which are :math:`1 + 2K/3` plain steps in arithmetic, and nothing at the others.
    Around a weighting that looks at the Gramian itself it is free.

    Args:
      weighting: Any :class:`yoto_jax.LossWeighting`.
      every: Updates from one look to the next (a positive integer). The first update is
        looked at.
      length: Number of looks that are kept, the latest ones, of K (K + 5) / 2 numbers
        each.

    Returns:
      A :class:`yoto_jax.LossWeighting` with the same weights, which needs the Gramian
      too. It goes around all other wrappers; :func:`recorded` may be inside or outside.

    Raises:
      TypeError: ``length`` or ``every`` is not an integer, or ``weighting`` is no
        weighting.
      ValueError: ``length`` or ``every`` is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> def loss_fn(w):
      ...     return {"a": w[0], "b": 3 * w[0] + 4 * w[1], "c": -2 * w[1]}
      >>> weighting = monitoring.watched(yoto.weightings.equal(), every=2)
      >>> w = jnp.ones(2)
      >>> state = weighting.init(jax.eval_shape(loss_fn, w))
      >>> step = jax.jit(yoto.value_and_grad(loss_fn, weighting))
      >>> for _ in range(4):
      ...     losses, grads, state = step(w, state)
      >>> seen = monitoring.conflicts(state)
      >>> print(seen.steps, seen.cosines["b", "c"], seen.shares["c"])
      [0 2] [-0.8 -0.8] [-0.2 -0.2]

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020; Shi et al., `Recon: Reducing
      Conflicting Gradients from the Root <https://arxiv.org/abs/2302.11289>`_, 2023,
      who watch cosines in training.

    .. note::
      A batch whose gradients or weights are not finite leaves no row, nor does one with
      inner products of gradients beyond float32, which rows are in. All statistics of
      a weighting come at the same steps: one that looks at other statistics at every
      step has the Gramian computed at every step too. Under ``vmap`` all lanes look at
      the steps at which any does.
    """
    check_size(length, every)
    check_weighting(weighting)

    def init(losses: Losses) -> WatchedState:
        columns = (columns_of(weighting, losses),)
        width = _width(len(columns[0]))
        ring = empty_ring(length, width)
        return WatchedState(*ring, columns, weighting.init(losses))

    def due(state: WatchedState) -> jax.Array:
        check_state(state, WatchedState)
        here = is_due(state, every)
        return here if weighting.due is None else here | weighting.due(state.inner)

    def update(
        losses: Losses,
        state: WatchedState,
        *,
        gramian: Any = None,
        present: Present | None = None,
        **statistics: Any,
    ) -> tuple[PyTree, WatchedState]:
        check_state(state, WatchedState)
        gramian = _check_gramian(gramian, state.columns)
        if "gramian" in weighting.needs:
            statistics["gramian"] = gramian
        seen = and_present(weighting, statistics, present)
        weights, inner = weighting.update(losses, state.inner, **seen)
        mask = stack_present(present, jax.tree.structure(losses))
        values = _row(stacked(weights), mask, gramian)
        finite = all_finite(values)
        # Nothing that is not finite stays in the state, not even in the spare row.
        values = jnp.where(finite, values, 0)
        keep = is_due(state, every) & finite
        return weights, write_values(state, values, keep, every)._replace(inner=inner)

    needs = tuple(dict.fromkeys((*weighting.needs, "gramian")))
    always = weighting.due is None and {*weighting.needs} != {"losses"}
    return observing_inner(weighting)._replace(
        init=init, update=update, needs=needs, due=None if always else due
    )


class Conflicts(NamedTuple):
    r"""Recorded Gramians of the gradients, and loss weights, as NumPy arrays.

    With :math:`g_k` the gradient of a loss, :math:`w_k` its weight, and the update
    :math:`d = \sum_k w_k g_k`, as the weighting gives it to the optimizer. What is not
    known is NaN: of a loss that is absent or has no gradient, or of an update that
    cancels to nothing.

    Attributes:
      steps: (n,) number of the step of each look; of :func:`measure_conflicts`, of the
        batch.
      gramian: (n, K, K) inner products of the gradients, in the order of the losses.
      loss_weights: (n,) weights by name of the loss.
      downstream: The loss that steers the weights without one of its own, or None.

    Examples:
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> g = np.array([[3.0, 0.0], [-1.0, 1.0]])
      >>> weights = {"a": np.ones(1), "b": np.ones(1)}
      >>> seen = monitoring.Conflicts(np.arange(1), (g @ g.T)[None], weights)
      >>> print(seen.cosines["a", "b"].round(3), seen.num_conflicts)
      [-0.707] [1]
      >>> print(seen.shares["a"], seen.shares["b"])
      [1.2] [-0.2]

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020, Definitions 1 and 2, for ``cosines``.
      Wang et al., `Gradient Alignment in Physics-informed Neural Networks
      <https://arxiv.org/abs/2502.00604>`_, 2025, for ``alignment``.
    """

    steps: np.ndarray
    gramian: np.ndarray
    loss_weights: dict[str, np.ndarray]
    downstream: str | None = None

    @property
    def norms(self) -> dict[str, np.ndarray]:
        r"""(n,) Euclidean norms :math:`\|g_k\|` by name."""
        return self._by_name(self._norms)

    @property
    def cosines(self) -> dict[tuple[str, str], np.ndarray]:
        r"""(n,) cosines :math:`\langle g_i, g_j \rangle / \|g_i\| \|g_j\|` by pair.

        The names of a pair are in the order of ``loss_weights``.
        """
        names, cosines = list(self.loss_weights), self._cosines
        return {
            (a, b): cosines[:, i, j]
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        }

    @property
    def shares(self) -> dict[str, np.ndarray]:
        r"""(n,) shares of the update by name.

        That is :math:`w_k \langle g_k, d \rangle / \|d\|^2`. They add up to 1; one that
        is negative is of a loss that the others overrule.
        """
        along, squared = self._update
        with np.errstate(all="ignore"):
            shares = self._weights * along / squared[:, None]
        return self._by_name(np.where(self._present, shares, np.nan))

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        r"""(n,) lengths of the weighted gradients over their sum, by name.

        That is :math:`\|w_k g_k\| / \sum_j \|w_j g_j\|`.
        """
        lengths = np.abs(self._weights) * np.nan_to_num(self._norms)
        with np.errstate(all="ignore"):
            sizes = lengths / lengths.sum(axis=1, keepdims=True)
        return self._by_name(np.where(self._present, sizes, np.nan))

    @property
    def descents(self) -> dict[str, np.ndarray]:
        """(n,) cosines of each gradient with the update, by name.

        A small step of gradient descent increases a loss for which it is negative.
        """
        along, squared = self._update
        return self._by_name(_over(along, self._norms * np.sqrt(squared)[:, None]))

    @property
    def alignment(self) -> np.ndarray:
        r"""(n,) :math:`2 \| \frac{1}{K} \sum_k g_k / \|g_k\| \|^2 - 1`.

        It is 1 where all gradients point the same way, the cosine of two losses, and
        2 / K - 1 of K losses at right angles. Losses without a gradient are left out.
        """
        cosines = self._cosines
        count = np.isfinite(np.diagonal(cosines, axis1=1, axis2=2)).sum(axis=1)
        with np.errstate(all="ignore"):
            return 2 * np.nansum(cosines, axis=(1, 2)) / count**2 - 1

    @property
    def num_conflicts(self) -> np.ndarray:
        """(n,) how many pairs of gradients have a cosine below -1e-5.

        That is 0 but for rounding.
        """
        upper = np.triu(np.ones(self._cosines.shape[1:], bool), 1)
        return np.sum((self._cosines < -_ROUNDING) & upper, axis=(1, 2))

    @property
    def num_overruled(self) -> np.ndarray:
        """(n,) how many gradients have a cosine below -1e-5 with the update."""
        return np.sum([x < -_ROUNDING for x in self.descents.values()], axis=0)

    # Arrays (n, K), with 0 or NaN for losses that are absent.

    def _by_name(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.loss_weights, columns.T, strict=True))

    @property
    def _present(self) -> np.ndarray:
        return np.isfinite(np.diagonal(self.gramian, axis1=1, axis2=2))

    @property
    def _weights(self) -> np.ndarray:
        weights = np.stack(list(self.loss_weights.values()), axis=1).astype(np.float64)
        return np.where(self._present, weights, 0)

    @property
    def _norms(self) -> np.ndarray:
        squares = np.diagonal(self.gramian, axis1=1, axis2=2).astype(np.float64)
        return np.sqrt(np.maximum(squares, 0))  # NaN stays.

    @property
    def _cosines(self) -> np.ndarray:
        norms = self._norms
        return _over(self.gramian, norms[:, :, None] * norms[:, None, :])

    @property
    def _update(self) -> tuple[np.ndarray, np.ndarray]:
        """Inner products (n, K) with the update, and its squared norm (n,)."""
        gramian = np.nan_to_num(self.gramian.astype(np.float64))
        weights = self._weights
        along = np.einsum("nij,nj->ni", gramian, weights)
        squared = np.einsum("ni,ni->n", along, weights)
        longest = np.sum(np.abs(weights) * np.nan_to_num(self._norms), axis=1) ** 2
        known = squared > _CANCELLED * longest
        return along, np.where(known, squared, np.nan)


def conflicts(state: State, *, index: int | tuple[int, ...] | None = None) -> Conflicts:
    """Fetches the rows of :func:`watched` in one transfer.

    It waits for the step that made ``state``.

    Args:
      state: State tree with the state of one watched weighting in it.
      index: For a state with leading axes, as in :func:`history`.

    Returns:
      :class:`Conflicts`, with as many rows as there were looks at finite gradients.

    Raises:
      TypeError: The state is being traced.
      ValueError: No watched weighting in the state, or several; or leading axes and
        ``index`` do not go together.

    Warns:
      UserWarning: :func:`watched` was put inside another wrapper.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> weighting = monitoring.watched(yoto.weightings.equal(), every=1)
      >>> losses = {"a": 1.0, "b": 2.0}
      >>> gramian = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
      >>> _, state = weighting.update(losses, weighting.init(losses), gramian=gramian)
      >>> seen = monitoring.conflicts(state)
      >>> print(seen.norms["a"], seen.cosines["a", "b"], seen.alignment)
      [2.] [-0.5] [-0.5]
    """
    found = find_one(
        state,
        WatchedState,
        ("watched weighting", "watched weightings"),
        "put monitoring.watched(...) around the weighting, and give its state.",
        "watched",
    )
    steps, rows = fetch_rows(found, index)
    return _as_conflicts(
        steps, rows, names_of(found.columns), downstream_of(found.columns)
    )


def measure_conflicts(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[tuple[Any, ...]],
    *,
    loss_weights: PyTree | None = None,
    has_aux: bool = False,
    gradients: GradientSource | None = None,
) -> Conflicts:
    """Measures the conflicts of gradients on some batches, without training.

    Each batch costs a forward pass and K backward passes, (1 + 2K) / 3 plain steps.
    Nothing is trained. Ten batches or more tell a conflict from noise. Losses that
    agree before any training may conflict soon after: measure after a short run too.

    Args:
      loss_fn: ``loss_fn(params, *batch) -> losses``, as in
        :func:`yoto_jax.value_and_grad`; with ``of_representation``,
        ``loss_fn(params, z, *batch)``.
      params: Parameters at which to look.
      batches: Tuples of the arguments of ``loss_fn`` after ``params``. Each is used
        once, so that a generator will do.
      loss_weights: Weights that shares and descents refer to, a tree like the losses:
        those that you have in mind. Default: equal ones.
      has_aux: Whether ``loss_fn`` returns ``(losses, aux)``.
      gradients: Of what: :func:`yoto_jax.of_parameters` (the default) or
        :func:`yoto_jax.of_representation`.

    Returns:
      :class:`Conflicts` with a row for each batch whose gradients are finite, and
      their inner products too, in float32.

    Raises:
      TypeError: A batch is not a tuple.
      ValueError: There are no batches, or the weights do not match the losses.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> from yoto_jax import monitoring
      >>> def loss_fn(w, x):
      ...     return {"up": jnp.mean((x @ w - 1) ** 2), "down": jnp.mean((x @ w) ** 2)}
      >>> keys = jax.random.split(jax.random.key(0), 20)
      >>> batches = ((1 + jax.random.normal(key, (8, 2)),) for key in keys)
      >>> seen = monitoring.measure_conflicts(loss_fn, jnp.full(2, 0.2), batches)
      >>> print(seen.cosines["down", "up"].mean().round(1))
      -0.9
      >>> print([finding.kind for finding in monitoring.diagnose(seen)])
      ['conflict']
    """
    check_params(params)
    source = OfParameters() if gradients is None else gradients
    weighting = equal()._replace(needs=("gramian",))

    def run(params: Params, batch: tuple[Any, ...]) -> Pass:
        spread = [()] * len(jax.tree.leaves(params))
        return source.forward(
            Batch(
                loss_fn=loss_fn,
                has_aux=has_aux,
                params=params,
                args=batch,
                kwargs={},
                devices=Devices((), spread),
                weighting=weighting,
                trains=True,
            )
        )

    @jax.jit
    def look(params: Params, batch: tuple[Any, ...]) -> tuple[Losses, jax.Array]:
        seen = run(params, batch)
        gramian = seen.statistics(["gramian"])["gramian"]
        spec = LossSpec(jax.tree.structure(seen.losses), jnp.dtype(jnp.float32))
        weights = spec.vector(
            "loss_weights", 1.0 if loss_weights is None else loss_weights
        )
        return seen.losses, _row(weights, seen.present, gramian)

    rows, losses = [], None
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                "each of batches must be a tuple of the arguments of loss_fn after "
                f"params, such as (x, y) or (x,), got a {type(batch).__name__}."
            )
        losses, row = look(params, batch)
        rows.append(row)
    if losses is None:
        raise ValueError("batches is empty: there is nothing to look at.")
    columns = columns_of(weighting, losses)
    values = np.stack(jax.device_get(rows))
    finite = np.isfinite(values).all(axis=1)
    return _as_conflicts(
        np.flatnonzero(finite), values[finite], names_of((columns,)), None
    )


def check_conflicts(seen: Any) -> None:
    """Checks that this is :class:`Conflicts`."""
    if not isinstance(seen, Conflicts):
        raise TypeError(
            "conflicts must be Conflicts, what monitoring.conflicts(state) or "
            f"monitoring.measure_conflicts(...) returns, got {type(seen).__name__}."
        )


def _width(count: int) -> int:
    return 2 * count + count * (count + 1) // 2


def _row(
    weights: jax.Array, present: jax.Array | None, gramian: jax.Array
) -> jax.Array:
    """Weights, flags and half of the Gramian as float32; absent losses have zeros."""
    if present is None:
        present = jnp.ones(weights.shape, jnp.bool_)
    else:
        gramian = without_absent(gramian, present)
        weights = jnp.where(present, weights, 0)
    half = gramian[np.tril_indices(len(weights))]
    parts = [jnp.asarray(x, jnp.float32) for x in (weights, present, half)]
    return lax.stop_gradient(jnp.concatenate(parts))


def _as_conflicts(
    steps: np.ndarray, rows: np.ndarray, names: list[str], downstream: str | None
) -> Conflicts:
    count = len(names)
    rows = rows.astype(np.float64)
    weights, present, half = np.split(rows, [count, 2 * count], axis=1)
    i, j = np.tril_indices(count)
    gramian = np.empty((len(steps), count, count))
    gramian[:, i, j] = gramian[:, j, i] = half
    there = present > 0
    gramian[~(there[:, :, None] & there[:, None, :])] = np.nan
    weights = np.where(there, weights, np.nan)
    return Conflicts(
        steps, gramian, dict(zip(names, weights.T.copy(), strict=True)), downstream
    )


def _check_gramian(gramian: Any, columns: tuple[Columns, ...]) -> jax.Array:
    names = names_of(columns)
    if gramian is None:
        raise ValueError(
            "watched needs gramian=: use it in value_and_grad or aggregate, or call "
            "update(losses, state, gramian=...)."
        )
    gramian = jnp.asarray(gramian)
    if gramian.shape != (len(names), len(names)):
        raise ValueError(
            f"gramian must have shape {(len(names), len(names))} for the {len(names)} "
            f"losses {', '.join(map(repr, names))}, got {gramian.shape}."
        )
    return gramian


def _over(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Quotients in [-1, 1], NaN where the divisor is 0."""
    with np.errstate(all="ignore"):
        return np.clip(np.where(y > 0, x / y, np.nan), -1, 1)
