"""Checkpoints of training, with Orbax: ``pip install 'yoto_jax[checkpoints]'``."""

try:
    import orbax.checkpoint  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "yoto_jax.checkpoints needs Orbax: pip install 'yoto_jax[checkpoints]'"
    ) from error

from yoto_jax.checkpoints._checkpoints import Checkpoints as Checkpoints
from yoto_jax.checkpoints._checkpoints import Restored as Restored
from yoto_jax.checkpoints._errors import CheckpointError as CheckpointError

__all__ = ["CheckpointError", "Checkpoints", "Restored"]
