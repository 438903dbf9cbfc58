"""The notebooks run, in a quick form and in this process: no kernel has to start.

What the quick form is, a cell says in its metadata: ``quick`` holds replacements of its
text, and a cell with the tag ``full`` is left out, since its assertions are about a
whole training. ``make test-all`` runs the notebooks as they are, in kernels.
"""

import json
import pathlib

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")


def quick_form(path):
    """Number and text of the code cells."""
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        metadata = cell["metadata"]
        if cell["cell_type"] != "code" or "full" in metadata.get("tags", []):
            continue
        text = "".join(cell["source"])
        for old, new in metadata.get("quick", {}).items():
            assert text.count(old) == 1, (number, old)
            text = text.replace(old, new)
        yield number, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_its_quick_form(path, monkeypatch):
    if path.stem == "08_scaling" and jax.device_count() < 8:
        pytest.skip("needs eight (virtual) devices")
    monkeypatch.setattr(plt, "show", lambda: None)
    namespace = {"__name__": "__main__"}
    for number, text in quick_form(path):
        exec(compile(text, f"{path.name}, cell {number}", "exec"), namespace)
    plt.close("all")
