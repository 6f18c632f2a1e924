"""A study's views as cells of text, which the terminal and Markdown both show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from syncnorm.tools.study.records import Row, Study, Value, View
from syncnorm.tools.study.statistics import levels, spread


@dataclass(frozen=True)
class Cells:
    """A table: its title, the heads of its columns, its lines; each line begins with its name."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def cells(study: Study, view: View) -> Cells:
    """``view`` of ``study``, each cell mean ± standard deviation over seeds; ``-`` where there is no row."""
    rows = [row for row in study.rows if view.shows(row)]
    across, lines = levels(rows, view.across), levels(rows, view.lines)
    return Cells(
        title=view.title,
        header=(f"{view.lines} \\ {view.across}", *map(text, across)),
        lines=tuple(
            (text(line), *(_cell(view, sample(rows, view, line, column)) for column in across)) for line in lines
        ),
    )


def sample(rows: Sequence[Row], view: View, line: Value, column: Value) -> list[float]:
    """Every seed's value of one cell, as `View.unit` shows it."""
    factor = 100 if view.unit == "percent" else 1
    cell = {view.lines: line, view.across: column}
    return [factor * row.value for row in rows if cell.items() <= row.condition.items()]


def text(value: Value) -> str:
    """A part of a condition as a name: numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(view: View, values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 1 if view.unit == "percent" else 3
    return f"{fmean(values):.{digits}f} ± {spread(values):.{digits}f}"


def legend(study: Study) -> str:
    """How to read the cells."""
    return f"Mean ± standard deviation over {study.settings.seeds} seeds" + (
        ", in %." if any(view.unit == "percent" for view in study.views) else "."
    )


def ran_on(study: Study) -> str:
    """Hardware, versions, date and duration in one line."""
    hardware = study.hardware
    return (
        f"{hardware.device_name}, {hardware.cpu_count} cores, {study.settings.world_size} ranks, "
        f"{hardware.threads_per_rank} thread(s) a rank, {hardware.backend}, torch {study.torch_version}, "
        f"syncnorm {study.syncnorm_version}; {study.date}, {study.wall_seconds:.0f} s."
    )
