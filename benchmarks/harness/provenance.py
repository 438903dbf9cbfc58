"""What a result was measured with: command, commit, versions, machine."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness.options import Options, UsageError
from yoto_jax._jaxlib import MISCOMPILING, REMEDY

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def refuse_miscompiling(platform: str | None = None) -> None:
    """Refuse to measure where numbers are silently wrong.

    Args:
      platform: What the benchmark runs on (default: that of the first device).

    Raises:
      UsageError: if jaxlib is one that miscompiles on a CPU, and this is one.
    """
    version = importlib.metadata.version("jaxlib")
    if version not in MISCOMPILING:
        return
    if (platform or jax.devices()[0].platform) == "cpu":
        raise UsageError(
            f"jaxlib {version} silently computes wrong numbers on a CPU. {REMEDY}"
        )


# Results.


def meta(options: Options, **settings: Any) -> dict[str, Any]:
    """What a reader needs to judge and to repeat a result.

    ``seconds`` is how long it took so far, None if a part was there already.
    """
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    seconds = None if options.resume else round(time.monotonic() - options.started, 1)
    return {
        "command": options.command,
        "preset": options.preset,
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "seconds": seconds,
        **settings,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
