"""Distributions over loss weights: what a conditional model is trained for."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import as_key, check_integers
from yoto_jax._losses import PyTree, check_structure, loss_names
from yoto_jax._serialization import register_node
from yoto_jax.conditional import _points

Method = Literal["random", "stratified", "sobol"]
AnyBox = TypeVar("AnyBox", bound="Box")

_LARGEST_GRID = 10**7
_SLACK = 1e-4  # relative, for what rounding does to a weight at the edge of its range
_TINY = float(np.finfo(np.float32).tiny)  # smaller numbers count as 0


class Distribution:
    """What all distributions over loss weights have in common.

    A distribution is a pytree: pass it into ``jit``, store it in a checkpoint.

    Attributes:
      structure: Tree structure of the losses (static).
      free: For each loss, whether its weight varies (static).
    """

    structure: jax.tree_util.PyTreeDef
    free: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every loss, such as ``"heads/depth"``, in the order of the leaves."""
        return loss_names(self.structure)

    def sample(
        self,
        key: jax.Array | int,
        n: int,
        *,
        groups: int | None = None,
        method: Method = "random",
    ) -> PyTree:
        """Loss weights for the ``n`` examples of a batch.

        Weights of different losses are independent of each other (but for those of a
        :class:`Dirichlet`, which have a sum).

        Args:
          key: A random key, or an integer seed.
          n: Number of examples.
          groups: How many draws: one per example if ``None``; ``1`` is one for the
            whole batch; ``G`` gives each ``n / G`` consecutive examples their own.
          method: ``"random"``; ``"stratified"``, a Latin hypercube: of each weight,
            one draw in each of as many equally likely intervals as there are draws; or
            ``"sobol"``, a randomly shifted Sobol sequence, even in all weights together
            (best with a power of two of draws, up to 16 free weights). Each draw has
            the same distribution with all three; the last two spread a batch evenly.

        Returns:
          A tree like the losses, of float32 arrays ``(n,)``.

        Raises:
          TypeError: ``key`` is neither a key nor a seed, or a number is no integer.
          ValueError: ``n`` is not positive, ``groups`` does not divide it, or there is
            no such method for this distribution.
        """
        draws = n if groups is None else groups
        check_integers(n=n, groups=draws)
        if n < 1 or draws < 1 or n % draws:
            raise ValueError(
                "n and groups must be positive, and groups must divide n; got "
                f"n = {n}, groups = {groups}."
            )
        weights = jnp.repeat(self._draw(as_key(key), draws, method), n // draws, axis=0)
        return self.tree(weights)

    def grid(self, n: int) -> PyTree:
        """Evenly spaced loss weights, to sweep over.

        Args:
          n: How many values of each free weight, from its lowest to its highest. The
            grid has all their combinations; the last free weight varies fastest. Of a
            :class:`Dirichlet`, all weights that are multiples of ``1 / (n - 1)``.

        Returns:
          A tree like the losses, of float32 arrays.

        Raises:
          TypeError: ``n`` is no integer.
          ValueError: ``n`` is less than 2, or the grid would have more than ten million
            entries.
        """
        check_integers(n=n)
        if n < 2:
            raise ValueError(f"a grid needs at least 2 values per weight, got {n}.")
        return self.tree(self._lattice(n))

    def tree(self, vectors: jax.Array) -> PyTree:
        """Weights ``(..., K)`` as a tree like the losses."""
        if jnp.shape(vectors)[-1:] != (self.structure.num_leaves,):
            raise ValueError(
                f"vectors must have a last axis of {self.structure.num_leaves}, one "
                f"entry for each loss, got shape {jnp.shape(vectors)}."
            )
        return self.structure.unflatten(
            vectors[..., k] for k in range(self.structure.num_leaves)
        )

    def vectors(self, weights: PyTree) -> jax.Array:
        """The inverse of :meth:`tree`, with a check of structure and shapes."""
        check_weights(weights, self.structure)
        leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(weights)]
        return jnp.stack(leaves, axis=-1)

    def positions(self, vectors: jax.Array) -> jax.Array:
        """Where weights ``(..., K)``, or the nearest inside, are: from 0 to 1."""
        raise NotImplementedError

    def outside(self, vectors: np.ndarray, slack: float = _SLACK) -> str:
        """What is wrong with weights that lie outside, or nothing."""
        raise NotImplementedError

    def _draw(self, key: jax.Array, draws: int, method: str) -> jax.Array:
        raise NotImplementedError

    def _lattice(self, n: int) -> jax.Array:
        raise NotImplementedError


