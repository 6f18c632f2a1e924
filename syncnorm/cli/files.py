"""Files that a command is told to write."""

from __future__ import annotations

import os
from pathlib import Path

import click


def check_writable(*files: Path | None) -> None:
    """Tries to open each of ``files`` before the work that would fill them; leaves them as they were.

    Raises:
        click.UsageError: one cannot be written.
    """
    # Only rank 0's node writes, so only its ranks look.
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0"):
        return
    for file in files:
        if file is None:
            continue
        existed = file.exists()
        try:
            file.open("a").close()
            if not existed:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise click.UsageError(f"cannot write {file}: {error.strerror}") from error
