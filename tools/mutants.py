"""Do the tests find faults? They are put into copies of the library, one in each.

``python -m tools.mutants`` copies the tree, changes one place of the library, and runs
the tests of the room that the file is in (those of ``make test``) until one fails. A
fault that no test finds is printed, and the exit status is then 1.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
TIERS = {"not slow and not compiled": "1", "compiled and not slow": ""}
"""What `make test` runs, and whether XLA compiles quickly then."""


class Mutant(NamedTuple):
    """A fault: in ``file`` of the library, ``right`` becomes ``wrong``."""

    file: str
    right: str
    wrong: str
    tests: str  # folders and files of tests/, in the order in which they are run


MUTANTS = (
    # Weights.
    Mutant(
        "_numerics.py", "stack([zero, *unstack", "stack([zero + 1, *unstack", "core"
    ),
    Mutant(
        "weightings/_mgda.py",
        "return weights / jnp.sum(weights), inner",
        "return weights, inner",
        "weightings/test_gramian.py",
    ),
    Mutant(
        "weightings/_gradnorm.py",
        "spec.mean(weighted) * rates**alpha",
        "spec.mean(weighted) * rates",
        "weightings/test_losses.py",
    ),
    Mutant(
        "weightings/_cagrad.py",
        "* combined_norm(g, mean)",
        "* combined_norm(gramian, mean)",
        "weightings/test_gramian.py",
    ),
    Mutant(
        "_optimizers.py",
        "lambda x: not is_hyperparameter(x) and choice",
        "lambda x: choice",
        "core/test_optimizers.py",
    ),
    # Signs.
    Mutant(
        "_hyperparameter_decay.py",
        "upcast(update.learned) + rho * slope",
        "upcast(update.learned) - rho * slope",
        "core/test_hyperparameter_decay.py",
    ),
    Mutant(
        "weightings/_famo.py",
        "improvement = inner.log_gaps - gaps",
        "improvement = gaps - inner.log_gaps",
        "weightings/test_losses.py",
    ),
    Mutant(
        "weightings/_pcgrad.py",
        "HIGHEST), 0)",
        "HIGHEST), -9)",
        "weightings/test_gramian.py",
    ),
    Mutant(
        "weightings/_softmax_alignment.py",
        "return -dot(share",
        "return dot(share",
        "weightings/test_softmax_alignment.py",
    ),
    Mutant(
        "_by_hypergradient.py",
        "state.log_scale - rate * cosine",
        "state.log_scale + rate * cosine",
        "core/test_by_hypergradient.py",
    ),
    Mutant(
        "_choose.py",
        "return hard + (soft - lax.stop_gradient(soft))",
        "return hard + (lax.stop_gradient(soft) - soft)",
        "core/test_choices.py",
    ),
    # Axes.
    Mutant(
        "gradients/_statistics.py",
        "gramian.at[position, :].set(row).at[:, position].set(row)",
        "gramian.at[position, :].set(row)",
        "engine weightings/test_grap.py",
    ),
    Mutant(
        "gradients/_devices.py",
        "axis for axis in axes if axis not in own",
        "axis for axis in axes",
        "devices",
    ),
    Mutant(
        "gradients/_statistics.py",
        "x = lax.psum(x, axes) if axes else x",
        "x = x",
        "devices",
    ),
    Mutant(
        "gradients/_statistics.py",
        "[axes]))\n        terms.append(lax.psum(local, axes) if axes else local)",
        "[axes]))\n        terms.append(local)",
        "engine/test_per_loss.py",
    ),
    Mutant(
        "_masked_mean.py",
        "jnp.sum(mask, dtype=x.dtype) * entries",
        "jnp.sum(mask, dtype=x.dtype)",
        "engine/test_present.py",
    ),
    # Dtypes.
    Mutant(
        "gradients/_rows.py",
        "return total.astype(dtype)",
        "return total",
        "engine contract",
    ),
    Mutant(
        "gradients/_statistics.py",
        "preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)",
        "preferred_element_type=x.dtype",
        "engine",
    ),
    Mutant(
        "_composite_loss.py", "jnp.asarray(leaf, dtype)", "jnp.asarray(leaf)", "core"
    ),
    # Masks.
    Mutant(
        "_make_weighting.py",
        "return spec.of_present(new, old) if one_row_each else new",
        "return new",
        "contract engine/test_present.py",
    ),
    Mutant(
        "gradients/_output.py",
        "* axis_size(axes) / jnp.maximum(number, 1)",
        "/ jnp.maximum(number, 1)",
        "engine/test_present.py",
    ),
    Mutant(
        "_outliers.py",
        "jnp.abs(streaks) > self.patience",
        "jnp.abs(streaks) >= self.patience",
        "core/test_skip_outliers.py",
    ),
    # Compiled at the size of real models.
    Mutant(
        "gradients/_rows.py",
        "return jax.vmap(pull)(basis)",
        "return jax.vmap(pull)(jax.tree.map(lambda x: x[::-1], basis))",
        "engine/test_real_sizes.py",
    ),
)


def is_found(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails, and what pytest says last."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        left_out = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "results")
        shutil.copytree(ROOT, copy, ignore=left_out)
        path = copy / "yoto_jax" / mutant.file
        text = path.read_text()
        if text.count(mutant.right) != 1:
            raise ValueError(f"{mutant.file} must hold {mutant.right!r} once.")
        path.write_text(text.replace(mutant.right, mutant.wrong))
        tests = [f"tests/{name}" for name in mutant.tests.split()]
        said = ""
        for marks, quick in TIERS.items():
            done = subprocess.run(
                [*PYTEST, "-m", marks, *tests],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy), "YOTO_JAX_QUICK_XLA": quick},
                capture_output=True,
                text=True,
                check=False,
            )
            lines = done.stdout.splitlines()
            if failed := [line for line in lines if line.startswith("FAILED")]:
                return True, failed[0]
            said = lines[-1] if lines else done.stderr[-200:]
    return False, said


def main() -> None:
    """Run the tests with every fault, and say which were found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", metavar="N")
    options = parser.parse_args()
    numbers = options.only or range(1, len(MUTANTS) + 1)
    chosen = [MUTANTS[number - 1] for number in numbers]
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        results = pool.map(is_found, chosen)
        for number, mutant, (found, said) in zip(numbers, chosen, results, strict=True):
            missed += not found
            state = "found" if found else "NOT FOUND"
            line = f"{number:2} {state}  {mutant.file}: {mutant.wrong}\n   {said}"
            print(line, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were found.")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
