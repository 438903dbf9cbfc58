"""How the site is built: `make docs`.

The source folder is that of the repository, so that links between README, guides,
notebooks and reports are the same ones here and on a page of the repository.
"""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

import names  # noqa: E402

import yoto_jax  # noqa: E402

project = "yoto_jax"
author = "The yoto_jax authors"
copyright = author
version = release = yoto_jax.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "benchmarks/FINDINGS.md",
    "benchmarks/results/README.md",
    "benchmarks/tasks/*/REPORT.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
exclude_patterns = ["docs/_*", ".*", "**/.*", "out", "dist", "tests", "yoto_jax"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "captions",
    "mathml",
    "names",
]

# Pages: MyST Markdown, as the repository shows it too.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

# Notebooks: run once while they do not change; one that fails fails the site.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

# Reference: what the docstrings say.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
html_math_renderer = "mathml"

# Other projects' names: inventories are stored, for builds without a network.
intersphinx_mapping = {
    name: (url, names.inventory(name, HERE / "_inventories", HERE / "_build"))
    for name, url in {
        "jax": "https://docs.jax.dev/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "flax": "https://flax.readthedocs.io/en/latest/",
    }.items()
}

# Every name that a docstring links to is there; types of signatures may be private.
nitpicky = True
nitpick_ignore_regex = [("py:class", r".*"), ("py:obj", r".*")]

html_theme = "furo"
html_title = "yoto_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/yoto-jax/yoto_jax",
    "source_branch": "main",
    "source_directory": "",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def setup(app: Sphinx) -> None:
    """Leave out what Python says of the fields of a named tuple."""
    app.connect("autodoc-skip-member", _is_bare_field)


def _is_bare_field(
    app: Sphinx, what: str, name: str, obj: object, *rest: object
) -> Any:
    bare = (obj.__doc__ or "").startswith("Alias for field number")
    return True if bare else None
