"""A study as Markdown: what stands in a document beside its plot."""

from __future__ import annotations

from pathlib import Path

from syncnorm.tools.common.files import write_file
from syncnorm.tools.report.study_tables import Cells, cells, legend, ran_on
from syncnorm.tools.study.records import Study


def write_markdown(study: Study, path: Path) -> None:
    """Writes `markdown` to ``path``, replacing what is there."""
    write_file(path, markdown(study).encode(errors="replace"))  # the command may hold any bytes


def markdown(study: Study) -> str:
    """The question, the claim, the command, the tables, the findings and where it ran; no heading of its own."""
    parts = [
        f"**{study.question}**",
        f"Claim: {study.claim.text} ({study.claim.source})",
        f"```bash\n{study.command}\n```",
        *(_table(cells(study, view)) for view in study.views),
        legend(study),
        "\n".join(f"- {finding}" for finding in study.findings),
        "\n".join(f"- *{topic}*: {note}" for topic, note in study.notes.items()),
        ran_on(study),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(found: Cells) -> str:
    lines = [found.header, ("---", *["---:"] * (len(found.header) - 1)), *found.lines]
    return f"{found.title}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("\\", "/")
