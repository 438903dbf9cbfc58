"""What a release says of itself."""

import re
import tomllib
from pathlib import Path

import yoto_jax

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
