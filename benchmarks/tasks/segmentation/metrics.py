"""Mean IoU."""

import jax
import jax.numpy as jnp


def confusion(
    labels_hat: jax.Array, labels: jax.Array, classes: int, void: int | None
) -> jax.Array:
    """Pixels of each true class (row) predicted as each class (column), int32.

    Args:
      labels_hat: Predicted classes, any shape.
      labels: True classes, same shape.
      classes: How many.
      void: The label of pixels that do not count, if there is one.
    """
    row = labels if void is None else jnp.where(labels == void, classes, labels)
    counts = jnp.zeros((classes + 1, classes), jnp.int32)
    return counts.at[row.ravel(), labels_hat.ravel()].add(1)[:classes]


def mean_iou(confusion: jax.Array) -> jax.Array:
    """Intersection over union, averaged over the classes that are there.

    Classes that are neither in the labels nor predicted are left out.
    """
    both = jnp.diagonal(confusion)
    either = jnp.sum(confusion, axis=0) + jnp.sum(confusion, axis=1) - both
    return jnp.mean(both / jnp.maximum(either, 1), where=either > 0)
