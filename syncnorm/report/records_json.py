"""A comparison as a JSON file, and back."""

from __future__ import annotations

import json
from pathlib import Path

from syncnorm.compare.records import Comparison


def write_json(comparison: Comparison, path: Path) -> None:
    """Writes the record to ``path``, replacing what is there; schema and version are its first keys."""
    path.write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Comparison:
    """The record that `write_json` wrote.

    Raises:
        ValueError: no JSON, or of another schema or version.
    """
    return Comparison.from_dict(json.loads(path.read_text()))
