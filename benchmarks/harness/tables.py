"""Tables as text, and the marked places of the pages that hold them."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """A table of text, of which the first column is a name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def mean_sd(numbers: Iterable[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, such as ``"95.1 ± 0.4"``."""
    scaled = scale * np.asarray(list(numbers))
    mean = f"{scaled.mean():.{digits}f}"
    return mean if len(scaled) < 2 else f"{mean} ± {scaled.std(ddof=1):.{digits}f}"


def markdown(table: Table, *, numbers: bool = True) -> str:
    """The table in GitHub's Markdown; columns of numbers are flush right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(table.columns) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (table.columns, rule, *table.rows)]
    return "\n".join([*lines, "", table.caption] if table.caption else lines)


def fill_blocks(text: str, blocks: dict[str, str]) -> str:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        filled = f"{begin}\n{block}\n{end}".replace("\\", r"\\")
        text = pattern.sub(filled, text)
    return text