class Box(Distribution):
    """Independent weights, each evenly distributed on some scale between two bounds."""

    low: jax.Array  # [K]
    high: jax.Array  # [K]

    def __init__(self, low: PyTree, high: PyTree):
        self.structure, lows, highs = _bounds(low, high)
        free = []
        for name, a, b in zip(self.names, lows, highs, strict=True):
            known = not (_traced(a) or _traced(b))
            if known:
                a, b = _float32(a), _float32(b)
                self._check_range(name, a, b)
            free.append(not known or a != b)
        self.free = tuple(free)
        self.low, self.high = (
            jnp.stack([jnp.asarray(x, jnp.float32) for x in bounds])
            for bounds in (lows, highs)
        )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        key = jax.tree_util.GetAttrKey
        children = ((key("low"), self.low), (key("high"), self.high))
        return children, (self.structure, self.free)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        box = object.__new__(cls)
        box.structure, box.free = static
        box.low, box.high = children
        return box

    def __repr__(self) -> str:
        ranges = ", ".join(
            f"{name or 'loss'}={_range(self.low, self.high, k)}"
            for k, name in enumerate(self.names)
        )
        return f"{type(self).__name__}({ranges})"

    @staticmethod
    def _check_range(name: str, low: float, high: float) -> None:
        if not 0 <= low <= high < math.inf:
            raise ValueError(
                f"the weight of loss {name!r} needs 0 <= low <= high, both finite in "
                f"float32; got low = {low:g}, high = {high:g}."
            )

    # The scale on which the weights are evenly distributed.

    @staticmethod
    def _scale(x: jax.Array) -> jax.Array:
        return x

    @staticmethod
    def _unscale(x: jax.Array) -> jax.Array:
        return x

    def at(self, positions: jax.Array) -> jax.Array:
        """Weights ``(..., K)`` at these positions; the inverse of :meth:`positions`."""
        low, high = (jnp.broadcast_to(x, positions.shape) for x in self.bounds())
        start, end = self._scale(low), self._scale(high)
        inside = self._unscale(start + positions * (end - start))
        # Rounding on that scale must not lead out of the range, nor move its ends.
        inside = jnp.where(positions <= 0, low, jnp.where(positions >= 1, high, inside))
        return jnp.clip(inside, low, high)

    def nearest(self, vectors: jax.Array) -> jax.Array:
        """The nearest weights inside their ranges."""
        low, high = (jnp.broadcast_to(x, vectors.shape) for x in self.bounds())
        return clip(vectors, low, high)

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        return self.low, self.high

    def positions(self, vectors: jax.Array) -> jax.Array:
        low, high = (jnp.broadcast_to(x, vectors.shape) for x in self.bounds())
        start, end = self._scale(low), self._scale(high)
        wide = end > start
        above = self._scale(self.nearest(vectors)) - start
        return jnp.where(wide, above / jnp.where(wide, end - start, 1), 0.0)

    def outside(self, vectors: np.ndarray, slack: float = _SLACK) -> str:
        low, high = (np.asarray(x, np.float64) for x in self.bounds())
        found = vectors.reshape(-1, len(low))
        inside = (found >= low * (1 - slack)) & (found <= high * (1 + slack))
        if inside.all():
            return ""
        row, k = np.argwhere(~inside)[0]
        return _outside(found[row, k], self.names[k], low[k], high[k])

    def _draw(self, key: jax.Array, draws: int, method: str) -> jax.Array:
        return self.at(self._spread(_points.draw(key, draws, sum(self.free), method)))

    def _lattice(self, n: int) -> jax.Array:
        varying = sum(self.free)
        _check_grid(n**varying, "sobol")
        digits = n ** np.arange(varying)[::-1]
        steps = np.arange(n**varying)[:, None] // digits[None] % n
        return self.at(self._spread(jnp.asarray(steps / (n - 1), jnp.float32)))

    def _spread(self, points: jax.Array) -> jax.Array:
        """Positions ``(..., K)``, from those of the weights that vary."""
        columns = iter(range(points.shape[-1]))
        fixed = jnp.zeros(points.shape[:-1], points.dtype)
        entries = [points[..., next(columns)] if f else fixed for f in self.free]
        return jnp.stack(entries, axis=-1)


