"""What a release says of itself, and the workflows that make it."""

import re
import tomllib
from pathlib import Path

import pytest

import yoto_jax

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_changelog_has_this_version_and_links_to_it():
    text = (ROOT / "CHANGELOG.md").read_text()
    version, source = yoto_jax.__version__, PROJECT["urls"]["Source"]
    (date,) = re.findall(rf"^## \[{re.escape(version)}\] - (\S+)$", text, re.M)
    assert f"date-released: {date}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n[{version}]: {source}/releases/tag/v{version}\n" in text
    assert f"\n[Unreleased]: {source}/compare/v{version}...HEAD\n" in text
    sections = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert sections[:2] == ["Unreleased", version]
    assert set(sections) == set(re.findall(r"^\[(.+?)\]: ", text, re.M))


def test_what_is_promised_is_tested():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    matrix = re.findall(r'"(3\.\d+)"', re.search(r"python: (.*)", text)[1])
    prefix = "Programming Language :: Python :: 3."
    promised = [x for x in PROJECT["classifiers"] if x.startswith(prefix)]
    assert {x.split(" :: ")[-1] for x in promised} <= set(matrix)
    assert PROJECT["requires-python"] == f">={matrix[0]}"
    oldest = re.search(r"constraints: (.*)", text)[1].split()
    lowest = [x.split(",")[0].replace(">=", "==") for x in PROJECT["dependencies"]]
    assert set(oldest) == {x for x in lowest if not x.startswith("numpy")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_thin_and_may_do_little(path):
    text = path.read_text()
    assert "\npermissions:\n  contents: read\n" in text
    assert len(re.findall(r"^ +- run: make \w+$", text, re.M)) == 1
    used = re.findall(r"uses: (.*)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", action)
    kept = re.findall(r"actions/checkout@.*\n +with:\n +persist-cred.*: false\n", text)
    assert len(kept) == text.count("actions/checkout@") == 1
    writes = re.findall(r"(\S+): write", text)
    assert writes == (["id-token"] if path.stem == "publish" else [])
