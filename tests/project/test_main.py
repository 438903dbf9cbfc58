"""``python -m yoto_jax`` tells what a report needs, whatever is installed."""

import importlib
import importlib.metadata
import os
import subprocess
import sys

import jax
import jaxlib
import pytest

import yoto_jax
from yoto_jax import _jaxlib


@pytest.fixture
def report(capsys):
    """Runs it: the exit status, and what is printed after each name."""

    def run():
        # Anew, with what a test has put in place.
        program = importlib.reload(importlib.import_module("yoto_jax.__main__"))
        status = program.main()
        lines = capsys.readouterr().out.splitlines()
        return status, {line[:19].rstrip(): line[19:] for line in lines}

    return run


@pytest.fixture
def nothing_tried(monkeypatch):
    monkeypatch.setattr(_jaxlib, "seen_as_wrong", list)


def test_a_jaxlib_that_is_right(report):
    status, facts = report()
    assert status == 0
    assert facts["yoto_jax"] == yoto_jax.__version__
    for package in ("jax", "jaxlib", "optax", "numpy"):
        assert facts[package] == importlib.metadata.version(package)
    assert facts["backend"] == jax.default_backend()
    assert facts["devices"].startswith(f"{jax.device_count()}: ")
    assert facts["known to be wrong"] == "nothing"
    assert facts["wrong when tried"] == "not seen here"


@pytest.mark.usefixtures("nothing_tried")
@pytest.mark.parametrize("version", _jaxlib.MISCOMPILING)
def test_a_jaxlib_that_is_known_to_be_wrong(version, report, monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", version)
    status, facts = report()
    assert status == 1
    means = version in _jaxlib.WRONG_MEANS
    expected = "masked means" if means else "several gradients at once"
    assert facts["known to be wrong"] == expected
    assert any("pip install" in fact for fact in facts.values())


@pytest.mark.parametrize(
    ("probe", "what"),
    [
        ("error_of_means", "masked means"),
        ("error_of_gradients", "several gradients at once"),
    ],
)
@pytest.mark.parametrize("error", [0.3, float("nan")])
def test_what_is_seen_to_be_wrong(probe, what, error, report, monkeypatch):
    for name in ("error_of_means", "error_of_gradients"):
        monkeypatch.setattr(_jaxlib, name, lambda: 1e-7)
    monkeypatch.setattr(_jaxlib, probe, lambda: error)
    status, facts = report()
    assert status == 1
    assert facts["known to be wrong"] == "nothing"
    assert facts["wrong when tried"] == what


@pytest.mark.usefixtures("nothing_tried")
def test_what_is_not_installed(report, monkeypatch):
    known = importlib.metadata.version

    def version(package):
        if package == "flax":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, facts = report()
    assert status == 0
    assert facts["flax"] == "not installed"


def test_no_device_and_no_import_of_what_is_optional():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('yoto_jax', run_name='__main__')\n"
        "except SystemExit as stopped: print('status', stopped.code)\n"
        "print('imported', {'flax', 'orbax', 'equinox'} & set(sys.modules))"
    )
    nowhere = os.environ | {"JAX_PLATFORMS": "nowhere"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere)
    assert "backend            RuntimeError: Unable to init" in done.stdout, done.stderr
    assert "could not be tried: RuntimeError" in done.stdout
    assert "status 0\nimported set()" in done.stdout
