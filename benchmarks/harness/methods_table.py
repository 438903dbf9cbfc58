"""Tables of all weightings in the documentation, from registry and docstrings."""

import inspect
import re

import yoto_jax as yoto
from benchmarks.harness.tables import Table

STATISTICS = {
    "losses": "losses",
    "gramian": "Gramian",
    "norms": "gradient norms",
    "max_abs": "gradient entries",
    "mean_abs": "gradient entries",
    "std": "gradient entries",
    "alignment": "derivatives along the downstream gradient",
    "ntk_diagonal": "kernel diagonal",
    "cross_gramian": "cross-Gramian of two batches",
}
SUMS = {"1": "sum 1", "K": "sum K", "free": ""}


def table() -> Table:
    """What is known of each method."""
    columns = (
        "weighting",
        "looks at",
        "costs",
        "losses",
        "remembers",
        "weights",
        "from",
    )
    return Table(columns, [_row(m) for m in yoto.weightings.methods().values()])


def _row(method: yoto.weightings.Method) -> list[str]:
    seen = dict.fromkeys(STATISTICS[name] for name in method.needs)
    about = f" and the {method.requires} loss" if "Gramian" in seen else ""
    about = about if method.requires else ""
    sign = "any sign" if method.negative_weights else "not negative"
    if method.requires == "weights":
        sign = "as given"
    return [
        f"`{method.name}`",
        (", ".join(seen) or "nothing") + about,
        _cost(method),
        method.accepts,
        method.remembers,
        ", ".join(filter(None, (SUMS[method.sum_of_weights], sign))),
        ", ".join(f"[{p.author} {p.year}]({p.url})" for p in method.papers),
    ]


def _cost(method: yoto.weightings.Method) -> str:
    """What a step takes beyond the losses."""
    if "ntk_diagonal" in method.needs:
        return "the kernel"
    if not set(method.needs) - {"losses"}:
        return "one gradient"
    if "cross_gramian" in method.needs:
        return "2 K gradients"
    return "K + 1 gradients" if method.requires == "downstream" else "K gradients"


def warnings() -> Table:
    """What the docstring of each method warns of, as Markdown."""
    rows = []
    for name in yoto.weightings.methods():
        text = inspect.getdoc(getattr(yoto.weightings, name)) or ""
        _, _, warning = text.partition(".. warning::\n")
        if warning:
            rows.append([f"`{name}`", _plain(warning)])
    return Table(("method", "what its reference warns of"), rows)


def _plain(text: str) -> str:
    """A paragraph of reStructuredText as Markdown in one line."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", " ".join(text.split()))
    text = re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")
