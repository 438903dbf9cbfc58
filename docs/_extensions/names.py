"""Names in code link to where they are explained: ours here, those of JAX elsewhere.

Inventories of other projects are stored as text, with the names that the pages use:
a build needs no network.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext import intersphinx
from sphinx.transforms import SphinxTransform

from yoto_jax import weightings

SHORT = {
    "yoto": "yoto_jax",
    "jnp": "jax.numpy",
    "nnx": "flax.nnx",
    "racing": "yoto_jax.racing",
    "conditional": "yoto_jax.conditional",
    "monitoring": "yoto_jax.monitoring",
}
"""Modules as programs import them."""

NAME = re.compile(r"((?:yoto|yoto_jax|jax|jnp|optax|nnx|flax|racing|conditional|"
                  r"monitoring)(?:\.\w+)+)(\(.*\))?$")  # fmt: skip
PRIVATE = {
    "jax.jaxlib._jax.Array": "jax.Array",
    "flax.linen.module.Module": "flax.linen.Module",
}
"""Public names of types that say where they were defined."""


METHODS = {*weightings.methods(), "normalize", "smooth", "every"}
"""Weightings that pages call by their name alone."""


def inventory(project: str, folder: Path, target: Path) -> str:
    """An inventory in the form that Sphinx reads, made of ``folder/project.txt``."""
    lines = (folder / f"{project}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{project}.inv"
    path.write_bytes(head.encode() + zlib.compress(lines))
    return str(path)


class Names(SphinxTransform):
    """Makes references of names in inline code."""

    default_priority = 210

    def apply(self, **kwargs: Any) -> None:
        """Change the tree of one page."""
        for literal in list(self.document.findall(nodes.literal)):
            target = _target(literal.astext())
            linked = isinstance(literal.parent, nodes.reference | addnodes.pending_xref)
            if target and not linked:
                reference = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=target, refwarn=False
                )
                literal.replace_self(reference)
                reference += literal


def _target(code: str) -> str | None:
    """The full name of what a piece of code names, if it does."""
    if (method := code.partition("(")[0]) in METHODS:
        return f"yoto_jax.weightings.{method}"
    if found := NAME.match(code):
        top, _, rest = found[1].partition(".")
        return f"{SHORT.get(top, top)}.{rest}"
    return None


def _public(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: Any
) -> nodes.Node | None:
    """References of signatures that name a type by its private module."""
    name = node.get("reftarget", "")
    public = PRIVATE.get(name, re.sub(r"^optax\._src\.base\.", "optax.", name))
    if public == name:
        return None
    node["reftarget"] = public
    return intersphinx.missing_reference(app, env, node, shown)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform and the lookup."""
    app.add_transform(Names)
    app.connect("missing-reference", _public, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
