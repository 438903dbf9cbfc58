"""What `make dist` looks at; that itself takes minutes, and is run before a release."""

import json
import subprocess
import zipfile

import pytest

from tools import dist, examples

ROOT = dist.ROOT


def test_the_first_example_of_the_readme_is_the_quickstart():
    line, code = next(examples.blocks(ROOT / "README.md"))
    assert (ROOT / "README.md").read_text().splitlines()[line - 1] in code
    assert "yoto.composite_loss(" in code
    assert "flax" not in code


def test_examples_are_written_to_a_file_each(tmp_path):
    count = examples.write(tmp_path)
    files = sorted(tmp_path.glob("*.py"))
    assert len(files) == count + 1 > 40
    for file in files:
        compile(file.read_text(), file.name, "exec")


def found(*lines):
    return [examples.Finding("control.py", line, "wrong") for line in lines]


def test_errors_of_others_are_told_from_ours():
    other = examples.Finding("a.py", 3, "tree_util.PyTreeDef? has no attribute")
    ours = examples.Finding("a.py", 4, 'Unexpected keyword "primry"')
    control = found(*examples.WRONG)
    assert examples.sort_out([other, *control, ours]) == ([other], [ours])


@pytest.mark.parametrize("lines", [(), (2,), (2, 3)])
def test_a_checker_that_sees_nothing_is_not_believed(lines):
    with pytest.raises(SystemExit, match="on purpose"):
        examples.sort_out(found(*lines))


def test_the_source_distribution_is_to_have_all_that_is_under_version_control():
    tracked = ["tests/a.py", "docs/a.md", "notebooks/a.ipynb", "benchmarks/a.py"]
    tracked += ["yoto_jax/a.py", "LICENSE", "README.md", "pyproject.toml"]
    assert dist.included([*tracked, ".pre-commit-config.yaml"]) == set(tracked)


def test_notebooks_that_were_run_are_found():
    cell = {"cell_type": "code", "outputs": [], "execution_count": None}
    text = {"cell_type": "markdown"}
    notebook = lambda *cells: json.dumps({"cells": cells})
    assert not dist.executed(notebook(cell, text))
    assert dist.executed(notebook(text, cell | {"execution_count": 1}))
    assert dist.executed(notebook(cell | {"outputs": [{"text": "1"}]}))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert not dist.executed(path.read_text()), path.name


def test_files_of_a_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/b.py", "1")
    assert dist.files_of(tmp_path / "a.whl") == {"a/b.py": b"1"}


def test_commands_find_no_repository_and_stop_what_fails(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert dist.run("sh", "-c", "echo =$PYTHONPATH=") == "==\n"
    assert dist.run("sh", "-c", "exit 3", status=3) == ""
    with pytest.raises(SystemExit, match=r"(?s)echo why.*why\n.*status 3"):
        dist.run("sh", "-c", "echo why; exit 3")


def test_a_distribution_with_a_file_too_many_is_refused(tmp_path, monkeypatch):
    tracked = "README.md\nyoto_jax/a.py"
    for name in ("README.md", "yoto_jax/a.py", "yoto_jax/data.npz", "PKG-INFO"):
        path = tmp_path / "yoto_jax-0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = ["tar", "czf", tmp_path / "a.tar.gz", "-C", tmp_path, "yoto_jax-0"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(dist, "built", lambda: (tmp_path / "a.tar.gz", None))
    monkeypatch.setattr(dist, "run", lambda *command: tracked)
    with pytest.raises(SystemExit, match=r"not under version.*data\.npz'\]"):
        dist.check_sdist(tmp_path / "first")
    tracked += "\nyoto_jax/data.npz\nyoto_jax/b.py"
    with pytest.raises(SystemExit, match=r"missing.*b\.py'\]"):
        dist.check_sdist(tmp_path / "second")
