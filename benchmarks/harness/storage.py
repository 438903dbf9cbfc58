"""Files that are whole or not there, however a process ends."""

import os
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.harness.options import UsageError

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What a file of arrays that was cut short or spoilt raises when it is read."""


def has_lines(path: Path) -> bool:
    """Whether there is a file to go on with.

    One without a line was left by a start that got no further.
    """
    return path.is_file() and b"\n" in path.read_bytes()


def start_lines(path: Path, header: str) -> None:
    """A file with nothing but its header, which tells what its lines depend on."""
    path.write_text(header + "\n")


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


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file that is there with all its contents or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The inverse of :func:`write_arrays`; raises one of ``UNREADABLE``."""
    with path.open("rb") as stream, np.load(stream) as file:
        return {name: file[name] for name in file.files}
