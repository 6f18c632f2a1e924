"""Files that are whole, or are not there: a failed write leaves the file of that name as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import uuid4


def write_file(path: Path, data: bytes) -> None:
    """Writes ``path``, replacing the file that is there; what is no file is written to.

    Raises:
        OSError: it cannot be written.
    """
    if is_stream(path):
        with path.open("ab") as stream:  # to append: /dev/stdout may be a file that holds what was printed
            stream.write(data)
    elif path.is_file() and not os.access(path.resolve().parent, os.W_OK):
        path.write_bytes(data)  # no other file can take its place
    else:
        _replace(path.resolve(), data)  # a link stays, and what it leads to is replaced


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".syncnorm-{uuid4().hex}.part")
    try:
        part.write_bytes(data)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a pipe or a device, which nothing can replace; so is ``/dev/stdout`` where it is a file."""
    by_name = path.absolute().parts[1:2] in (("dev",), ("proc",)) and not path.is_relative_to("/dev/shm")
    return by_name or (path.exists() and not path.is_file() and not path.is_dir())
