"""Several comparisons side by side on a terminal: their decisions, what differs, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from syncnorm.tools.report.compare_terminal import render
from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.report.runs import Run, decided, decision, differences, results, results_title


def print_runs(runs: Sequence[Run], console: Console | None = None) -> None:
    """Prints what several runs have found side by side, and then each of them; a single run by itself."""
    to = console or for_tables()
    if len(runs) > 1:
        to.print(_side_by_side(runs))
    for run in runs:
        if len(runs) > 1:
            to.print(Text(f"\n{run.name}\n", style="bold"))
        to.print(render(run.comparison))


def _side_by_side(runs: Sequence[Run]) -> RenderableType:
    decisions: list[RenderableType] = [
        part
        for run in runs
        for part in (Text(f"{run.name}:"), Padding(Text(decision(run.comparison), style="bold"), (0, 0, 0, 2)))
    ]
    different = differences(runs)
    tables = [_table("What differs", "", different, runs)] if different else []
    tables.append(_table(results_title(runs), "arm", results(runs), runs))
    if by_pair := decided(runs):
        tables.append(_table("Decisions, and differences of the results", "arms", by_pair, runs))
    return Group(*decisions, *(part for table in tables for part in (Text(), table)))


def _table(title: str, first: str, lines: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> PlainTable:
    table = PlainTable(title)
    table.add_column(first, overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table
