"""Errors of checkpoints and their messages."""

from collections.abc import Iterable

from yoto_jax._losses import listed

SHOWN = 6
"""Error messages list this many names and count the rest."""
LENGTH = 160
"""Error messages quote this many characters of both ends of a foreign message."""


class CheckpointError(RuntimeError):
    """Error raised if a checkpoint cannot be written or does not fit."""


class Unfit(Exception):
    """Internal error with the reason why a checkpoint cannot be restored."""


def reason_of(error: BaseException) -> str:
    """First line of an error message as a sentence, shortened in the middle."""
    text = str(error).strip().partition("\n")[0]
    text = text.partition(" [tensorstore_spec")[0]  # Hundreds of settings.
    if len(text) > 2 * LENGTH:
        text = f"{text[:LENGTH]} ... {text[-LENGTH:]}"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def some_of(names: Iterable[str]) -> str:
    """Lists the first names, and the number of further ones."""
    names = list(names)
    rest = len(names) - SHOWN
    return listed(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
