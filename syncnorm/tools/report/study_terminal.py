"""A study on a terminal: the question, the claim, the tables, and what follows from them."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.text import Text

from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.report.study_tables import Cells, cells, legend, ran_on
from syncnorm.tools.study.records import Study


def print_study(study: Study, console: Console | None = None) -> None:
    """Prints the study, 80 to 100 columns wide; plain text where stdout is no terminal."""
    (console or for_tables()).print(render(study))


def render(study: Study) -> RenderableType:
    """All of it, for any rich console."""
    return Group(
        Text(study.question, style="bold"),
        Text(f"Claim: {study.claim.text} ({study.claim.source})"),
        *(Text(f"{topic}: {note}", style="dim") for topic, note in study.notes.items()),
        *(part for view in study.views for part in (Text(), _table(cells(study, view)))),
        Text(legend(study), style="dim"),
        Text(),
        Text("Findings", style="bold"),
        *(Text(f"- {finding}") for finding in study.findings),
        Text(),
        Text(ran_on(study), style="dim"),
    )


def _table(found: Cells) -> PlainTable:
    table = PlainTable(found.title)
    for index, head in enumerate(found.header):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for line in found.lines:
        table.add_row(*line)
    return table
