"""The consoles that everything is printed on, and their tables: what others named is shown as it is."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

# Longer lines of text are hard to read.
_WIDTH = 100
# What most tables need.
_TABLE_WIDTH = 80


class PlainTable(Table):
    """Columns without rules, as wide as their cells; a str is text, never markup."""

    def __init__(self, title: str = "", gap: int = 2, header: bool = True) -> None:
        heading = Text(title, style="bold", justify="left") if title else None
        super().__init__(title=heading, box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=header)

    def add_column(self, header: RenderableType = "", *args: Any, **how: Any) -> None:
        """As rich's."""
        super().add_column(_as_it_is(header), *args, **how)

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        """As rich's."""
        super().add_row(*(_as_it_is(cell or "") for cell in cells), **how)


def _as_it_is(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process, which has files to write


def console(stderr: bool = False) -> Console:
    """Stdout or stderr; no str is markup, and what the stream's encoding lacks becomes a question mark."""
    tolerate_any_text(sys.stderr if stderr else sys.stdout)
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def for_tables(least: int = _TABLE_WIDTH) -> Console:
    """Stdout, ``least`` to 100 columns wide; plain text where that is no terminal."""
    wide = console()
    # Wider than a narrow terminal if need be: it wraps lines, where a table that fits would cut the figures.
    wide.width = _WIDTH if not wide.is_terminal else min(_WIDTH, max(least, wide.width))
    return wide


def say(text: str) -> None:
    """Prints ``text`` to stdout, its lines as long as they are."""
    console().out(text)


def tolerate_any_text(stream: Any) -> None:
    """Has ``stream`` replace what its encoding lacks, where it would raise."""
    if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
