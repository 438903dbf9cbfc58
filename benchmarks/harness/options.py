"""The options that all benchmarks have, and what becomes of those that cannot be."""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESETS = ("quick", "cpu", "gpu")


class UsageError(ValueError):
    """Options that cannot be honoured: the command line reports it and exits with 2."""


@dataclass(frozen=True)
class Options:
    """The options that all benchmarks have.

    Attributes:
      benchmark: Name of the benchmark.
      methods: Methods to run, ``None`` for all.
      seeds: Number of seeds.
      steps: Training steps, ``None`` for those of the preset.
      preset: One of ``PRESETS``.
      data: Folder of data, for benchmarks that read one.
      out: Folder that the results go to.
      resume: Whether to go on with what a run that was killed had done.
      extra: Options of this benchmark alone, by name.
      started: When the run began, by ``time.monotonic``.
    """

    benchmark: str
    methods: tuple[str, ...] | None = None
    seeds: int = 3
    steps: int | None = None
    preset: str = "cpu"
    data: Path | None = None
    out: Path = Path("out")
    resume: bool = False
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    started: float = field(default_factory=time.monotonic, compare=False)

    def choose(
        self, methods: Sequence[str], quick: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Those of ``methods`` that were asked for, in the order of ``methods``.

        If none were, all; or those of ``quick``, if there are any, in that preset.
        """
        if self.methods is None:
            few = quick if self.preset == "quick" else ()
            return tuple(few or methods)
        asked = _with_commas(self.methods, methods)
        unknown = sorted(set(asked) - set(methods))
        if unknown:
            raise UsageError(
                f"unknown method {', '.join(map(repr, unknown))}: "
                f"{self.benchmark} has {', '.join(methods)}"
            )
        return tuple(m for m in methods if m in asked)

    def refuse_data(self) -> None:
        """For benchmarks that carry their data with them."""
        if self.data is not None:
            raise UsageError(f"{self.benchmark} reads no data folder: drop --data")

    @property
    def command(self) -> str:
        """The command line, with folders relative to the current one."""
        words = ["python -m benchmarks", self.benchmark, f"--preset {self.preset}"]
        if self.methods is not None:
            words.append(f"--methods {shlex.quote(','.join(self.methods))}")
        words.append(f"--seeds {self.seeds}")
        if self.steps is not None:
            words.append(f"--steps {self.steps}")
        if self.data is not None:
            words.append(f"--data {_relative(self.data)}")
        for name, value in self.extra.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                words.append(flag)
            elif value is not None and value is not False:
                words.append(f"{flag} {value}")
        return " ".join([*words, f"--out {_relative(self.out)}"])


def _with_commas(parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """The parts of a list, those together that are one name with commas in it."""
    found: list[str] = []
    left = list(parts)
    while left:
        ends = range(len(left), 0, -1)
        end = next((n for n in ends if ", ".join(left[:n]) in names), 1)
        found.append(", ".join(left[:end]))
        left = left[end:]
    return found


def _relative(folder: Path) -> str:
    """A path below the current folder, or the last part of one elsewhere."""
    relative = Path(os.path.relpath(folder))
    return relative.name if ".." in relative.parts else relative.as_posix()
