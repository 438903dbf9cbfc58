"""The command line: `python -m benchmarks` lists the benchmarks there are."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import durations, merging, methods_table
from benchmarks.harness.options import PRESETS, Options, UsageError
from benchmarks.harness.provenance import refuse_miscompiling
from benchmarks.harness.results import read_json
from benchmarks.harness.tables import Table, fill_blocks, markdown
from benchmarks.harness.terminal import say

BENCHMARKS = {
    "digits": "learned against searched loss weights on digits under shift",
    "rho": "what the strength of the regulariser does to the weights",
    "epsilon": "what the initial weights do, and whether to measure them",
    "overhead": "what learning the weights costs per step",
    "toy": "where weightings end up on two objectives in the plane",
    "pinn": "weightings for a physics-informed network",
    "pretraining": "loss weights of self-supervised pretraining, steered downstream",
    "properties": "which weighting has which property, by test",
    "depth": "the paper's depth task: one run against searches",
    "segmentation": "the paper's segmentation task: one run against searches",
    "ablations": "what in YOTO does what, on the depth task",
    "beta_vae": "one conditional VAE against one for each beta",
    "style": "one conditional style transfer against fixed weights",
    "compression": "one conditional image codec against fixed ones and JPEG",
    "pareto": "a Pareto front from one model, against a grid of models",
    "robustness": "what bad batches do to weightings",
    "scaling": "many devices, many processes: equality, cost, crashes",
    "sweep": "a search for loss weights that several workers share",
    "ppo": "weightings for policy, value and entropy, on CartPole",
    "choices": "choices learned with the model, against all architectures",
    "learning_rate": "whether the learning rate can be learned with the weights",
    "frontier": "nearly every method on nine problems, against a search of 15 runs",
}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DURATIONS = ROOT / "benchmarks" / "durations.json"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("[!_]*/*.md")),  # not what is built
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "FINDINGS.md",
    *(ROOT / "benchmarks" / "tasks" / name / "REPORT.md" for name in BENCHMARKS),
)


def load(benchmark: str, part: str = "run") -> Any:
    """A module of a benchmark, imported when it is needed: each takes seconds."""
    return importlib.import_module(f"benchmarks.tasks.{benchmark}.{part}")


def update_tables(pages: tuple[Path, ...], results: Path) -> None:
    """Rewrite the marked tables of the pages from the stored results and the registry.

    The table goes to the mark ``name`` of its benchmark, a summary to ``name-summary``,
    further tables to marks that the benchmark chooses, and what all benchmarks with a
    ``view`` have in common to ``searches``; all weightings go to ``methods`` and
    ``warnings``, and all benchmarks to ``benchmarks``.
    """
    blocks = {
        "methods": markdown(methods_table.table(), numbers=False),
        "warnings": markdown(methods_table.warnings(), numbers=False),
        "benchmarks": markdown(index(results), numbers=False),
    }
    views = {}
    for name, report, path in _stored(results):
        result = read_json(path)
        blocks[path.stem] = markdown(report.table(result))
        if hasattr(report, "summary"):
            blocks[f"{path.stem}-summary"] = markdown(report.summary(result))
        if hasattr(report, "view"):
            views[path.stem.replace("_", ", ")] = report.view(result)
        if hasattr(report, "tables") and path.stem == name:  # not on other data
            for mark, table in report.tables(result).items():
                blocks[mark] = markdown(table)
    if views:
        digest = importlib.import_module("benchmarks.harness.contest_report").digest(
            views
        )
        blocks["searches"] = markdown(digest)
    for page in pages:
        page.write_text(fill_blocks(page.read_text(), blocks))


def index(results: Path) -> Table:
    """All benchmarks, what they measure, how long it took, and where that is told."""
    rows, quick = [], durations.read(DURATIONS)
    for name, what in BENCHMARKS.items():
        path = results / f"{name}.json"
        seconds = read_json(path)["meta"].get("seconds") if path.is_file() else None
        took = "not recorded" if seconds is None else f"{seconds / 60:.1f} min"
        of_quick = f"{quick[name]} s" if name in quick else ""
        told = f"[report](tasks/{name}/REPORT.md)"
        rows.append([f"`{name}`", what, of_quick, took, told])
    headings = (
        "name",
        "what it measures",
        "quick preset (processor)",
        "stored result",
        "told in",
    )
    return Table(headings, rows)


def draw_figures(results: Path) -> None:
    """Redraw the figures from the stored results."""
    for _, report, path in _stored(results):
        if hasattr(report, "figure"):
            report.figure(read_json(path), path.with_suffix(".png"))


def _stored(results: Path) -> Iterator[tuple[str, Any, Path]]:
    """The results, each with its report; ``name_data`` is on other data."""
    for name in BENCHMARKS:
        usual = results / f"{name}.json"
        for path in (usual, *sorted(results.glob(f"{name}_*.json"))):
            if path.is_file():
                yield name, load(name, "report"), path


def parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<13} {what}" for name, what in BENCHMARKS.items())
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"benchmarks:\n{listing}\n\nupkeep:\n"
        "  tables     rewrite the tables of the pages from the stored results\n"
        "  figures    redraw the figures from the stored results\n"
        "  merge DIR  put results of some methods into the stored ones; with --drop,\n"
        "             old ones of methods that look at gradients go\n"
        "  durations  run quick presets, all or those named, and write what they take",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s NAME [options]; %(prog)s NAME --help",
    )
    names = top.add_subparsers(
        prog=top.prog, dest="name", metavar="NAME", help=argparse.SUPPRESS
    )
    for name, what in BENCHMARKS.items():
        command = names.add_parser(name, description=what, help=argparse.SUPPRESS)
        _add_options(command)
        for flag, settings in EXTRA.get(name, ()):
            command.add_argument(flag, **settings)
    for name in ("tables", "figures"):
        names.add_parser(name, help=argparse.SUPPRESS)
    of_quick = names.add_parser("durations", help=argparse.SUPPRESS)
    of_quick.add_argument("names", nargs="*", metavar="NAME")
    merge = names.add_parser("merge", help=argparse.SUPPRESS)
    merge.add_argument("folder", type=_folder, metavar="DIR")
    merge.add_argument("--drop", action="store_true")
    return top


def _add_options(command: argparse.ArgumentParser) -> None:
    default = Options("")
    command.add_argument(
        "--methods",
        type=_names,
        metavar="A,B",
        help="run only these methods (default: all)",
    )
    command.add_argument(
        "--seeds",
        type=_positive,
        default=default.seeds,
        metavar="N",
        help="number of seeds (default: %(default)s)",
    )
    command.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="training steps (default: what the preset says)",
    )
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default=default.preset,
        help="size of the benchmark (default: %(default)s)",
    )
    command.add_argument(
        "--data",
        type=_folder,
        metavar="DIR",
        help="data folder, for benchmarks that read one",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=default.out,
        metavar="DIR",
        help="where the results go (default: %(default)s)",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was interrupted, from what it had finished",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no folder {text!r}")
    return Path(text)


_ROUNDS: dict[str, Any] = {
    "type": int,
    "metavar": "N",
    "help": "rounds of timed steps, 0 for none (default: what the preset says)",
}
_COLLECT: tuple[str, dict[str, Any]] = (
    "--collect",
    {
        "action": "store_true",
        "help": "train nothing: with --resume, write what is finished so far",
    },
)
EXTRA: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "epsilon": [
        (
            "--problems",
            {"metavar": "A,B", "help": "run only these problems (default: all)"},
        ),
        _COLLECT,
    ],
    "frontier": [
        (
            "--problems",
            {
                "metavar": "A,B",
                "help": "run only these problems (default: all; camvid with --data)",
            },
        ),
        _COLLECT,
    ],
    "depth": [("--rounds", _ROUNDS)],
    "segmentation": [("--rounds", _ROUNDS)],
    "scaling": [
        (
            "--processes",
            {
                "type": _positive,
                "metavar": "N",
                "help": "compare runs of up to so many processes, and nothing else "
                "unless --methods says so",
            },
        ),
    ],
    "sweep": [
        (
            "--workers",
            {
                "type": _positive,
                "metavar": "N",
                "help": "processes of this machine (default: 4; 2 in the quick preset)",
            },
        ),
        (
            "--budget",
            {"type": _positive, "metavar": "N", "help": "runs of the whole search"},
        ),
        (
            "--storage",
            {
                "metavar": "URL",
                "help": "database that workers share, or journal:PATH (default: a file "
                "of SQLite in --out)",
            },
        ),
        (
            "--join",
            {
                "action": "store_true",
                "help": "only work on the search that is in --storage",
            },
        ),
        (
            "--kill",
            {
                "type": _positive,
                "metavar": "N",
                "help": "after N trials, kill one of the workers in the middle of its "
                "own (SIGKILL)",
            },
        ),
    ],
}
"""Options of one benchmark alone, flag and how argparse has it: `Options.extra`."""


def _extra(name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of one benchmark alone out of those given."""
    flags = [flag for flag, _ in EXTRA.get(name or "", ())]
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    return {name: given.pop(name) for name in names}


