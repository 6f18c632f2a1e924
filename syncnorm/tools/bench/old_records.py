"""Benchmarks that earlier versions of syncnorm wrote, in the fields of today's records."""

from __future__ import annotations

from typing import Any


def from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A benchmark of schema version 1 as one of version 2.

    Version 1 timed layers in blocks alone, which version 2 still says of rows without ``calls``. It measured no
    exchange and noted no load.
    """
    return {**data, "schema_version": 2}
