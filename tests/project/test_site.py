"""The reference has every public name, and the site every page."""

import importlib
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"
ROOMS = (
    "",
    ".weightings",
    ".racing",
    ".conditional",
    ".monitoring",
    ".checkpoints",
    ".testing",
)
FLAX = {
    "yoto_jax.linen": {"CompositeLoss", "FiLM", "Gate"},
    "yoto_jax.nnx": {
        "CompositeLoss",
        "FiLM",
        "Gate",
        "unwrap_loss_logits",
        "value_and_grad",
    },
}


def documented():
    """Names that the pages of the reference have a section for, by module."""
    found = {}
    for page in (DOCS / "reference").glob("*.md"):
        module = None
        for line in page.read_text().splitlines():
            if match := re.match(r"\.\. (?:current)?module:: (\S+)", line):
                module = match[1]
            elif match := re.match(r"\.\. auto(?:class|function):: (\S+)", line):
                found.setdefault(module, []).append(match[1])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name(room):
    module = importlib.import_module(f"yoto_jax{room}")
    rooms = {name.removeprefix(".") for name in ROOMS}
    names = set(module.__all__) - (rooms if room == "" else set())
    # One class has two public names.
    names -= {"SkipOutliersState"} if room == ".weightings" else set()
    assert sorted(documented()[module.__name__]) == sorted(names)


@pytest.mark.parametrize("module", FLAX)
def test_the_reference_has_every_layer(module):
    imported = importlib.import_module(module)
    assert all(hasattr(imported, name) for name in FLAX[module])
    assert set(documented()[module]) == FLAX[module]


def test_names_of_the_tables_are_those_of_the_sections():
    for page in (DOCS / "reference").glob("*.md"):
        text = page.read_text()
        sections = re.findall(r"^\.\. auto(?:class|function):: (\S+)", text, re.M)
        assert re.findall(r"^   ([A-Za-z_]\w*)$", text, re.M) == sections


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.S):
            lines = [x for x in block.splitlines() if x and not x.startswith(":")]
            listed |= {(page.parent / f"{x}.md").resolve() for x in lines}
    pages = {x.resolve() for x in DOCS.rglob("*.md") if "_build" not in x.parts}
    assert pages - listed == {(DOCS / "index.md").resolve()}