def main(arguments: list[str] | None = None) -> None:
    command_line = parser()
    given = vars(command_line.parse_args(arguments))
    name = given.pop("name")
    extra = _extra(name, given)
    try:
        if name is None:
            command_line.print_help()
        elif name == "tables":
            update_tables(PAGES, RESULTS)
        elif name == "figures":
            draw_figures(RESULTS)
        elif name == "durations":
            names = given["names"] or BENCHMARKS
            if unknown := sorted(set(names) - set(BENCHMARKS)):
                raise UsageError(f"there is no benchmark {', '.join(unknown)}")
            durations.measure(names, DURATIONS)
        elif name == "merge":
            names = tuple(BENCHMARKS)
            merged = merging.merge_folder(
                names, given["folder"], RESULTS, given["drop"]
            )
            say(f"Merged: {', '.join(path.name for path in merged)}")
        else:
            benchmark = load(name)
            if given["resume"] and not getattr(benchmark, "RESUMABLE", False):
                raise UsageError(f"{name} cannot be resumed: drop --resume")
            presets = getattr(benchmark, "PRESETS", PRESETS)
            if given["preset"] not in presets:
                raise UsageError(f"{name} has the presets {' and '.join(presets)}")
            refuse_miscompiling()
            benchmark.main(Options(name, **given, extra=extra))
    except UsageError as error:
        command_line.error(str(error))


if __name__ == "__main__":
    main()
