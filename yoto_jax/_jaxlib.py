"""Versions of jaxlib whose compiler for CPUs is wrong.

``pyproject.toml`` excludes them; what is wrong is shown by
``tests/engine/test_real_sizes.py``, and in a second by ``python -m yoto_jax``.
"""

import warnings

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

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


TOLERANCE = 0.05
"""Results that are wrong are off by more, and none that is rounded."""


def known_as_wrong() -> list[str]:
    """What this version computes wrongly on a CPU, as far as is known."""
    known = {"masked means": WRONG_MEANS, "several gradients at once": WRONG_GRADIENTS}
    return [what for what, versions in known.items() if jaxlib.__version__ in versions]


def seen_as_wrong() -> list[str]:
    """What is computed wrongly here: compiles small programs, for a second or two."""
    errors = {
        "masked means": error_of_means(),
        "several gradients at once": error_of_gradients(),
    }
    return [what for what, error in errors.items() if not error < TOLERANCE]


def error_of_means() -> float:
    """Of means over the part of each row that is above a bound, to those of NumPy."""
    x = np.random.default_rng(0).uniform(1.0, 8.0, (256, 11, 16)).astype(np.float32)

    @jax.jit
    def means(x: jax.Array) -> jax.Array:
        rows = x.reshape(len(x), -1)
        return jnp.mean(rows, axis=1, where=(x > 2.0).reshape(len(x), -1))

    rows = x.reshape(len(x), -1)
    expected = np.mean(rows, axis=1, where=rows > 2.0, dtype=np.float64)
    return _distance(means(jnp.asarray(x)), expected)


def error_of_gradients() -> float:
    """Of four pullbacks at once through the RMS norm of rows, to its derivative."""
    draw = np.random.default_rng(0).standard_normal
    x = draw((2048, 16), np.float32)
    cotangents = draw((4, 2048, 16), np.float32)

    @jax.jit
    def pulled_back(x: jax.Array, cotangents: jax.Array) -> jax.Array:
        norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True))
        _, pullback = jax.vjp(norm, x)
        return jax.vmap(pullback)(cotangents)[0]

    size = np.sqrt(np.mean(x**2, -1, keepdims=True))
    z = x / size
    expected = (cotangents - z * np.mean(z * cotangents, -1, keepdims=True)) / size
    return _distance(pulled_back(jnp.asarray(x), jnp.asarray(cotangents)), expected)


def _distance(got: jax.Array, expected: jax.typing.ArrayLike) -> float:
    """Relative to ``expected``; NaN if there is one."""
    error = np.linalg.norm(np.asarray(got) - np.asarray(expected))
    return float(error / np.linalg.norm(np.asarray(expected)))
