"""Inner products between the gradients of two batches."""

import jax
import jax.numpy as jnp

from yoto_jax._losses import PyTree, check_structure, path_name
from yoto_jax.gradients._devices import spread_of
from yoto_jax.gradients._statistics import cross_products


def cross_gramian(
    jacobian: PyTree, other: PyTree, *, param_specs: PyTree | None = None
) -> jax.Array:
    r"""Inner products of per-loss gradients of two independent batches.

    .. math::
      C = J_1 J_2^\top.

    Its mean is the Gramian of the mean gradients, which the Gramian of one batch
    exceeds by the noise. It is neither symmetric nor positive semi-definite.

    Args:
      jacobian: Gradients stacked on a leading axis of length K, as
        :func:`value_and_jacobian` makes them.
      other: Those of the other batch.
      param_specs: ``PartitionSpec`` of the parameters where ``shard_map`` spreads them
        over devices, see :func:`yoto_jax.value_and_grad`.

    Returns:
      (K, K), in float32 at least, the losses of the first batch by row.

    Raises:
      ValueError: There are no gradients, or those of the two batches are not alike.

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> first = {"w": jnp.array([[1.0, 2.0], [0.0, 1.0]])}
      >>> second = {"w": jnp.array([[3.0, 0.0], [1.0, 1.0]])}
      >>> print(yoto.cross_gramian(first, second))
      [[3. 3.]
       [0. 1.]]
    """
    _check_alike(jacobian, other)
    return cross_products(jacobian, other, spread_of(jacobian, param_specs))


def _check_alike(jacobian: PyTree, other: PyTree) -> None:
    """Raise unless both have rows for the same losses in arrays of the same shapes."""
    flat, structure = jax.tree.flatten_with_path(jacobian)
    given = jax.tree.structure(other)
    check_structure(given, structure, "the first batch", "gradients of the other batch")
    if not flat:
        raise ValueError("jacobian has no leaves: there are no gradients.")
    count = jnp.shape(flat[0][1])[:1]
    for (path, x), y in zip(flat, jax.tree.leaves(other), strict=True):
        shapes = jnp.shape(x), jnp.shape(y)
        if shapes[0] != shapes[1] or not count or shapes[0][:1] != count:
            raise ValueError(
                f"gradients {path_name(path)!r} must have one shape in both batches, "
                "with a leading axis as long as the number of losses, got "
                f"{shapes[0]} and {shapes[1]}."
            )
