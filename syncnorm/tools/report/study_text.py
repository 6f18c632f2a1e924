"""A study as text: the cells of its tables, and the whole of it on a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.text import Text

from syncnorm.tools.common.files import write_file
from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.study.findings import levels, std, text
from syncnorm.tools.study.records import Study, StudyRow, Value, View


@dataclass(frozen=True)
class Cells:
    """A table as text: title, column headers, and lines, each of which begins with its name."""

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


def sample(rows: Sequence[StudyRow], view: View, line: Value, column: Value) -> list[float]:
    """The values of all seeds in one cell, in the unit of `View.unit`."""
    factor = 100 if view.unit == "percent" else 1
    cell = {view.lines: line, view.across: column}
    return [factor * row.value for row in rows if cell.items() <= row.condition.items()]


def _cell(view: View, values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 1 if view.unit == "percent" else 3
    return f"{fmean(values):.{digits}f} ± {std(values):.{digits}f}"


def _legend(study: Study) -> str:
    return f"Mean ± standard deviation over {study.settings.seeds} seeds" + (
        ", in %." if any(view.unit == "percent" for view in study.views) else "."
    )


def _provenance(study: Study) -> str:
    hardware = study.hardware
    return (
        f"{hardware.device_name}, {hardware.cpu_count} cores, {study.settings.world_size} ranks, "
        f"{hardware.threads_per_rank} thread(s) per rank, {hardware.backend}, torch {study.torch_version}, "
        f"syncnorm {study.syncnorm_version}; {study.date}, {study.wall_seconds:.0f} s."
    )


def print_study(study: Study, console: Console | None = None) -> None:
    """Prints the study, 80 to 100 columns wide; without styles if stdout is not a terminal."""
    (console or for_tables()).print(_render(study))


def _render(study: Study) -> RenderableType:
    return Group(
        Text(study.question, style="bold"),
        Text(f"Claim: {study.claim.text} ({study.claim.source})"),
        *(Text(f"{topic}: {note}", style="dim") for topic, note in study.notes.items()),
        *(part for view in study.views for part in (Text(), _rich_table(cells(study, view)))),
        Text(_legend(study), style="dim"),
        Text(),
        Text("Findings", style="bold"),
        *(Text(f"- {finding}") for finding in study.findings),
        Text(),
        Text(_provenance(study), style="dim"),
    )


def _rich_table(found: Cells) -> PlainTable:
    table = PlainTable(found.title)
    for index, head in enumerate(found.header):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for line in found.lines:
        table.add_row(*line)
    return table


def write_markdown(study: Study, path: Path) -> None:
    """Writes `markdown` to ``path``, replacing what is there."""
    write_file(path, markdown(study).encode(errors="replace"))  # the command may contain any bytes


def markdown(study: Study) -> str:
    """The question, the claim, the command, tables, findings and provenance, without a heading."""
    parts = [
        f"**{study.question}**",
        f"Claim: {study.claim.text} ({study.claim.source})",
        f"```bash\n{study.command}\n```",
        *(_markdown_table(cells(study, view)) for view in study.views),
        _legend(study),
        "\n".join(f"- {finding}" for finding in study.findings),
        "\n".join(f"- *{topic}*: {note}" for topic, note in study.notes.items()),
        _provenance(study),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(found: Cells) -> str:
    lines = [found.header, ("---", *["---:"] * (len(found.header) - 1)), *found.lines]
    return f"{found.title}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("\\", "/")
