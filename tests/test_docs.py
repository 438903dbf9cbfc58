"""The README runs, the public face is whole, and the core stays light."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import yoto_jax as yoto

ROOT = pathlib.Path(__file__).parent.parent
GUIDES = set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "dependencies.md"}
PAGES = [ROOT / "README.md", *sorted(GUIDES)]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_snippet_of_the_pages_runs(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


def test_links_of_the_pages_lead_somewhere():
    for page in (*PAGES, ROOT / "benchmarks" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


PACKAGES = (yoto.conditional, yoto.monitoring, yoto.weightings)
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


@pytest.mark.parametrize("name", sorted({*yoto.weightings.__all__} - {"ntk_diagonal"}))
def test_every_weighting_is_in_the_contract_and_in_the_table(name):
    page = (ROOT / "docs" / "weightings.md").read_text()
    assert f"`{name}`" in page or f"`{name}(" in page
    contract = (ROOT / "tests" / "test_contract_weightings.py").read_text()
    assert re.search(rf"weightings\.{name}\b", contract)


def test_the_core_imports_jax_and_optax_alone():
    code = (
        "import sys, jax, optax; before = set(sys.modules); import yoto_jax; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(new - {'jax', 'optax'})"
    )
    assert run(code).stdout.strip() == "{'yoto_jax'}"


def test_importing_the_package_imports_no_more_than_it_has_to():
    code = (
        "import sys, optax; before = set(sys.modules); import yoto_jax; "
        "print(*set(sys.modules) - before)"
    )
    new = run(code).stdout.split()
    # All else is there with Optax: checkify alone would double the time.
    assert {name.split(".")[0] for name in new} == {"yoto_jax"}
    for name in ("conditional", "monitoring", "checkpoints", "weightings._grap"):
        assert f"yoto_jax.{name}" not in new


def test_what_is_imported_late_is_there_all_the_same():
    code = (
        "from yoto_jax.weightings import *; from yoto_jax import *; "
        "import pickle, yoto_jax as yoto; assert monitoring is yoto.monitoring; "
        "assert pickle.loads(pickle.dumps(ntk_diagonal)) is ntk_diagonal; "
        "assert yoto.conditional.film and 'upgrad' in dir(yoto.weightings); "
        "print(hasattr(yoto, 'random'), hasattr(yoto.weightings, 'film'))"
    )
    assert run(code).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_without_flax_the_layers_say_what_to_install(layer):
    without = "import sys; sys.modules['flax'] = None; import yoto_jax; "
    assert run(without).returncode == 0
    done = run(without + f"import yoto_jax.{layer}")
    assert done.returncode != 0
    assert "pip install 'yoto_jax[flax]'" in done.stderr


def test_versions_agree():
    assert f"version: {yoto.__version__}\n" in (ROOT / "CITATION.cff").read_text()
