"""Prints what a report of a fault needs: ``python -m yoto_jax``.

The exit status is 1 if this jaxlib computes wrong results.
"""

import importlib.metadata
import platform
import sys
import traceback
from collections.abc import Iterator

import jax

import yoto_jax
from yoto_jax._jaxlib import REMEDY, known_as_wrong, seen_as_wrong

PACKAGES = ("jax", "jaxlib", "optax", "numpy")
OPTIONAL = ("flax", "orbax-checkpoint", "equinox")


def main() -> int:
    """Prints one fact a line, and returns the exit status."""
    facts = [*versions(), *devices()]
    known, (tried, seen) = known_as_wrong(), try_jaxlib()
    facts.append(("known to be wrong", ", ".join(known) or "nothing"))
    facts.append(("wrong when tried", tried))
    for name, fact in facts:
        print(f"{name:<19}{fact}")
    if known or seen:
        print(f"This jaxlib computes wrong results. {REMEDY}")
    return int(bool(known or seen))


def versions() -> Iterator[tuple[str, str]]:
    """Read from metadata: what is installed is not imported."""
    yield "yoto_jax", yoto_jax.__version__
    yield "Python", platform.python_version()
    yield "platform", platform.platform()
    for package in (*PACKAGES, *OPTIONAL):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def devices() -> Iterator[tuple[str, str]]:
    """The devices that JAX finds, or why it finds none."""
    try:
        found = jax.devices()
        yield "backend", jax.default_backend()
        yield "devices", f"{len(found)}: {found[0].device_kind}"
    except Exception as error:
        yield "backend", first_line(error)


def try_jaxlib() -> tuple[str, list[str]]:
    """What is said of a try, and what is wrong."""
    try:
        wrong = seen_as_wrong()
    except Exception as error:
        return f"could not be tried: {first_line(error)}", []
    return ", ".join(wrong) or "not seen here", wrong


def first_line(error: Exception) -> str:
    """The type of an error, and the first line of what it says."""
    return "".join(traceback.format_exception_only(error)).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
