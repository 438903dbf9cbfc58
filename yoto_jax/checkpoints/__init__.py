"""Checkpoints of training. Needs ``pip install yoto_jax[checkpoints]``.

A thin layer over Orbax, which writes the arrays and coordinates the processes. What is
added: what a tree of arrays does not say by itself, such as which losses it is for, is
stored beside it; a checkpoint is compared with the state that it is restored into, and
with digests of what was saved; and every failure is a :class:`CheckpointError` that
says what is wrong with which folder.
"""

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
