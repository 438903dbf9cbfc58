"""Versions of jaxlib that compute wrong gradients."""

import jax
import jaxlib

MISCOMPILING = ("0.10.2",)
"""On a CPU these compile ``vmap`` of a pullback wrongly, and silently.

Rows of ``jit(vmap(pullback))`` through a product with a statistic of a row, such as an
RMS norm, are wrong there from moderate sizes on. ``pyproject.toml`` excludes them.
"""


def check_jaxlib() -> None:
    """Raise where several gradients taken at once would be wrong."""
    if jaxlib.__version__ in MISCOMPILING and jax.default_backend() == "cpu":
        raise RuntimeError(
            f"jaxlib {jaxlib.__version__} computes wrong gradients on a CPU where "
            "several are taken at once, as per-loss gradients are. Install another "
            "version: pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'."
        )
