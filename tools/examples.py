"""The examples of the pages, and what type checkers say of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

MIXED = '^"object" has no attribute|to "abs" has incompatible type "object"'
OTHERS = {
    r"PyTreeDef": "JAX has no types for it",
    r'supertype "flax\.': "Flax has another signature",
    r'"key" of type "SupportsIndex': "Flax does not say what apply returns",
    r'"count" is not a known attribute of "None"': "the streams of nnx.Dropout",
    r"[Vv]ariadic tuple|Tuple index out of range": "nnx.split with an ellipsis",
    r'Module has no attribute "loss_weights"': "nnx.Dict forgets what is in it",
    r'attribute "loss_weights" for class "Linear"': "nnx.Dict forgets what is in it",
    MIXED: "mypy, of a dict with values of several types",
    r"it refers to itself": "Pyright, where a script uses names again",
}
"""Errors that are not ours, by what is said of them, and whose they are."""

CONTROL = """import yoto_jax
yoto_jax.no_such_name
yoto_jax.weightings.no_such_name
yoto_jax.init_loss_logits({"a": 0.0}, primry="a")
"""
WRONG = {2, 3, 4}
"""The lines of ``CONTROL`` in which a type checker has to find an error."""


class Finding(NamedTuple):
    """What a type checker says of a line."""

    file: str
    line: int
    message: str


def pages() -> list[Path]:
    """The README and all pages of the documentation."""
    written = [x for x in (ROOT / "docs").rglob("*.md") if "_build" not in x.parts]
    return [ROOT / "README.md", *sorted(written)]


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, each with the line that it begins at."""
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        yield text[: block.start(1)].count("\n") + 1, block[1]


def write(folder: Path) -> int:
    """Writes each example to a file, and the control; how many examples there are."""
    (folder / "control.py").write_text(CONTROL)
    for page in pages():
        stem = re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix("")))
        for line, code in blocks(page):
            (folder / f"{stem}_{line}.py").write_text(code)
    return len([*folder.glob("*.py")]) - 1


def run_mypy(folder: Path, python: Path) -> Iterator[Finding]:
    """Errors that mypy finds, with what is installed for ``python``."""
    # Optax has no types.
    options = ("--check-untyped-defs", "--disable-error-code", "import-untyped")
    options += ("--output", "json", "--config-file", os.devnull)
    command = (sys.executable, "-m", "mypy", *options, "--python-executable", python)
    output = _output(*command, *sorted(folder.glob("*.py")), folder=folder)
    for found in map(json.loads, output.splitlines()):
        if found["severity"] == "error":
            yield Finding(Path(found["file"]).name, found["line"], found["message"])


def run_pyright(folder: Path, python: Path) -> Iterator[Finding]:
    """Errors that Pyright finds, with what is installed for ``python``."""
    # As for mypy, Optax has no types. And the loops of our scripts run once at least.
    lenient = {"useLibraryCodeForTypes": False, "reportPossiblyUnboundVariable": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(lenient))
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python)
    output = _output(*command, "--project", folder, folder=folder)
    for found in json.loads(output)["generalDiagnostics"]:
        if found["severity"] == "error":
            line = found["range"]["start"]["line"] + 1
            yield Finding(Path(found["file"]).name, line, found["message"])


def _output(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command[2]}:\n{done.stdout}{done.stderr}")
    return done.stdout


CHECKERS = {"mypy": run_mypy, "Pyright": run_pyright}


def sort_out(findings: list[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Those of other packages, and the rest; stops if the control is not among them."""
    seen = {finding.line for finding in findings if finding.file == "control.py"}
    if not seen >= WRONG:
        raise SystemExit(
            f"errors that were made on purpose are seen in lines {seen} alone"
        )
    others, ours = [], []
    for finding in findings:
        if finding.file != "control.py":
            known = any(re.search(other, finding.message) for other in OTHERS)
            (others if known else ours).append(finding)
    return others, ours
