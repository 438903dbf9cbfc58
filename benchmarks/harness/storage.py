"""Files that are whole or not there, however a process ends."""

import os
from pathlib import Path

from benchmarks.harness.options import UsageError


def read_lines(path: Path, header: str) -> list[bytes]:
    """The lines below the header, without a last one that was being written.

    Raises:
      UsageError: if the file has another header: it is of other settings.
    """
    content = path.read_bytes()
    # Nothing but the unfinished line is written again: what is cut off here could not
    # be lost by being killed here.
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = whole.splitlines()
    if first.decode(errors="replace") != header:
        raise UsageError(
            f"{path} holds runs with other settings: "
            f"{first.decode(errors='replace')}, not {header}. "
            "Use them, another --out, or start afresh without --resume."
        )
    os.truncate(path, len(whole))
    return lines


def append_line(path: Path, line: str) -> None:
    """Add a line that is on the disk when this returns."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
