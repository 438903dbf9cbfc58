"""What the project depends on, and under which licences.

``python -m tools.licenses`` prints the table, and which of all installed packages
are under a licence of the GPL family; ``--write`` puts the table into the page
``docs/reference/dependencies.md``. Licences are those that the metadata of the
installed packages state. Of a package that is not installed here, the page keeps the
one it has.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "dependencies.md"
UNKNOWN = "not known"

PURPOSES = {
    "jax": "arrays, derivatives, compilation",
    "jaxlib": "the compiler of JAX; 0.10 is excluded, see `pyproject.toml`",
    "numpy": "arrays on the host",
    "optax": "the optimizers that loss weights are learned with",
    "flax": "`yoto_jax.linen`, `yoto_jax.nnx`",
    "orbax-checkpoint": "`yoto_jax.checkpoints`",
    "tensorboardX": "loss weights in TensorBoard",
    "constriction": "entropy coder of the compression benchmark",
    "matplotlib": "figures",
    "moocore": "hypervolumes of more than two objectives",
    "optuna": "searches that learned weights are compared with",
    "pillow": "images; JPEG of the compression benchmark",
    "rich": "tables and progress bars of the benchmarks",
    "scikit-learn": "data of the digits benchmark, probes",
    "scipy": "statistics of the benchmarks",
    "gymnax": "environments of the reinforcement learning benchmark",
    "six": "what gymnax imports and does not name",
    "torch": "Gaussian processes of Optuna; TorchJD",
    "torchjd": "weightings of others that ours are checked against",
    "cvxpy": "optional solvers of TorchJD",
    "ecos": "optional solver of TorchJD",
    "quadprog": "optional solver of TorchJD",
    "qpsolvers": "optional solver of TorchJD",
    "ipykernel": "runs the notebooks",
    "ipython": "shows tables in the notebooks",
    "jupytext": "notebooks as text",
    "nbmake": "notebooks as tests",
    "furo": "the look of the site",
    "latex2mathml": "formulas of the site",
    "linkchecker": "links of the site",
    "myst-nb": "pages and notebooks of the site",
    "sphinx": "builds the site",
    "sphinx-copybutton": "copies examples with one click",
    "sphinx-design": "cards of the site",
    "chex": "comparisons of trees in the tests",
    "equinox": "tests that its models work",
    "flatbuffers": "programs in files, of `jax.export`",
    "hypothesis": "tests of properties on drawn inputs",
    "pre-commit": "checks before a commit",
    "pyrefly": "types",
    "pytest": "tests",
    "pytest-cov": "lines that the tests run",
    "pytest-xdist": "tests on several cores",
    "ruff": "style",
    "build": "wheel and source distribution",
    "check-wheel-contents": "what belongs into a wheel",
    "mypy": "types of the examples",
    "pyright": "types of the examples",
    "twine": "what PyPI would refuse",
    "hatchling": "builds the package",
    "hatch-fancy-pypi-readme": "links of the README on PyPI",
}


class Dependency(NamedTuple):
    """One package that pyproject.toml asks for."""

    name: str
    extras: tuple[str, ...]  # "" for what is always installed

    @property
    def licence(self) -> str | None:
        """What the metadata of the installed package state, if it is installed."""
        try:
            return stated(importlib.metadata.metadata(self.name))
        except importlib.metadata.PackageNotFoundError:
            return None


def dependencies() -> list[Dependency]:
    """The direct dependencies, in the order of pyproject.toml."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    groups["build"] = content["build-system"]["requires"]
    extras: dict[str, list[str]] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            name = re.split(r"[\[<>=!~; ]", requirement)[0]
            if name != project["name"]:
                extras.setdefault(name, []).append(group)
    return [Dependency(name, tuple(groups)) for name, groups in extras.items()]


def stated(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence in the metadata: an expression, classifiers, or the first line."""
    field = lambda name: next(iter(metadata.get_all(name) or []), "")
    if expression := field("License-Expression"):
        return expression
    classifiers = metadata.get_all("Classifier") or []
    found = [x.split(" :: ")[-1] for x in classifiers if x.startswith("License ::")]
    found = [x for x in found if x != "OSI Approved"]
    text = field("License").strip().partition("\n")[0]
    return ", ".join(found) or text or UNKNOWN


def rows(page: str) -> list[list[str]]:
    """The rows of the table in a page."""
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(page: str) -> str:
    """The table in Markdown; ``page`` is the one that it was in."""
    known = {row[0].strip("`"): row[-1] for row in rows(page)}
    lines = ["| package | extra | what for | licence |", "|---|---|---|---|"]
    for dependency in dependencies():
        name = dependency.name
        extras = ", ".join(x or "always" for x in dependency.extras)
        licence = dependency.licence or known.get(name, UNKNOWN)
        lines.append(f"| `{name}` | {extras} | {PURPOSES[name]} | {licence} |")
    return "\n".join(lines)


def copyleft() -> list[str]:
    """All installed packages under a licence of the GPL family."""
    found = set()
    for distribution in importlib.metadata.distributions():
        licence = stated(distribution.metadata)
        if re.search(r"GPL|General Public", licence):
            found.add(f"{distribution.metadata['Name']} ({licence})")
    return sorted(found)


def main(arguments: list[str]) -> None:
    """Print the table, or put it into the page."""
    page = PAGE.read_text()
    if arguments == ["--write"]:
        begin, end = "<!-- licences:begin -->\n", "\n<!-- licences:end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        PAGE.write_text(before + begin + table(page) + end + after)
    elif arguments:
        raise SystemExit("usage: python -m tools.licenses [--write]")
    else:
        print(table(page))
        print("\nGPL family, of all installed:", "; ".join(copyleft()) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