@jax.tree_util.register_pytree_with_keys_class
class LogUniform(Box):
    r"""Loss weights whose logarithms are uniform, independently of each other.

    .. math::
      \log \lambda_i \sim U(\log \mathrm{low}_i, \log \mathrm{high}_i)

    The usual choice for weights that range over orders of magnitude. Equal bounds pin a
    weight: it is that number exactly, and has no place in the encoding.

    Args:
      low: A tree like the losses, of the lowest weights (positive, no unit), or one
        number for all.
      high: Likewise, of the highest. One of the two has to be a tree.

    Attributes:
      low: The lowest weights, float32 of shape ``(K,)`` in the order of
        ``jax.tree.leaves``.
      high: The highest.

    Raises:
      ValueError: A bound is not positive and finite, ``low > high``, or the two trees
        differ.

    Examples:
      >>> import jax
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform(
      ...     low={"reconstruction": 1.0, "kl": 0.125},
      ...     high={"reconstruction": 1.0, "kl": 512.0},
      ... )
      >>> support
      LogUniform(kl=0.125..512, reconstruction=1)
      >>> weights = support.sample(jax.random.key(0), 4)
      >>> print(weights["kl"].shape, weights["reconstruction"])
      (4,) [1. 1. 1. 1.]
      >>> print(support.grid(5)["kl"])
      [1.25e-01 1.00e+00 8.00e+00 6.40e+01 5.12e+02]

    References:
      Dosovitskiy and Djolonga, `You Only Train Once: Loss-Conditional Training of Deep
      Networks <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.

    .. warning::
      The reference implementation draws the weights of all losses with one seed, so
      that they are the same quantile of their ranges. Here they are independent.
    """

    @staticmethod
    def _check_range(name: str, low: float, high: float) -> None:
        if not _TINY <= low <= high < math.inf:
            raise ValueError(
                f"the weight of loss {name!r} needs 0 < low <= high, both finite in "
                f"float32; got low = {low:g}, high = {high:g}."
            )

    @staticmethod
    def _scale(x: jax.Array) -> jax.Array:
        return jnp.log(x)

    @staticmethod
    def _unscale(x: jax.Array) -> jax.Array:
        return jnp.exp(x)


@jax.tree_util.register_pytree_with_keys_class
class Uniform(Box):
    r"""Loss weights that are uniform, independently of each other.

    .. math::
      \lambda_i \sim U(\mathrm{low}_i, \mathrm{high}_i)

    Also for parameters of a loss that are not weights, such as the level of a quantile.

    Args:
      low: A tree like the losses, of the lowest weights (not negative, no unit), or one
        number for all. Equal bounds pin a weight.
      high: Likewise, of the highest. One of the two has to be a tree.

    Raises:
      ValueError: A bound is negative or not finite, ``low > high``, or the two trees
        differ.

    Examples:
      >>> from yoto_jax import conditional
      >>> levels = conditional.Uniform({"quantile": 0.05}, {"quantile": 0.95})
      >>> levels.grid(3)["quantile"]
      Array([0.05, 0.5 , 0.95], dtype=float32)

    References:
      Dosovitskiy and Djolonga, `You Only Train Once: Loss-Conditional Training of Deep
      Networks <https://openreview.net/forum?id=HyxY6JHKwr>`_, 2020.
    """


@jax.tree_util.register_pytree_with_keys_class
class Fixed(Box):
    """Constant loss weights: an ordinary model, trained by the same code.

    The encoding of its weights is empty, and layers that are conditioned on an empty
    encoding do nothing: this is the fixed-weight model to compare with.

    Args:
      weights: A tree like the losses, of the weights (not negative, no unit).

    Raises:
      ValueError: A weight is negative or not finite.

    Examples:
      >>> from yoto_jax import conditional
      >>> conditional.Fixed({"reconstruction": 1.0, "kl": 4.0})
      Fixed(kl=4, reconstruction=1)
    """

    def __init__(self, weights: PyTree):
        super().__init__(weights, weights)
        self.free = (False,) * len(self.free)  # Whatever a tracer may hold.

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        return self.low, self.low


