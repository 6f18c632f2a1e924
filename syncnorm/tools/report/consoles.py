"""The consoles that commands print on, and their tables. Text is shown literally, never as markup."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

# In columns. Longer lines of text are hard to read.
_WIDTH = 100
# In columns. Enough for most tables.
_TABLE_WIDTH = 80


class PlainTable(Table):
    """A table without rules whose columns are as wide as their cells; a str is text, never markup."""

    def __init__(self, title: str = "", gap: int = 2, header: bool = True) -> None:
        heading = Text(title, style="bold", justify="left") if title else None
        super().__init__(title=heading, box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=header)

    def add_column(self, header: RenderableType = "", *args: Any, **how: Any) -> None:
        """As in rich."""
        super().add_column(_literal(header), *args, **how)

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        """As in rich."""
        super().add_row(*(_literal(cell or "") for cell in cells), **how)


def _literal(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process, which still has files to write


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr, without markup; a question mark replaces what the encoding cannot represent."""
    replace_unencodable(sys.stderr if stderr else sys.stdout)
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def for_tables() -> Console:
    """A console on stdout that is 80 to 100 columns wide, as the terminal or ``$COLUMNS`` says; 100 in a pipe.

    It prints plain text if stdout is not a terminal.
    """
    wide = console()
    # On a narrower terminal, lines wrap; a table that fitted it would cut off numbers.
    known = wide.is_terminal or "COLUMNS" in os.environ
    wide.width = min(_WIDTH, max(_TABLE_WIDTH, wide.width)) if known else _WIDTH
    return wide


def print_text(text: str) -> None:
    """Prints ``text`` to stdout without wrapping its lines."""
    console().out(text)


def replace_unencodable(stream: Any) -> None:
    """Makes ``stream`` replace characters that its encoding cannot represent, instead of raising."""
    if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")
