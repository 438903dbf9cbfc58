"""Inner products between the gradients of two batches."""

import jax

from yoto_jax._losses import PyTree
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

    Examples:
      >>> import jax.numpy as jnp, yoto_jax as yoto
      >>> first = {"w": jnp.array([[1.0, 2.0], [0.0, 1.0]])}
      >>> second = {"w": jnp.array([[3.0, 0.0], [1.0, 1.0]])}
      >>> print(yoto.cross_gramian(first, second))
      [[3. 3.]
       [0. 1.]]
    """
    return cross_products(jacobian, other, spread_of(jacobian, param_specs))