@jax.tree_util.register_pytree_with_keys_class
class Dirichlet(Distribution):
    r"""Loss weights that sum to 1.

    .. math::
      \lambda \sim \mathrm{Dir}(\alpha), \quad \lambda_i \ge 0, \quad
      \sum_i \lambda_i = 1

    Args:
      concentration: A tree like the losses, of the :math:`\alpha_i` (positive). All 1
        is uniform; larger ones draw balanced weights, smaller ones the corners.

    Raises:
      ValueError: Fewer than two losses, or a concentration that is not positive and
        finite.

    Examples:
      >>> from yoto_jax import conditional
      >>> preferences = conditional.Dirichlet({"left": 1.2, "right": 1.2})
      >>> print(preferences.grid(3)["left"])
      [0.  0.5 1. ]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective
      Learning <https://arxiv.org/abs/2103.13392>`_, 2021.
    """

    concentration: jax.Array

    def __init__(self, concentration: PyTree):
        self.structure = jax.tree.structure(concentration)
        leaves = jax.tree.leaves(concentration)
        if len(leaves) < 2:
            raise ValueError("weights that sum to 1 need at least two losses.")
        _check_scalars("concentration", self.names, leaves)
        for name, alpha in zip(self.names, leaves, strict=True):
            if not _traced(alpha) and not 0 < float(alpha) < math.inf:
                raise ValueError(
                    f"the concentration of loss {name!r} must be positive and finite, "
                    f"got {float(alpha):g}."
                )
        self.free = (True,) * len(leaves)
        self.concentration = jnp.stack([jnp.asarray(x, jnp.float32) for x in leaves])

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        key = jax.tree_util.GetAttrKey("concentration")
        return ((key, self.concentration),), (self.structure, self.free)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        made = object.__new__(cls)
        made.structure, made.free = static
        (made.concentration,) = children
        return made

    def __repr__(self) -> str:
        entries = ", ".join(
            f"{name or 'loss'}={_range(self.concentration, self.concentration, k)}"
            for k, name in enumerate(self.names)
        )
        return f"Dirichlet({entries})"

    def positions(self, vectors: jax.Array) -> jax.Array:
        return clip(vectors, jnp.zeros_like(vectors), jnp.ones_like(vectors))

    def outside(self, vectors: np.ndarray, slack: float = _SLACK) -> str:
        rows = vectors.reshape(-1, len(self.free))
        inside = (rows >= -slack) & (rows <= 1 + slack)
        if not inside.all():
            row, k = np.argwhere(~inside)[0]
            return _outside(rows[row, k], self.names[k], 0, 1)
        sums = rows.sum(axis=-1)
        if not (abs(sums - 1) <= slack * len(self.free)).all():
            worst = sums[np.argmax(abs(sums - 1))]
            return f"the weights of an example must sum to 1, not to {worst:g}"
        return ""

    def _draw(self, key: jax.Array, draws: int, method: str) -> jax.Array:
        if method != "random":
            raise ValueError(
                f"a Dirichlet distribution is drawn by method 'random', got {method!r}."
            )
        return jax.random.dirichlet(key, self.concentration, (draws,), jnp.float32)

    def _lattice(self, n: int) -> jax.Array:
        # n - 1 stars between K - 1 bars: how many are left of each bar, and at the end.
        places = n + len(self.free) - 2
        _check_grid(math.comb(places, len(self.free) - 1), "random")
        bars = itertools.combinations(range(places), len(self.free) - 1)
        stars = np.diff([(-1, *b, places) for b in bars], axis=-1) - 1
        return jnp.asarray(stars / (n - 1), jnp.float32)


for _kind in (LogUniform, Uniform, Fixed, Dirichlet):
    register_node(_kind, _kind.tree_unflatten)


