"""What goes wrong with a checkpoint, in words."""

from collections.abc import Iterable

from yoto_jax._losses import listed

SHOWN = 6
"""Error messages list this many names and count the rest."""
LENGTH = 160
"""Error messages quote this many characters of both ends of a foreign message."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not what it should be."""


class Unfit(Exception):
    """Why a checkpoint cannot be restored."""


def reason_of(error: BaseException) -> str:
    """The first line of a message as a sentence, without the middle if it is long."""
    text = str(error).strip().partition("\n")[0]
    text = text.partition(" [tensorstore_spec")[0]  # Hundreds of settings.
    if len(text) > 2 * LENGTH:
        text = f"{text[:LENGTH]} ... {text[-LENGTH:]}"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def some_of(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    rest = len(names) - SHOWN
    return listed(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
