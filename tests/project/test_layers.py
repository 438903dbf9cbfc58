"""Imports go one way: from what is weighed to those who weigh."""

import ast
from pathlib import Path

import pytest

import yoto_jax

ROOT = Path(yoto_jax.__file__).parent
LAYERS = (
    ("_jaxlib", "_serialization", "_digests"),
    ("_checks", "_losses", "_numerics", "_varying"),
    ("_params", "_masked_mean", "_group_advantages", "_loss_logits", "_solvers"),
    ("_choice_logits",),
    (
        "_composite_loss",
        "_hyperparameter_decay",
        "_regularizer_range",
        "_unwrap_loss_logits",
        "_choose",
    ),
    ("_choice_decay",),
    ("_optimizers", "_by_hypergradient"),
    ("_weighting", "_loss_spec", "_make_weighting", "_outliers"),
    ("gradients", "_skip_outliers"),
    ("weightings",),
    ("conditional", "monitoring", "checkpoints", "racing", "testing"),
    ("linen", "nnx"),
    ("__main__",),
)
"""From the bottom to the top: a room imports from its own layer and from lower ones."""
FILES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
)


def layer(room):
    (number,) = (n for n, rooms in enumerate(LAYERS) if room in rooms)
    return number


def imported(path):
    """The modules and names of this package that a file imports."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "yoto_jax"
        ):
            for alias in node.names:
                yield node.module.split(".")[1:], alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("yoto_jax."), alias.name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    own = layer(path.parts[0].removesuffix(".py"))
    for module, name in imported(path):
        assert layer((*module, name)[0]) <= own, (module, name)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_imports_what_another_keeps_to_itself(path):
    hidden = [
        (module, name)
        for module, name in imported(path)
        if name.startswith("_") and not (ROOT / Path(*module) / f"{name}.py").exists()
    ]
    assert hidden == []


def test_every_room_has_a_layer():
    rooms = {path.parts[0].removesuffix(".py") for path in FILES}
    assert rooms == {room for rooms in LAYERS for room in rooms}


def test_no_two_files_import_each_other():
    needs = {
        ".".join(path.with_suffix("").parts): {
            ".".join(module) for module, _ in imported(path)
        }
        | {".".join((*module, name)) for module, name in imported(path)}
        for path in FILES
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, [*path, module]
        if module in needs and module not in done:
            for other in needs[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in needs:
        visit(module, [])
