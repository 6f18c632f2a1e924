"""Records as JSON files, and a comparison back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from syncnorm.compare.records import Comparison
from syncnorm.report.files import write_file


class Record(Protocol):
    """What a run found: a comparison, a benchmark."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, with the schema's name and version in front."""


def write_json(record: Record, path: Path) -> None:
    """Writes the record to ``path``, replacing what is there; schema and version are its first keys."""
    write_file(path, (json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Comparison:
    """The comparison that `write_json` wrote.

    Raises:
        ValueError: no JSON, or of another schema or version.
    """
    return Comparison.from_dict(json.loads(path.read_bytes()))
