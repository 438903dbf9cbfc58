"""Results: one flat record for each number, and the file that holds them.

A benchmark writes ``<name>.json``: ``meta`` and ``records``. Its report makes the
tables, the sentences and the figure from that file alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.options import UsageError

Record = dict[str, Any]
Result = dict[str, Any]


def record(
    method: str,
    metric: str,
    value: Any,
    *,
    config: str = "",
    seed: int | None = None,
    domain: str | None = None,
    unseen: bool = False,
    compute: float = 1,
) -> Record:
    """One number.

    Args:
      method: What was run.
      metric: What was measured.
      value: The number.
      config: Configuration of the method, as in ``describe``, or a selection.
      seed: Seed, ``None`` for what belongs to all of them.
      domain: Domain of the data, ``None`` for what has none.
      unseen: Whether the domain was kept out of training.
      compute: Cost in training runs: for what a search selects, the whole search.
    """
    return {
        "method": method,
        "config": config,
        "seed": seed,
        "domain": domain,
        "unseen": unseen,
        "metric": metric,
        "value": rounded(value),
        "compute": compute,
    }


def rounded(value: Any) -> float:
    """Five significant digits are more than any of these measurements has."""
    return float(f"{float(value):.5g}")


def thinned_curves(
    curves: dict[str, dict[str, np.ndarray]], points: int
) -> dict[str, Any]:
    """Curves [steps] by kind and name, averaged over stretches of steps.

    Returns:
      ``"step"``, the middle of each stretch, and the curves by kind and name.
    """
    some = next(iter(next(iter(curves.values())).values()))
    stretches = np.array_split(np.arange(len(some)), min(len(some), points))
    thin = lambda curve: [rounded(curve[s].mean()) for s in stretches]
    return {
        "step": [float(s.mean()) for s in stretches],
        **{
            kind: {name: thin(curve) for name, curve in named.items()}
            for kind, named in curves.items()
        },
    }


def describe(**settings: Any) -> str:
    """A configuration as text: ``"rho=0.1 epsilon=1"``."""
    return " ".join(
        f"{name}={value if isinstance(value, str) else format(float(value), '.4g')}"
        for name, value in settings.items()
    )


def parse(config: str) -> dict[str, str]:
    """The inverse of ``describe``."""
    return dict(setting.split("=") for setting in config.split())


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose fields have these values, in order."""
    found = list(records)
    for field, value in wanted.items():  # One by one: few are left after the first.
        found = [r for r in found if r[field] == value]
    return found


def values(records: Iterable[Record], **wanted: Any) -> np.ndarray:
    """The values of the records whose fields have these values, in order."""
    return np.array([r["value"] for r in select(records, **wanted)])


def write_json(
    path: Path, meta: dict[str, Any], records: list[Record], **extra: Any
) -> Result:
    """Write a result, one record a line so that versions compare well."""
    result = {"meta": meta, "records": records, **extra}
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, indent=1)}"
        if isinstance(entry, dict)
        else f"{json.dumps(name)}: [\n" + ",\n".join(map(_compact, entry)) + "\n]"
        for name, entry in result.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return result


def _compact(entry: Any) -> str:
    return json.dumps(entry, separators=(",", ":"))


def read_json(path: Path) -> Result:
    if not path.is_file():
        raise UsageError(f"no results at {path}: run the benchmark first")
    return json.loads(path.read_text())
