"""Parts of a benchmark that need not be done again."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.results import rounded
from benchmarks.harness.storage import (
    UNREADABLE,
    append_line,
    has_lines,
    read_arrays,
    read_lines,
    start_lines,
    write_arrays,
)
from benchmarks.harness.terminal import say


class Units:
    """Finished parts of a benchmark, kept in files that ``--resume`` reads back.

    Each is a line of ``<name>.units.jsonl``. NumPy arrays in it are in a file of their
    own, in the folder ``<name>.units``.
    """

    def __init__(self, options: Options, name: str | None = None, **settings: Any):
        """Start, or go on if that was asked for.

        Args:
          options: Preset, seeds, steps and data are among the settings.
          name: Of the files (default: the benchmark).
          **settings: What else the outcomes depend on.

        Raises:
          UsageError: if the parts in the file were done with other settings.
        """
        name = name or options.benchmark
        options.out.mkdir(parents=True, exist_ok=True)
        self.path = options.out / f"{name}.units.jsonl"
        self.folder = options.out / f"{name}.units"
        common = {
            "preset": options.preset,
            "seeds": options.seeds,
            "steps": options.steps,
            "data": options.data and options.data.name,
        }
        self._header = json.dumps(
            {"benchmark": name, **common, **settings}, sort_keys=True
        )
        self._done: dict[str, Any] = {}
        self._arrays = 0
        self._earlier = 0.0
        self._lock = threading.Lock()
        if options.resume and has_lines(self.path):
            self._read()
        else:
            start_lines(self.path, self._header)
            for left in self.folder.glob("*.npz"):
                left.unlink()
        self._started = time.perf_counter()

    def _read(self) -> None:
        for line in read_lines(self.path, self._header):
            entry = json.loads(line)
            self._earlier = max(self._earlier, entry["seconds"])
            self._arrays = max(self._arrays, entry["arrays"])
            try:
                arrays = self._load(entry["arrays"]) if entry["arrays"] else []
            except UNREADABLE as error:
                say(f"{entry['unit']} is done again, its file cannot be used: {error}")
                continue
            self._done[entry["unit"]] = _unpacked(entry["outcome"], arrays)

    @property
    def seconds(self) -> float:
        """Since the start, without what was lost and what was between."""
        return self._earlier + time.perf_counter() - self._started

    def __contains__(self, unit: str) -> bool:
        """Whether a part is done."""
        return unit in self._done

    def do(self, unit: str, work: Callable[[], Any]) -> Any:
        """The outcome of a part, which is done unless it is in the file.

        Threads may call this side by side, for different parts.

        Args:
          unit: Names the part.
          work: Does it; its outcome is of dictionaries, lists, numbers, strings and
            arrays. It comes back as from a file, so with lists for tuples and NumPy's
            arrays for those of JAX, whether it was in one or not.
        """
        if unit not in self._done:
            arrays: list[np.ndarray] = []
            packed = json.dumps(_packed(work(), arrays), separators=(",", ":"))
            with self._lock:
                self._write(unit, packed, arrays)
            self._done[unit] = _unpacked(json.loads(packed), arrays)
        return self._done[unit]

    def _write(self, unit: str, packed: str, arrays: list[np.ndarray]) -> None:
        number = 0
        if arrays:
            self._arrays = number = self._arrays + 1
            self._save(number, arrays)
        seconds = rounded(self.seconds)
        append_line(
            self.path,
            f'{{"unit":{json.dumps(unit)},"seconds":{seconds},"arrays":{number},'
            f'"outcome":{packed}}}',
        )

    def _save(self, number: int, arrays: list[np.ndarray]) -> None:
        self.folder.mkdir(exist_ok=True)
        named = {f"arr_{i}": array for i, array in enumerate(arrays)}
        write_arrays(self.folder / f"{number}.npz", named)

    def _load(self, number: int) -> list[np.ndarray]:
        named = read_arrays(self.folder / f"{number}.npz")
        return [named[f"arr_{i}"] for i in range(len(named))]


_ARRAY, _ITEMS = "array", "items"


def _packed(outcome: Any, arrays: list[np.ndarray]) -> Any:
    """The outcome with places in a list of arrays instead of the arrays."""
    if isinstance(outcome, np.ndarray | jax.Array):
        arrays.append(np.asarray(outcome))
        return {_ARRAY: len(arrays) - 1}
    if isinstance(outcome, dict):
        items = [[key, _packed(value, arrays)] for key, value in outcome.items()]
        plain = all(isinstance(key, str) for key in outcome)
        if plain and not outcome.keys() & {_ARRAY, _ITEMS}:
            return dict(items)
        return {_ITEMS: items}  # JSON has no other keys than strings.
    if isinstance(outcome, list | tuple):
        return [_packed(value, arrays) for value in outcome]
    return outcome.item() if isinstance(outcome, np.generic) else outcome


def _unpacked(packed: Any, arrays: list[np.ndarray]) -> Any:
    """The inverse of :func:`_packed`, but for tuples."""
    if isinstance(packed, list):
        return [_unpacked(value, arrays) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if packed.keys() == {_ARRAY}:
        return arrays[packed[_ARRAY]]
    items = packed[_ITEMS] if packed.keys() == {_ITEMS} else packed.items()
    return {key: _unpacked(value, arrays) for key, value in items}
