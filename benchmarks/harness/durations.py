"""The processor time of the quick presets: a load beside them changes it little."""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.options import UsageError


def measure(names: Iterable[str], path: Path) -> None:
    """Run the quick preset of each benchmark, and write its processor seconds by name.

    Raises:
      UsageError: if some fail, after the others have been run and written.
    """
    took, failed = read(path), []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            started = _processor_seconds()
            quick = [sys.executable, "-m", "benchmarks", name, "--preset", "quick"]
            done = subprocess.run([*quick, "--out", folder], check=False)
            if done.returncode:
                failed.append(name)
                continue
            took[name] = round(_processor_seconds() - started)
            path.write_text(json.dumps(took, indent=1) + "\n")
    if failed:
        raise UsageError(f"these quick presets fail: {', '.join(failed)}")


def read(path: Path) -> dict[str, int]:
    """The processor seconds by name, of those that have been measured."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _processor_seconds() -> float:
    """Of all processes that this one has started and seen the end of."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
