"""Versions of jaxlib whose compiler for CPUs is wrong.

``pyproject.toml`` excludes them; what is wrong is shown by
``tests/engine/test_real_sizes.py``.
"""

import warnings

import jax
import jaxlib

WRONG_GRADIENTS = ("0.10.2",)
"""These compile ``vmap`` of a pullback wrongly, and silently.

Rows of ``jit(vmap(pullback))`` through a product with a statistic of a row, such as an
RMS norm, are wrong there from moderate sizes on.
"""

WRONG_MEANS = ("0.10.0", "0.10.1")
"""These compile a masked mean over reshaped axes wrongly, and silently.

``jnp.mean(x.reshape(n, -1), axis=1, where=(x > 0).reshape(n, -1))`` divides by too
small a count there from moderate sizes on.
"""

MISCOMPILING = WRONG_MEANS + WRONG_GRADIENTS

REMEDY = "Install another version: pip install 'jax!=0.10.*' 'jaxlib!=0.10.*'."


def check_jaxlib() -> None:
    """Raise where several gradients taken at once would be wrong."""
    if _runs(WRONG_GRADIENTS):
        raise RuntimeError(
            f"jaxlib {jaxlib.__version__} computes wrong gradients on a CPU where "
            f"several are taken at once, as per-loss gradients are. {REMEDY}"
        )


def warn_of_jaxlib() -> None:
    """Warn where masked means of the user, who writes the losses, would be wrong."""
    if _runs(WRONG_MEANS):
        warnings.warn(
            f"jaxlib {jaxlib.__version__} computes wrong means on a CPU where a mask "
            f"and reshaped arrays meet, so losses may be wrong. {REMEDY}",
            RuntimeWarning,
            stacklevel=3,
        )


def _runs(versions: tuple[str, ...]) -> bool:
    """Whether one of these versions compiles, and for a CPU."""
    return jaxlib.__version__ in versions and jax.default_backend() == "cpu"
