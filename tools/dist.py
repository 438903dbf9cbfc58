"""Builds the package, and tries it as users get it.

``python -m tools.dist`` builds the wheel and the source distribution into ``dist/``,
looks at what is in them, and installs the wheel into an environment outside of the
repository. There it runs the first example of the README with the core alone, and type
checkers read the examples of all pages. It stops at the first thing that is wrong.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import examples

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
PACKAGE = "yoto_jax"
EXTRAS = "flax,checkpoints,monitoring"
FURTHER = ("equinox",)
"""What else the examples of the pages import."""


def run(*command: str | Path, cwd: Path = ROOT, status: int = 0) -> str:
    """What a command prints; it must end with ``status``, and finds no repository."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != status:
        words = " ".join(map(str, command))
        raise SystemExit(f"{words}\n{output}\nended with status {done.returncode}")
    return output


def stop_if(wrong: object, what: str) -> None:
    """Stops with what is wrong, if anything is."""
    if wrong:
        raise SystemExit(f"{what}: {wrong}")


# What is built.


def build() -> str:
    """Both from the repository, as pip does: with what pyproject.toml asks for."""
    run(sys.executable, "-m", "build", "--sdist", "--wheel", "--outdir", DIST, ROOT)
    return ", ".join(f"{x.name} {x.stat().st_size / 1e6:.2f} MB" for x in built())


def built() -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def files_of(wheel: Path) -> dict[str, bytes]:
    """What is in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_metadata() -> str:
    """What PyPI would refuse, and what belongs into a wheel."""
    sdist, wheel = built()
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    check = (sys.executable, "-m", "check_wheel_contents")
    run(*check, "--package", ROOT / PACKAGE, wheel)
    names = files_of(wheel)
    stop_if(f"{PACKAGE}/py.typed" not in names, "the wheel has no py.typed")
    return f"twine and check-wheel-contents: {len(names)} files in the wheel"


def check_sdist(folder: Path) -> str:
    """It has what is under version control, of all that pyproject.toml names."""
    with tarfile.open(built()[0]) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    paths = [path for path in source.rglob("*") if path.is_file()]
    names = {path.relative_to(source).as_posix() for path in paths}
    expected = included(run("git", "ls-files").splitlines())
    stop_if(sorted(expected - names), "missing in the source distribution")
    stop_if(sorted(names - expected - {"PKG-INFO"}), "not under version control")
    notebooks = [path for path in paths if path.suffix == ".ipynb"]
    stop_if([x.name for x in notebooks if executed(x.read_text())], "with output")
    return f"source distribution: {len(names)} files, all under version control"


def included(tracked: list[str]) -> set[str]:
    """Those of the files that the source distribution is to have."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = content["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = {*named, "LICENSE", "pyproject.toml", ".gitignore"}
    return {name for name in tracked if name.split("/")[0] in named}


def executed(notebook: str) -> bool:
    """Whether a notebook has been run."""
    cells = json.loads(notebook)["cells"]
    return any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def check_wheel_of_sdist(folder: Path) -> str:
    """From the source distribution comes the wheel that comes from the repository."""
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "build", "--wheel", source)
    (again,) = source.glob("dist/*.whl")
    ours, theirs = files_of(built()[1]), files_of(again)
    differ = [x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x)]
    stop_if(sorted(differ), "not the same in the wheel of the source distribution")
    return "the wheel of the source distribution has the same files"


# What users do with it. ``place`` has the environment, and nothing of the repository.


def python_of(place: Path) -> Path:
    """The interpreter of the new environment."""
    return place / "venv" / "bin" / "python"


def install(place: Path) -> str:
    """The wheel, and what it depends on."""
    run(sys.executable, "-m", "venv", place / "venv")
    run(python_of(place), "-m", "pip", "install", "--quiet", built()[1])
    return "the wheel in a new environment, with the core alone"


def check_core(place: Path) -> str:
    """The report, the first example of the README, and what is said without Flax."""
    python = python_of(place)
    print(run(python, "-m", PACKAGE, cwd=place), end="")
    where = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    found = run(python, "-c", where, cwd=place)
    stop_if(not found.startswith(str(place)), f"imported from {found}")
    _, example = next(examples.blocks(ROOT / "README.md"))
    print(run(python, "-W", "error", "-c", example, cwd=place), end="")
    said = run(python, "-c", f"import {PACKAGE}.linen", cwd=place, status=1)
    stop_if(f"pip install '{PACKAGE}[flax]'" not in said, f"without Flax: {said}")
    return "the report, the first example of the README, what is said without Flax"


def install_extras(place: Path) -> str:
    """What the examples of all pages import."""
    wanted = (f"{built()[1]}[{EXTRAS}]", *FURTHER)
    run(python_of(place), "-m", "pip", "install", "--quiet", *wanted)
    names = ("linen", "nnx", "checkpoints", "monitoring")
    code = "; ".join(f"import {PACKAGE}.{name}" for name in names)
    run(python_of(place), "-c", code, cwd=place)
    return f"the extras {EXTRAS}, and {', '.join(FURTHER)}"


def check_types(checker: str, place: Path) -> str:
    """The examples have no type error but those of other packages."""
    folder = place / checker
    folder.mkdir()
    count = examples.write(folder)
    findings = [*examples.CHECKERS[checker](folder, python_of(place))]
    others, ours = examples.sort_out(findings)
    text = [f"{x.file}:{x.line}: {x.message}" for x in ours]
    stop_if("\n".join(text), f"{checker} on the examples")
    return f"{checker}: {count} examples, {len(others)} errors of other packages"


def step(check: Callable[..., str], *arguments: Any) -> None:
    """Does one thing; prints what was done, and how long it took."""
    begin = time.perf_counter()
    said = check(*arguments)
    print(f"{time.perf_counter() - begin:5.0f} s  {said}", flush=True)


def main() -> None:
    """All of it."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        place, source = Path(folder, "place").resolve(), Path(folder, "source")
        place.mkdir()
        step(build)
        step(check_metadata)
        step(check_sdist, source)
        step(check_wheel_of_sdist, source)
        step(install, place)
        step(check_core, place)
        step(install_extras, place)
        for checker in examples.CHECKERS:
            step(check_types, checker, place)


if __name__ == "__main__":
    main()
