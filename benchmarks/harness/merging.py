"""What of an earlier result stays when some of its methods are measured again.

A new version of a compiler can make some numbers wrong and leave others. The wrong ones
are measured again; ``python -m benchmarks merge FOLDER`` puts them into the stored
result. Its meta data then say under ``kept`` which methods are of before, of which
versions, and how far those differ that were measured with both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.options import UsageError
from benchmarks.harness.results import Record, Result, read_json, rounded, write_json
from yoto_jax._jaxlib import WRONG_GRADIENTS, WRONG_MEANS

PER_LOSS_GRADIENTS: dict[str, tuple[str, ...]] = {
    "ablations": ("K aligned",),
    "depth": ("grap", "aligned", "conditional-grap"),
    "digits": ("conditional-grap",),
    "pinn": ("gradient-norm", "lr-annealing", "ntk"),
    "pretraining": ("grap", "plain", "closed", "gradnorm", "mgda", "pcgrad"),
    "segmentation": ("grap", "aligned", "conditional-grap"),
}
"""By benchmark: the methods that look at the gradient of each loss."""

MASKED_MEANS: dict[str, tuple[str, ...]] = {"depth": ("CD", "FA")}
"""By benchmark: the metrics that are masked means of reshaped arrays."""

TIMED = ("choosing", "error at equal time")
"""Metrics of runs that depend on how fast they were, which no comparison is about."""


def merge(name: str, before: Result, now: Result, drop: bool = False) -> Result:
    """The new result, and what it does not have from the one before.

    A new one with fewer seeds is a sample: all of before stays, compared with it.

    Args:
      name: Of the benchmark.
      before: The stored result.
      now: Of some of its methods, with the same settings.
      drop: Whether methods that look at gradients and were not measured again go.

    Raises:
      UsageError: if nothing would stay, or something of two measurements before;
        settings differ; a method that looks at gradients was not measured again, or
        nothing was that could be compared.
    """
    if "kept" in before["meta"]:
        raise UsageError(f"{name} has methods of before already: measure all")
    changed = _settings(before) ^ _settings(now)
    if changed:
        raise UsageError(f"{name} was measured with other settings: {sorted(changed)}")
    sample = now["meta"].get("seeds", 0) < before["meta"].get("seeds", 0)
    records = [] if sample else now["records"]
    replaced = {(r["method"], r["metric"]) for r in records}
    gradients = PER_LOSS_GRADIENTS.get(name, ())
    gone = {m for m in gradients if drop and m not in {r["method"] for r in records}}
    stay = [
        r
        for r in before["records"]
        if (r["method"], r["metric"]) not in replaced and r["method"] not in gone
    ]
    again = {r["method"] for r in records if _counts(r, before)}
    every = dict.fromkeys(r["method"] for r in stay)
    methods = [m for m in every if "seeds" not in before["meta"] or m not in again]
    wrong = [m for m in methods if m in gradients]
    if wrong or not methods:
        what = f"without {', '.join(wrong)}" if wrong else "with all of its methods"
        raise UsageError(f"{name} was measured again {what}")
    of_run = ("command", "date", "commit", "versions")
    meta = before["meta"] | {k: now["meta"][k] for k in of_run}
    meta["kept"] = {
        "methods": methods,
        "metrics": list(dict.fromkeys(r["metric"] for r in stay)),
        **{k: before["meta"][k] for k in of_run},
        "checked": compare(name, before, now),
    }
    if gone:
        meta["dropped"] = sorted(gone)
    merged = {**before, "meta": meta, "records": stay + records}
    if "history" in before:
        new = [] if sample else now["history"]
        drawn = {entry["method"] for entry in new} | gone
        old = [e for e in before["history"] if e["method"] not in drawn]
        merged["history"] = old + new
    return merged


def _settings(result: Result) -> set[str]:
    sizes = ("preset", "steps", "data", "batch", "train_images", "machine", "cpu_count")
    return {f"{k}: {result['meta'].get(k)}" for k in sizes}


def _counts(record: Record, result: Result) -> bool:
    """Whether it is of a run, if the benchmark has runs, and not of a comparison."""
    return record["seed"] is not None or "seeds" not in result["meta"]


def compare(name: str, before: Result, now: Result) -> dict[str, Any]:
    """How far methods without per-loss gradients differ between two measurements.

    Returns:
      The methods, and for each metric the largest difference of a run and the largest
      one of a mean over seeds; where there are several, their standard deviation beside
      it.
    """
    key = lambda r: (r["method"], r["config"], r["seed"], r["domain"], r["metric"])
    gradients = PER_LOSS_GRADIENTS.get(name, ())
    old = {key(r): r["value"] for r in before["records"] if _counts(r, before)}
    pairs: dict[str, dict[tuple, list[tuple[float, float]]]] = {}
    methods: dict[str, None] = {}
    for r in now["records"]:
        if r["method"] in gradients or r["metric"] in TIMED or key(r) not in old:
            continue
        methods[r["method"]] = None
        of_metric = pairs.setdefault(r["metric"], {})
        place = (r["method"], r["config"], r["domain"])
        of_metric.setdefault(place, []).append((old[key(r)], r["value"]))
    if not methods:
        raise UsageError(
            f"{name}: measure a method without per-loss gradients too, to compare it"
        )
    differences = {m: _differences(list(of.values())) for m, of in pairs.items()}
    return {"methods": list(methods), "differences": differences}


def _differences(pairs: list[list[tuple[float, float]]]) -> dict[str, float]:
    runs = np.concatenate([np.abs(np.diff(x, axis=1)[:, 0]) for x in pairs])
    means = [abs(float(np.diff(np.mean(x, axis=0))[0])) for x in pairs]
    furthest = int(np.argmax(means))
    found = {"runs": len(runs), "run": runs.max(), "mean": means[furthest]}
    if len(pairs[furthest]) > 1:
        found["sd of seeds"] = np.std(np.array(pairs[furthest])[:, 0], ddof=1)
    return {k: rounded(x) for k, x in found.items()}


def complaints(name: str, result: Result) -> list[str]:
    """What is in a result that was computed wrongly, or never compared."""
    meta = result["meta"]
    found = []
    version = meta["versions"]["jaxlib"]
    if meta["platform"] == "cpu" and version in WRONG_GRADIENTS:
        found.append(f"jaxlib {version} computed it")
    if meta["platform"] == "cpu" and version in WRONG_MEANS:
        kept = meta.get("kept", {}).get("methods", ())
        new = {r["metric"] for r in result["records"] if r["method"] not in kept}
        means = sorted(new & set(MASKED_MEANS.get(name, ())))
        found += [f"jaxlib {version} computed {metric}" for metric in means]
    if "kept" in meta:
        kept = meta["kept"]
        wrong = set(kept["methods"]) & set(PER_LOSS_GRADIENTS.get(name, ()))
        found += [f"{method} looks at gradients, kept" for method in sorted(wrong)]
        if not kept.get("checked", {}).get("differences"):
            found.append("what is kept was not compared")
    return found


def merge_folder(
    names: Sequence[str], folder: Path, results: Path, drop: bool = False
) -> list[Path]:
    """Put every result in a folder into the stored one of the same name."""
    merged = []
    for path in sorted(folder.glob("*.json")):
        stored = results / path.name
        name = benchmark_of(path.stem, names)
        now = read_json(path)
        result = merge(name, read_json(stored), now, drop)
        extra = {k: v for k, v in result.items() if k not in ("meta", "records")}
        write_json(stored, result["meta"], result["records"], **extra)
        merged.append(stored)
    if not merged:
        raise UsageError(f"no results in {folder}")
    return merged


def benchmark_of(stem: str, names: Sequence[str]) -> str:
    """The benchmark of a file, ``name`` or ``name_data``."""
    return max((n for n in names if f"{stem}_".startswith(f"{n}_")), key=len)
