"""Files that are written completely or not at all: a failed write leaves the previous file as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import uuid4


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file at ``path`` by one with ``data``; a pipe or a device is written to.

    Raises:
        OSError: the file cannot be written.
    """
    if is_stream(path):
        with path.open("ab") as stream:  # append: /dev/stdout may be a file that holds what was printed so far
            stream.write(data)
    elif path.is_file() and not os.access(path.resolve().parent, os.W_OK):
        path.write_bytes(data)  # the folder admits no temporary file to replace this one with
    else:
        _replace(path.resolve(), data)  # a symbolic link stays, and its target is replaced


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
    """Whether ``path`` is a pipe or a device and cannot be replaced; also ``/dev/stdout`` redirected to a file."""
    by_name = path.absolute().parts[1:2] in (("dev",), ("proc",)) and not path.is_relative_to("/dev/shm")
    return by_name or (path.exists() and not path.is_file() and not path.is_dir())
