"""Export of recorded loss weights to TensorBoard."""

from typing import Any, Protocol

from yoto_jax.monitoring._history import History, check_history


class Writer(Protocol):
    """Interface of the ``SummaryWriter`` of ``tensorboardX`` and PyTorch."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Writes one number."""


def write_scalars(
    history: History, writer: Writer, *, since: int = -1, prefix: str = "loss_weights"
) -> int:
    """Writes rows to TensorBoard, or any object with ``add_scalar(tag, value, step)``.

    The tags are ``loss_weights/<name>``, ``loss_weights_losses/<name>``,
    ``loss_weights_gradients/data`` and ``loss_weights_gradients/prior``.

    Args:
      history: From :func:`history`.
      writer: ``SummaryWriter`` of ``tensorboardX`` or ``torch.utils.tensorboard``.
      since: Only rows of later steps are written: give what the last call returned.
      prefix: What all tags begin with.

    Returns:
      The last step written, or ``since`` if there was nothing new.

    Raises:
      TypeError: ``history`` is something else, such as the state, or ``writer`` has no
        ``add_scalar``.

    Examples:
      >>> import numpy as np
      >>> from yoto_jax import monitoring
      >>> class Printer:
      ...     def add_scalar(self, tag, value, step):
      ...         print(step, tag, value)
      >>> seen = monitoring.History(np.array([0, 5]), {"a": np.array([0.5, 1])}, {})
      >>> since = monitoring.write_scalars(seen, Printer())
      0 loss_weights/a 0.5
      5 loss_weights/a 1.0
      >>> monitoring.write_scalars(seen, Printer(), since=since)
      5

    .. note::
      Rows that the ring has dropped in the meantime are lost: call it at least once in
      every ``length * every`` steps.
    """
    check_history(history)
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            "writer must have add_scalar(tag, value, step), as a SummaryWriter has, "
            f"got {type(writer).__name__}."
        )
    groups = {
        prefix: history.loss_weights,
        f"{prefix}_losses": history.losses,
        f"{prefix}_gradients": {
            "data": history.data_gradient,
            "prior": history.prior_gradient,
        },
    }
    curves = {
        f"{group}/{name}": values
        for group, named in groups.items()
        for name, values in named.items()
        if values is not None
    }
    absent = {
        f"{group}/{name}": ~there
        for group in (prefix, f"{prefix}_losses")
        for name, there in (history.present or {}).items()
    }
    for row, step in enumerate(history.steps):
        if step > since:
            for tag, values in curves.items():
                if not (tag in absent and absent[tag][row]):
                    writer.add_scalar(tag, float(values[row]), int(step))
    return max([since, *map(int, history.steps[-1:])])
