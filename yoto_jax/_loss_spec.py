"""Description of the losses without their values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yoto_jax._losses import PyTree, find_loss, listed, loss_names, split
from yoto_jax._numerics import where_rows


@dataclasses.dataclass(frozen=True, eq=False)
class LossSpec:
    """Describes K losses without their values: structure, dtype, presence.

    :func:`make_weighting` passes it to a method. Its reductions over losses leave out
    those that are absent. A loss has a *position*, that of its leaf
    in ``jax.tree.leaves(losses)``, and so have its entries of vectors (K,).

    Attributes:
      structure: That of the losses, and of the weights.
      dtype: That of the arithmetic: float32, or float64 if a loss comes in that.
      present: bool (K,), which losses are there, or None if all are.

    Examples:
      >>> import jax, jax.numpy as jnp, yoto_jax as yoto
      >>> structure = jax.tree.structure({"depth": 0.0, "flow": 0.0, "pose": 0.0})
      >>> spec = yoto.LossSpec(structure, jnp.float32, jnp.array([True, False, True]))
      >>> print(spec.size, spec.names, spec.position("primary", "flow"))
      3 ('depth', 'flow', 'pose') 1
      >>> print(spec.mean(jnp.array([1.0, 50.0, 3.0])), spec.equal())
      2.0 [0.5 0.  0.5]
    """

    structure: jax.tree_util.PyTreeDef
    dtype: Any
    present: jax.Array | None = None

    @property
    def size(self) -> int:
        """The number of losses, K."""
        return self.structure.num_leaves

    @property
    def count(self) -> Any:
        """The number of losses that are present, at least 1."""
        if self.present is None:
            return self.size
        return jnp.maximum(jnp.sum(self.present, dtype=self.dtype), 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every loss, in the order of the leaves."""
        return loss_names(self.structure)

    @property
    def presence(self) -> PyTree | None:
        """The tree of booleans that ``present`` came from."""
        return None if self.present is None else split(self.present, self.structure)

    def of_present(self, x: jax.Array, other: Any = 0) -> jax.Array:
        """``x``, one entry or row per loss, with ``other`` for absent losses."""
        return x if self.present is None else where_rows(self.present, x, other)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the losses."""
        return jnp.sum(self.of_present(x))

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean over the losses."""
        return jnp.mean(x) if self.present is None else self.sum(x) / self.count

    def log_softmax(self, x: jax.Array) -> jax.Array:
        """Logarithm of the softmax over the losses."""
        if self.present is None:
            return jax.nn.log_softmax(x)
        # Without any loss, that of zeros instead of NaN.
        some = jnp.any(self.present)
        return jax.nn.log_softmax(jnp.where(some, self.of_present(x, -jnp.inf), 0))

    def softmax(self, x: jax.Array) -> jax.Array:
        """The softmax over the losses, 0 for absent ones."""
        if self.present is None:
            return jax.nn.softmax(x)
        return self.of_present(jnp.exp(self.log_softmax(x)))

    def position(self, role: str, chosen: Any) -> int:
        """Position of the loss that ``chosen`` names; ``role`` is for the messages."""
        tree = self.structure.unflatten(range(self.size))
        return find_loss(role, chosen, tree)

    def apart(self, downstream: Any) -> tuple[int, np.ndarray]:
        """Position of the loss that steers, and those of the others."""
        position = self.position("downstream", downstream)
        return position, np.delete(np.arange(self.size), position)

    def check_others(self, method: str) -> None:
        """Raise unless there is a loss besides the downstream one."""
        if self.size < 2:
            raise ValueError(
                f"{method} needs a loss to weigh besides the downstream one, got "
                f"{listed(self.names)} alone."
            )

    def full(self, value: Any) -> jax.Array:
        """A vector with one entry per loss."""
        return jnp.full((self.size,), value, self.dtype)

    def equal(self) -> jax.Array:
        """The same share for every loss, 1/K if all are present."""
        return self.of_present(self.full(1.0 / self.count))

    def vector(self, what: str, values: Any) -> jax.Array:
        """One number, a sequence, or a tree like the losses, as a (K,) vector."""
        if self.holds_scalars(values):
            values = jnp.stack([jnp.asarray(v) for v in jax.tree.leaves(values)])
        elif isinstance(values, list | tuple):
            values = jnp.stack([jnp.asarray(v) for v in values])
        elif isinstance(values, dict):
            raise ValueError(
                f"{what} must be one number, or one for each loss "
                f"({listed(self.names)}), got {values!r}."
            )
        values = jnp.asarray(values, self.dtype)
        if values.shape not in ((), (self.size,)):
            raise ValueError(
                f"{what} must be one number, or one for each loss "
                f"({listed(self.names)}), got shape {values.shape}."
            )
        return jnp.broadcast_to(values, (self.size,))

    def holds_scalars(self, values: Any) -> bool:
        """Whether this is a tree like the losses, with a scalar for each."""
        alike = jax.tree.structure(values) == self.structure
        return alike and not any(jnp.ndim(v) for v in jax.tree.leaves(values))

    def preference(self, preference: PyTree) -> jax.Array:
        """What the user prefers, as a vector: equal shares unless told."""
        if preference is None:
            return self.equal()
        return self.of_present(self.vector("preference", preference))

    def ratios(self, preference: PyTree) -> jax.Array:
        """What the user prefers, with mean 1: exactly 1 for all if it is equal."""
        if preference is None:
            return self.full(1.0)
        p = self.preference(preference)
        largest = jnp.max(p)
        p = p / jnp.where(largest > 0, largest, 1)
        mean = self.mean(p)
        return self.of_present(p / jnp.where(mean > 0, mean, 1), 1)


def stateless(preference: PyTree) -> Callable[[LossSpec], tuple[()]]:
    """An ``init`` without a state, which raises unless the preference fits."""

    def init(spec: LossSpec) -> tuple[()]:
        spec.ratios(preference)
        return ()

    return init
