"""How long the quick presets take, here and one after the other."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path


def measure(names: Iterable[str], path: Path) -> None:
    """Run the quick preset of each benchmark, and write the seconds by name."""
    took = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            started = time.monotonic()
            quick = [sys.executable, "-m", "benchmarks", name, "--preset", "quick"]
            subprocess.run([*quick, "--out", folder], check=True)
            took[name] = round(time.monotonic() - started)
    path.write_text(json.dumps(took, indent=1) + "\n")


def read(path: Path) -> dict[str, int]:
    """The seconds by name, of those that have been measured."""
    return json.loads(path.read_text()) if path.is_file() else {}