def narrow(
    distribution: AnyBox,
    center: PyTree,
    factor: float | jax.Array,
    support: Box | None = None,
) -> AnyBox:
    r"""The distribution with narrower ranges, around some weights.

    On the scale on which a weight is evenly distributed (that of logarithms for
    :class:`LogUniform`), its range becomes ``factor`` times as wide, centred as near to
    ``center`` as possible inside the support. So a conditional model can spend more and
    more of its training on what validates best. Works under ``jit``: bounds are data.

    Args:
      distribution: What to narrow.
      center: A tree of scalars like the losses.
      factor: Between 0 and 1.
      support: What not to leave: usually the distribution that training began with,
        and that weights are encoded by. Default: ``distribution``.

    Returns:
      A distribution of the same type. A free weight stays free, however narrow.

    Raises:
      TypeError: The distribution has no ranges (:class:`Dirichlet`).
      ValueError: The trees do not match, ``center`` is not made of finite scalars, or
        ``factor`` is not between 0 and 1. Under ``jit``, where values are not known, a
        ``center`` of NaN makes bounds of NaN.

    Examples:
      >>> from yoto_jax import conditional
      >>> support = conditional.LogUniform({"kl": 0.01}, {"kl": 100.0})
      >>> narrower = conditional.narrow(support, {"kl": 1.0}, 0.5)
      >>> narrower
      LogUniform(kl=0.1..10)
      >>> conditional.narrow(narrower, {"kl": 100.0}, 0.5, support)
      LogUniform(kl=10..100)
    """
    support = distribution if support is None else support
    for given in (distribution, support):
        if not isinstance(given, Box):
            raise TypeError(
                "only LogUniform and Uniform have ranges that can be narrowed, got "
                f"{type(given).__name__}."
            )
    if not isinstance(factor, jax.core.Tracer) and not 0 <= float(factor) <= 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor}.")
    check_structure(
        distribution.structure, support.structure, "the support", "the losses"
    )
    center = support.vectors(center)
    if center.ndim > 1:
        raise ValueError(f"center must be a tree of scalars, got {center.shape[:-1]}.")
    if not _traced(center) and not np.isfinite(center).all():
        raise ValueError(f"center must be finite, got {support.tree(center)}.")
    middle = support.positions(center)
    width = support.positions(distribution.high) - support.positions(distribution.low)
    width = jnp.asarray(factor, jnp.float32) * width
    start = jnp.clip(middle - width / 2, 0, 1 - width)
    (low, high), static = jax.tree.flatten(distribution)
    free = np.array(distribution.free)  # What is pinned stays, whatever the support.
    low = jnp.where(free, support.at(start), low)
    return static.unflatten([low, jnp.where(free, support.at(start + width), high)])


# Checks.


def _check_grid(size: int, method: str) -> None:
    if size > _LARGEST_GRID:
        raise ValueError(
            f"this grid has {size} weightings, more than {_LARGEST_GRID}: use sample "
            f"instead, by method {method!r}."
        )


def check_weights(weights: PyTree, structure: jax.tree_util.PyTreeDef) -> None:
    """Raise unless weights are a tree of this structure and of one shape."""
    check_structure(
        jax.tree.structure(weights), structure, "this distribution", "weights"
    )
    shapes = {jnp.shape(x) for x in jax.tree.leaves(weights)}
    if len(shapes) > 1:
        raise ValueError(f"weights must all have one shape, got {sorted(shapes)}.")


def _bounds(
    low: PyTree, high: PyTree
) -> tuple[jax.tree_util.PyTreeDef, list[Any], list[Any]]:
    """Structure and leaves of two trees, of which one may be a number for all."""
    alone = jax.tree.structure(0)
    structures = [jax.tree.structure(tree) for tree in (low, high)]
    structure = next((s for s in structures if s != alone), alone)
    lows, highs = [], []
    for bound, tree, leaves in (("low", low, lows), ("high", high, highs)):
        if jax.tree.structure(tree) == alone:
            tree = structure.unflatten([tree] * structure.num_leaves)
        check_structure(
            jax.tree.structure(tree), structure, "the low ones", f"the {bound} bounds"
        )
        leaves += jax.tree.leaves(tree)
    if not lows:
        raise ValueError("there are no losses to weigh.")
    _check_scalars("bound", loss_names(structure) * 2, lows + highs)
    return structure, lows, highs


def _check_scalars(what: str, names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, x in zip(names, leaves, strict=True):
        if isinstance(x, str):
            raise TypeError(f"the {what} of loss {name!r} must be a number, got {x!r}.")
        if jnp.shape(x):
            raise ValueError(
                f"the {what} of loss {name!r} must be a scalar, got shape "
                f"{jnp.shape(x)}."
            )


def _outside(weight: float, name: str, low: float, high: float) -> str:
    return (
        f"the weight {weight:g} of loss {name!r} is outside its range, {low:g} to "
        f"{high:g}"
    )


# Small arithmetic.


def clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """``x`` within bounds, with all of its gradient at them, unlike ``jnp.clip``."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _float32(x: Any) -> float:
    """What is left of a known number in float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _range(low: Any, high: Any, k: int) -> str:
    try:
        a, b = float(low[k]), float(high[k])
    except Exception:  # Tracers, or whatever a transformation puts in place of arrays.
        return "?"
    return f"{a:.6g}" if a == b else f"{a:.6g}..{b:.6g}"
