"""What is printed: lines, progress, tables that fit."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.console
import rich.progress
import rich.table

from benchmarks.harness.tables import Table

T = TypeVar("T")
WIDTH_OF_A_FILE = 160


_interactive = sys.stdout.isatty()
console = rich.console.Console(
    highlight=False, width=None if _interactive else WIDTH_OF_A_FILE
)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar, or silently if nobody is watching."""
    return iter(
        rich.progress.track(
            items,
            description,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


def say(text: str) -> None:
    """Print a line, wrapped to the terminal but never cut."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def show(*tables: Table) -> None:
    """Print the first of the tables that fits the terminal, or else the last."""
    unbounded = console.options.update(max_width=10_000)
    grids = [_grid(table) for table in tables]
    widths = [console.measure(grid, options=unbounded).maximum for grid in grids]
    fitting = (g for g, w in zip(grids, widths, strict=True) if w <= console.width)
    console.print(next(fitting, grids[-1]), markup=False)


def _grid(table: Table) -> rich.table.Table:
    grid = rich.table.Table(caption=table.caption or None, caption_justify="left")
    for i, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    return grid
