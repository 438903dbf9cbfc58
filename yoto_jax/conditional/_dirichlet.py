"""Dirichlet distribution over loss weights."""

import itertools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import PyTree
from yoto_jax._serialization import register_node
from yoto_jax.conditional._distributions import Distribution
from yoto_jax.conditional._ranges import (
    SLACK,
    check_grid,
    check_scalars,
    clip,
    say_outside,
)


@jax.tree_util.register_pytree_with_keys_class
class Dirichlet(Distribution):
    r"""Dirichlet distribution over loss weights, which sum to 1.

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
        check_scalars("concentration", self.names, leaves)
        for name, alpha in zip(self.names, leaves, strict=True):
            if (
                not isinstance(alpha, jax.core.Tracer)
                and not 0 < float(alpha) < math.inf
            ):
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

    def _shown(self) -> tuple[jax.Array, jax.Array]:
        return self.concentration, self.concentration

    def positions(self, vectors: jax.Array) -> jax.Array:
        return clip(vectors, jnp.zeros_like(vectors), jnp.ones_like(vectors))

    def outside(self, vectors: np.ndarray, slack: float = SLACK) -> str:
        rows = vectors.reshape(-1, len(self.free))
        inside = (rows >= -slack) & (rows <= 1 + slack)
        if not inside.all():
            row, k = np.argwhere(~inside)[0]
            return say_outside(rows[row, k], self.names[k], 0, 1)
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
        # Stars and bars: every way to split n - 1 stars by K - 1 bars is a weighting.
        places = n + len(self.free) - 2
        check_grid(math.comb(places, len(self.free) - 1), "random")
        bars = itertools.combinations(range(places), len(self.free) - 1)
        stars = np.diff([(-1, *b, places) for b in bars], axis=-1) - 1
        return jnp.asarray(stars / (n - 1), jnp.float32)


register_node(Dirichlet, Dirichlet.tree_unflatten)
