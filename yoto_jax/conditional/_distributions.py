"""Distributions over loss weights that a conditional model is trained on."""

import math
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._checks import as_key, check_integers
from yoto_jax._losses import PyTree, Weights, loss_names, split
from yoto_jax._serialization import register_node
from yoto_jax.conditional import _points
from yoto_jax.conditional._ranges import (
    SLACK,
    TINY,
    as_float32,
    bounds_of,
    check_grid,
    check_weights,
    clip,
    say_outside,
    say_range,
)

Method = Literal["random", "stratified", "sobol"]


class Distribution:
    """Base class of the distributions over loss weights.

    A distribution is a pytree: pass it into ``jit``, store it in a checkpoint.

    A subclass sets the attributes and writes ``positions``, ``outside``, ``_draw``
    (weights of some draws), ``_lattice`` (those of a grid), ``_shown`` (two bounds for
    ``repr``), and ``tree_flatten_with_keys`` and ``tree_unflatten``, with which
    ``register_node`` makes it a pytree. Of :class:`Box`, which has independent ranges,
    ``_scale`` and ``_unscale`` are enough.

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
        """Draws loss weights for the ``n`` examples of a batch.

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
        """Returns evenly spaced loss weights, for a sweep.

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
        """Turns weights ``(..., K)`` into a tree like the losses."""
        if jnp.shape(vectors)[-1:] != (self.structure.num_leaves,):
            raise ValueError(
                f"vectors must have a last axis of {self.structure.num_leaves}, one "
                f"entry for each loss, got shape {jnp.shape(vectors)}."
            )
        return split(vectors, self.structure)

    def vectors(self, weights: Weights) -> jax.Array:
        """Stacks a tree of weights to ``(..., K)``: the inverse of :meth:`tree`."""
        check_weights(weights, self.structure)
        leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(weights)]
        return jnp.stack(leaves, axis=-1)

    def positions(self, vectors: jax.Array) -> jax.Array:
        """Positions of weights ``(..., K)`` in their ranges, clipped to [0, 1]."""
        raise NotImplementedError

    def outside(self, vectors: np.ndarray, slack: float = SLACK) -> str:
        """Message about weights outside the support, empty if all are inside."""
        raise NotImplementedError

    def __repr__(self) -> str:
        low, high = self._shown()
        ranges = ", ".join(
            f"{name or 'loss'}={say_range(low, high, k)}"
            for k, name in enumerate(self.names)
        )
        return f"{type(self).__name__}({ranges})"

    def _shown(self) -> tuple[jax.Array, jax.Array]:
        """Numbers in the repr of each weight: both ends of its range."""
        raise NotImplementedError

    def _draw(self, key: jax.Array, draws: int, method: str) -> jax.Array:
        raise NotImplementedError

    def _lattice(self, n: int) -> jax.Array:
        raise NotImplementedError


class Box(Distribution):
    """Independent loss weights, each uniform on some scale between two bounds."""

    low: jax.Array  # [K]
    high: jax.Array  # [K]

    def __init__(self, low: PyTree, high: PyTree):
        self.structure, lows, highs = bounds_of(low, high)
        free = []
        for name, a, b in zip(self.names, lows, highs, strict=True):
            known = not (
                isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
            )
            if known:
                a, b = as_float32(a), as_float32(b)
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

    def _shown(self) -> tuple[jax.Array, jax.Array]:
        return self.low, self.high

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
        """Weights ``(..., K)`` at positions in [0, 1]: inverse of :meth:`positions`."""
        low, high = (jnp.broadcast_to(x, positions.shape) for x in self.bounds())
        start, end = self._scale(low), self._scale(high)
        inside = self._unscale(start + positions * (end - start))
        # Rounding on that scale must not lead out of the range, nor move its ends.
        inside = jnp.where(positions <= 0, low, jnp.where(positions >= 1, high, inside))
        return jnp.clip(inside, low, high)

    def nearest(self, vectors: jax.Array) -> jax.Array:
        """Clips weights ``(..., K)`` to their ranges."""
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

    def outside(self, vectors: np.ndarray, slack: float = SLACK) -> str:
        low, high = (np.asarray(x, np.float64) for x in self.bounds())
        found = vectors.reshape(-1, len(low))
        inside = (found >= low * (1 - slack)) & (found <= high * (1 + slack))
        if inside.all():
            return ""
        row, k = np.argwhere(~inside)[0]
        return say_outside(found[row, k], self.names[k], low[k], high[k])

    def _draw(self, key: jax.Array, draws: int, method: str) -> jax.Array:
        return self.at(self._spread(_points.draw(key, draws, sum(self.free), method)))

    def _lattice(self, n: int) -> jax.Array:
        varying = sum(self.free)
        check_grid(n**varying, "sobol")
        digits = n ** np.arange(varying)[::-1]
        steps = np.arange(n**varying)[:, None] // digits[None] % n
        return self.at(self._spread(jnp.asarray(steps / (n - 1), jnp.float32)))

    def _spread(self, points: jax.Array) -> jax.Array:
        """Positions ``(..., K)``, 0 for pinned weights, from those of the free ones."""
        columns = iter(range(points.shape[-1]))
        fixed = jnp.zeros(points.shape[:-1], points.dtype)
        entries = [points[..., next(columns)] if f else fixed for f in self.free]
        return jnp.stack(entries, axis=-1)


@jax.tree_util.register_pytree_with_keys_class
class LogUniform(Box):
    r"""Log-uniform distribution over independent loss weights.

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
        if not TINY <= low <= high < math.inf:
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
    r"""Uniform distribution over independent loss weights.

    .. math::
      \lambda_i \sim U(\mathrm{low}_i, \mathrm{high}_i)

    It also serves parameters of a loss that are not weights, such as a quantile level.

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
    """Constant loss weights, for an ordinary model trained by the same code.

    The encoding of its weights is empty, and layers conditioned on an empty encoding
    are the identity: this is the fixed-weight baseline.

    Args:
      weights: A tree like the losses, of the weights (not negative, no unit).

    Raises:
      ValueError: A weight is negative or not finite.

    Examples:
      >>> from yoto_jax import conditional
      >>> conditional.Fixed({"reconstruction": 1.0, "kl": 4.0})
      Fixed(kl=4, reconstruction=1)
    """

    def __init__(self, weights: Weights):
        super().__init__(weights, weights)
        self.free = (False,) * len(self.free)  # Whatever a tracer may hold.

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        return self.low, self.low


for _kind in (LogUniform, Uniform, Fixed):
    register_node(_kind, _kind.tree_unflatten)
