"""The reference has every public name, and the site every page."""

import importlib
import json
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
NOTEBOOKS = sorted((DOCS.parent / "notebooks").glob("*.ipynb"))
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


def draws(cell):
    """Whether a cell of a notebook makes a figure."""
    source = "".join(cell["source"])
    return cell["cell_type"] == "code" and bool(
        re.search(r"plt\.(figure|subplots)\(|\.plot_\w+\(", source)
    )


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


def test_every_page_is_reached_by_plain_links():
    """On a page of the repository nothing else leads from one to another."""
    seen, left = set(), [DOCS.parent / "README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)", page.read_text())
        left += {(page.parent / x).resolve() for x in links} - seen - {*left}
    pages = {x.resolve() for x in DOCS.rglob("*.md") if "_build" not in x.parts}
    assert pages <= seen


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_has_a_description_and_a_caption(path):
    cells = json.loads(path.read_text())["cells"]
    shown = [cell["metadata"].get("mystnb", {}) for cell in cells if draws(cell)]
    assert shown
    for settings in shown:
        assert settings["image"]["alt"]
        assert settings["figure"]["caption"]
