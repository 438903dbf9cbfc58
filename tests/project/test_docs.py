"""The pages run, the public face and the package are whole, the core stays light."""

import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import yoto_jax as yoto
from benchmarks.harness import methods_table
from benchmarks.harness.tables import markdown

ROOT = pathlib.Path(__file__).parent.parent.parent
GUIDES = {page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts}
PAGES = [ROOT / "README.md", *sorted(GUIDES)]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def snippets():
    """Each Python block of the pages, at its line."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: block.start(1)].count("\n")
            yield pytest.param(line * "\n" + block[1], id=f"{page.name}:{line + 1}")


def agree(printed, promised):
    """Whether the line is as promised: decimals to one of the last digit."""
    parts = re.split(r"(\d+\.\d+)", promised)  # Text and decimals in turns.
    text = (re.escape(part).replace(re.escape("..."), ".*") for part in parts[::2])
    found = re.fullmatch(r"(\d+\.\d+)".join(text), printed)
    return found is not None and all(
        abs(float(x) - float(y)) < 1.5 * 0.1 ** len(y.partition(".")[2])
        for x, y in zip(found.groups(), parts[1::2], strict=True)
    )


@pytest.mark.usefixtures("quick_compilation", "any_rank")
@pytest.mark.parametrize("code", list(snippets()))
def test_every_snippet_runs_alone_and_prints_what_it_says(code, capsys):
    if "jax.export" in code:
        pytest.importorskip("flatbuffers")
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    promises = re.findall(r"^ *print\(.*\) +# (.*)$", code, re.MULTILINE)
    for line, promise in zip(
        capsys.readouterr().out.splitlines(), promises, strict=True
    ):
        assert agree(line, promise), f"{line!r} was to be {promise!r}"


def test_what_a_snippet_prints_is_compared():
    assert agree("{'a': 0.79}, 12 of 3", "{'a': 0.80}, 12 of 3")
    assert agree("run/20: is for others; and so on", "...20: is for others; ...")
    for printed in ("{'a': 0.77}, 12 of 3", "{'a': 0.80}, 13 of 3", "{'b': 0.80}"):
        assert not agree(printed, "{'a': 0.80}, 12 of 3")


def test_links_of_the_pages_lead_somewhere():
    for page in (*PAGES, *(ROOT / "benchmarks").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\"]+?)(?: \"[^\"]*\")?\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_source_distribution_holds_what_the_readme_names():
    text = (ROOT / "README.md").read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    named = {link.split("/")[0] for link in links} | {"Makefile", "README.md"}
    assert {"docs", "notebooks", "benchmarks"} < named
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert named <= set(included)
    assert all((ROOT / name).exists() for name in included)


def test_links_of_the_readme_on_pypi_lead_to_the_repository():
    text = (ROOT / "README.md").read_text()
    count = len(re.findall(r"\]\((?!https?:|#)", text))
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.findall(r"\]\((?!https?:|#)", text)
    source = PYPROJECT["project"]["urls"]["Source"]
    pages, files = f"]({source}/blob/main/", source.replace("//", "//raw.", 1)
    files = f"]({files.replace('github.com', 'githubusercontent.com')}/main/"
    assert text.count(pages) + text.count(files) == count
    assert text.count(files) == text.count(".png)")
    assert f"repository-code: {source}\n" in (ROOT / "CITATION.cff").read_text()


PACKAGES = (
    yoto.conditional,
    yoto.monitoring,
    yoto.racing,
    yoto.testing,
    yoto.weightings,
)
NAMES = {package.__name__.split(".")[-1] for package in PACKAGES}
PUBLIC = [(yoto, name) for name in yoto.__all__ if name not in NAMES]
PUBLIC += [(package, name) for package in PACKAGES for name in package.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_names_are_documented(module, name):
    thing = getattr(module, name)
    documentation = inspect.getdoc(thing) or ""
    assert documentation.splitlines()[0].endswith((".", "`."))
    if inspect.isfunction(thing):
        takes = ("Args:",) if inspect.signature(thing).parameters else ()
        for section in (*takes, "Returns:", "Examples:", ">>>"):
            assert section in documentation, f"{name} has no {section}"


@pytest.mark.parametrize("module", [yoto, *PACKAGES])
def test_all_is_what_a_package_shows(module):
    shown = {
        name
        for name in dir(module)
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name))
    }
    assert shown | NAMES == {*module.__all__} | NAMES


def test_the_table_of_weightings_is_that_of_the_registry():
    page = (ROOT / "docs" / "how-to" / "choose.md").read_text()
    block = markdown(methods_table.table(), numbers=False)
    assert f"<!-- methods:begin -->\n{block}\n<!-- methods:end -->" in page
    for name in ("normalize", "log", "smooth", "every", "hold", "skip_outliers"):
        assert re.search(rf"`{name}\b", page)


def test_the_page_of_deviations_has_the_warnings_of_the_docstrings():
    page = (ROOT / "docs" / "understand" / "deviations.md").read_text()
    block = markdown(methods_table.warnings(), numbers=False)
    assert f"<!-- warnings:begin -->\n{block}\n<!-- warnings:end -->" in page
    assert ":func:" not in block
    assert ":math:" not in block


LATE = (
    "conditional",
    "monitoring",
    "checkpoints",
    "racing",
    "testing",
    "weightings._grap",
)


def test_the_core_imports_jax_and_optax_alone_and_the_rest_when_asked_for():
    code = (
        "import sys, optax; before = set(sys.modules); import yoto_jax; "
        "print(*set(sys.modules) - before); "
        "from yoto_jax.weightings import *; from yoto_jax import *; "
        "import pickle, yoto_jax as yoto; assert monitoring is yoto.monitoring; "
        "assert pickle.loads(pickle.dumps(ntk_diagonal)) is ntk_diagonal; "
        "assert yoto.conditional.film and 'upgrad' in dir(yoto.weightings); "
        "print(hasattr(yoto, 'random'), hasattr(yoto.weightings, 'film'))"
    )
    new, absent = run(code).stdout.splitlines()
    # All else is there with Optax: checkify alone would double the time.
    assert {name.split(".")[0] for name in new.split()} == {"yoto_jax"}
    for name in LATE:
        assert f"yoto_jax.{name}" not in new.split()
    assert absent == "False False"


def test_without_flax_the_layers_say_what_to_install():
    code = (
        "import sys, importlib; sys.modules['flax'] = None; import yoto_jax\n"
        "for layer in ('linen', 'nnx'):\n"
        "    try: importlib.import_module(f'yoto_jax.{layer}')\n"
        "    except ImportError as error: print(error)"
    )
    done = run(code)
    assert done.returncode == 0
    assert done.stdout.count("pip install 'yoto_jax[flax]'") == 2


def test_versions_agree():
    assert f"version: {yoto.__version__}\n" in (ROOT / "CITATION.cff").read_text()
