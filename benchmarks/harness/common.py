"""What every benchmark shares: options, records, tables, progress.

A benchmark is a module with ``main(options)``, which writes ``<name>.json``, and
``table(result)``, which makes its table from that file alone. ``summary(result)``, a
shorter table, and ``figure(result, path)`` are optional. The file holds
``meta`` and ``records``: one flat record for each number.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

from yoto_jax._jaxlib import MISCOMPILING, REMEDY

T = TypeVar("T")
Record = dict[str, Any]
Result = dict[str, Any]

PRESETS = ("quick", "cpu", "gpu")
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
WIDTH_OF_A_FILE = 160


class UsageError(ValueError):
    """Options that cannot be honoured: the command line reports it and exits with 2."""


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

    def choose(self, methods: Sequence[str]) -> tuple[str, ...]:
        """Those of ``methods`` that were asked for, in the order of ``methods``."""
        unknown = sorted(set(self.methods or ()) - set(methods))
        if unknown:
            raise UsageError(
                f"unknown method {', '.join(map(repr, unknown))}: "
                f"{self.benchmark} has {', '.join(methods)}"
            )
        return tuple(m for m in methods if self.methods is None or m in self.methods)

    def refuse_data(self) -> None:
        """For benchmarks that carry their data with them."""
        if self.data is not None:
            raise UsageError(f"{self.benchmark} reads no data folder: drop --data")

    @property
    def command(self) -> str:
        """The command line, with folders relative to the current one."""
        words = ["python -m benchmarks", self.benchmark, f"--preset {self.preset}"]
        if self.methods is not None:
            words.append(f"--methods {','.join(self.methods)}")
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


def _relative(folder: Path) -> str:
    """A path below the current folder, or the last part of one elsewhere."""
    relative = Path(os.path.relpath(folder))
    return relative.name if ".." in relative.parts else relative.as_posix()


# Results.


def meta(options: Options, **settings: Any) -> dict[str, Any]:
    """What a reader needs to judge and to repeat a result."""
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
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
        **settings,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


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
    return [r for r in records if all(r[k] == v for k, v in wanted.items())]


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


# Parts of a benchmark that need not be done again.


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
        # A file without a line was left by a start that got no further.
        if options.resume and self.path.is_file() and b"\n" in self.path.read_bytes():
            self._read()
        else:
            self.path.write_text(self._header + "\n")
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
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
        """A file is there with all its contents or not at all."""
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / "unfinished.tmp"
        with temporary.open("wb") as file:
            np.savez(file, *arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / f"{number}.npz")

    def _load(self, number: int) -> list[np.ndarray]:
        path = self.folder / f"{number}.npz"
        with path.open("rb") as stream, np.load(stream) as file:
            return [file[f"arr_{i}"] for i in range(len(file.files))]


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


# Terminal.

_interactive = sys.stdout.isatty()
console = rich.console.Console(
    highlight=False, width=None if _interactive else WIDTH_OF_A_FILE
)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar, or silently if nobody is watching."""
    return iter(
        rich.progress.track(
            items,
            description,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


def say(text: str) -> None:
    """Print a line, wrapped to the terminal but never cut."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


# Tables.


class Table(NamedTuple):
    """A table of text, of which the first column is a name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def mean_sd(numbers: Iterable[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, such as ``"95.1 ± 0.4"``."""
    scaled = scale * np.asarray(list(numbers))
    mean = f"{scaled.mean():.{digits}f}"
    return mean if len(scaled) < 2 else f"{mean} ± {scaled.std(ddof=1):.{digits}f}"


def show(*tables: Table) -> None:
    """Print the first of the tables that fits the terminal, or else the last."""
    unbounded = console.options.update(max_width=10_000)
    grids = [_grid(table) for table in tables]
    widths = [console.measure(grid, options=unbounded).maximum for grid in grids]
    fitting = (g for g, w in zip(grids, widths, strict=True) if w <= console.width)
    console.print(next(fitting, grids[-1]), markup=False)


def _grid(table: Table) -> rich.table.Table:
    grid = rich.table.Table(caption=table.caption or None, caption_justify="left")
    for i, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    return grid


def markdown(table: Table, *, numbers: bool = True) -> str:
    """The table in GitHub's Markdown; columns of numbers are flush right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(table.columns) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (table.columns, rule, *table.rows)]
    return "\n".join([*lines, "", table.caption] if table.caption else lines)


def fill_blocks(text: str, blocks: dict[str, str]) -> str:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        filled = f"{begin}\n{block}\n{end}".replace("\\", r"\\")
        text = pattern.sub(filled, text)
    return text
