"""Nothing that is read from a file is ever run."""

import ast
import importlib.metadata
import pathlib
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness.results import read_json
from benchmarks.harness.runs import Runs
from tools import licenses

ROOT = pathlib.Path(__file__).parent.parent.parent


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def payload(tmp_path):
    """An object whose pickle does something, and what tells that it did."""
    made = tmp_path / "made"
    payload = Payload(made)
    pickle.loads(pickle.dumps(payload)).close()
    assert made.exists(), "the test itself works"
    made.unlink()
    yield payload
    assert not made.exists(), "a file that was read was run"


# Reads that are under way when another fails end when nobody waits for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pickles_in_place_of_a_checkpoint(payload, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from yoto_jax.checkpoints import CheckpointError, Checkpoints

    state = {"w": jnp.arange(8.0), "key": jax.random.key(1)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, data={"x": 1})

    def refused():
        try:
            restored = Checkpoints(tmp_path / "run").restore(state)
        except CheckpointError as error:
            return str(error)
        np.testing.assert_array_equal(restored.state["w"], state["w"])
        assert restored.data == {"x": 1}
        return None

    files = [file for file in (tmp_path / "run" / "1").rglob("*") if file.is_file()]
    said = {}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(payload))
        said[str(file.relative_to(tmp_path / "run" / "1"))] = refused()
        file.write_bytes(content)
    assert refused() is None
    assert "record/metadata is damaged" in str(said["record/metadata"])
    assert "arrays cannot be read" in str(said["arrays/manifest.ocdbt"])
    for file in files:
        file.write_bytes(pickle.dumps(payload))
    assert "record/metadata is damaged" in str(refused())


def runs(folder, **state):
    """Runs of a benchmark, as far as reading their files goes."""
    task = types.SimpleNamespace(name="task", settings={"seeds": 1}, lanes=1)
    return Runs(task, {}, folder, planned=1, **state)


def as_pickle(path, payload):
    path.write_bytes(pickle.dumps(payload))


def as_array_of_objects(path, payload):
    array = np.array([payload, payload], dtype=object)
    names = ("header", "group", "parts", "seconds", "leaf 0")
    with path.open("wb") as file:
        np.savez(file, **dict.fromkeys(names, array))


@pytest.mark.parametrize("write", [as_pickle, as_array_of_objects])
def test_pickles_in_place_of_a_run_under_way(write, payload, tmp_path, capsys):
    unfinished = runs(tmp_path, resume=False)
    write(unfinished.partial, payload)
    fresh = {"w": jnp.zeros(2)}
    assert unfinished._saved("group", fresh) == (fresh, [], (0.0, 0.0))
    assert "cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("first_line", [True, False])
def test_pickles_in_place_of_finished_runs(first_line, payload, tmp_path):
    finished = runs(tmp_path, resume=False)
    head = b"" if first_line else finished.path.read_bytes()
    finished.path.write_bytes(head + pickle.dumps(payload) + b"\n")
    message = "runs with other settings" if first_line else "decode|Expecting value"
    with pytest.raises(ValueError, match=message):
        runs(tmp_path, resume=True)


def test_pickles_in_place_of_results(payload, tmp_path):
    as_pickle(tmp_path / "results.json", payload)
    with pytest.raises(ValueError, match="decode"):
        read_json(tmp_path / "results.json")


# What is not in the sources cannot be misused.

MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "yaml.load", "torch.load", "pd.read_pickle"}
SWITCHES = {"allow_pickle", "shell"}


def dangers(source):
    """What in a source could run what it reads, with its line."""
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import):
            found = [x.name.split(".")[0] for x in node.names]
            found = [x for x in found if x in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [x for x in [str(node.module).split(".")[0]] if x in MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found = [called] if called in BUILTINS | CALLS else []
            found += [
                f"{switch.arg}={ast.unparse(switch.value)}"
                for switch in node.keywords
                if switch.arg in SWITCHES
                and not (
                    isinstance(switch.value, ast.Constant)
                    and switch.value.value is False
                )
            ]
        yield from ((node.lineno, what) for what in found)


def test_the_check_of_sources_finds_what_it_looks_for():
    source = """
import pickle, json
from marshal import loads
import yaml, os, re, numpy as np, subprocess
eval("1"); exec("1"); compile("1", "", "exec"); __import__("os")
os.system("ls"); yaml.load("x"); np.load("x", allow_pickle=True)
subprocess.run("ls", shell=True); np.load("x", allow_pickle=choice)
re.compile("1"); jitted.compile(); np.load("x", allow_pickle=False); _compile(1)
model.eval(); yaml.safe_load("x"); subprocess.run(["ls"])
"""
    found = sorted({line for line, _ in dangers(source)})
    assert found == [2, 3, 5, 6, 7]
    assert len([*dangers(source)]) == 11


@pytest.mark.parametrize("package", ["yoto_jax", "benchmarks"])
def test_no_source_runs_what_it_reads(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert len(sources) > 20
    found = [
        f"{source.relative_to(ROOT)}:{line}: {what}"
        for source in sources
        for line, what in dangers(source.read_text())
    ]
    assert not found


# What is depended on.


def test_every_dependency_is_listed_with_its_licence():
    listed = {
        row[0].strip("`"): row for row in licenses.rows(licenses.PAGE.read_text())
    }
    needed = {dependency.name: dependency for dependency in licenses.dependencies()}
    assert listed.keys() == needed.keys() == licenses.PURPOSES.keys()
    assert needed["jax"].extras == needed["optax"].extras == ("",)
    for name, dependency in needed.items():
        extras = ", ".join(extra or "always" for extra in dependency.extras)
        assert listed[name][1] == extras
        assert listed[name][-1] not in ("", licenses.UNKNOWN)
    assert "LGPL" in listed["moocore"][-1]


def test_licences_are_read_from_metadata():
    metadata = importlib.metadata.metadata("jax")
    assert licenses.stated(metadata) == "Apache-2.0"
    assert licenses.Dependency("no-such-package", ("",)).licence is None
