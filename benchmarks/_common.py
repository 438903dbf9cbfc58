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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

T = TypeVar("T")
Record = dict[str, Any]
Result = dict[str, Any]

PRESETS = ("quick", "cpu", "gpu")
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
WIDTH_OF_A_FILE = 160


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
    """

    benchmark: str
    methods: tuple[str, ...] | None = None
    seeds: int = 3
    steps: int | None = None
    preset: str = "cpu"
    data: Path | None = None
    out: Path = Path("out")
    resume: bool = False

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


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
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
