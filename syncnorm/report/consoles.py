"""The console that records are printed on."""

from rich.console import Console

# Longer lines of text are hard to read.
_WIDTH = 100
# What the tables need.
_TABLE_WIDTH = 80


def for_tables() -> Console:
    """Stdout, 80 to 100 columns wide; plain text where that is no terminal."""
    console = Console(highlight=False)
    # Wider than a narrow terminal if need be: it wraps lines, where a table that fits would cut the figures.
    console.width = _WIDTH if not console.is_terminal else min(_WIDTH, max(_TABLE_WIDTH, console.width))
    return console
