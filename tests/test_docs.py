"""The README runs, the public face is whole, and the core stays light."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import yoto_jax as yoto

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_snippet_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", yoto.__all__)
def test_public_names_are_documented(name):
    thing = getattr(yoto, name)
    documentation = inspect.getdoc(thing) or ""
    assert documentation.splitlines()[0].endswith((".", "`."))
    if inspect.isfunction(thing):
        for section in ("Args:", "Returns:", "Examples:", ">>>"):
            assert section in documentation, f"{name} has no {section}"


def test_all_is_what_the_package_shows():
    shown = {
        name
        for name, thing in vars(yoto).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert shown == set(yoto.__all__)


def test_the_core_imports_jax_and_optax_alone():
    code = (
        "import sys, jax, optax; before = set(sys.modules); import yoto_jax; "
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    assert run(code).stdout.strip() == "{'yoto_jax'}"


@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_without_flax_the_layers_say_what_to_install(layer):
    without = "import sys; sys.modules['flax'] = None; import yoto_jax; "
    assert run(without).returncode == 0
    done = run(without + f"import yoto_jax.{layer}")
    assert done.returncode != 0
    assert "pip install 'yoto_jax[flax]'" in done.stderr


def test_versions_agree():
    assert f"version: {yoto.__version__}\n" in (ROOT / "CITATION.cff").read_text()
