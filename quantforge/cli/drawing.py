"""Tables and pairs for a terminal: plain text only, whatever strangers' files hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table

from quantforge.cli.text import one_line

_PIPE_WIDTH = 160


def console(stream: TextIO | None = None) -> Console:
    """Where results go: the terminal's width, or wide enough for module names in a pipe."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def pairs(rows: Iterable[tuple[str, str]], out: Console) -> None:
    """Names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, one_line(value))
    out.print(grid)


def table_of(first: str, *numeric: str) -> Table:
    """A plain table whose columns after the first are right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    for name in numeric:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text."""
    table.add_row(*map(one_line, cells))


def print_table(table: Table, out: Console) -> None:
    """The table behind an empty line."""
    out.line()
    out.print(table)


def warn(warnings: Iterable[str], out: Console) -> None:
    """One line each."""
    for warning in warnings:
        out.print(f"warning: {one_line(warning)}", style="yellow")
