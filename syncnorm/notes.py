"""What ranks of our own have found before one of them fails: rank 0 notes it down, and the caller has it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from syncnorm.testing import run_ranks

T = TypeVar("T")

# Takes a record of what is done so far, in place of the one that it had.
Keep = Callable[[Any], None]


def nobody_keeps(record: Any) -> None:
    """Nothing."""


def run_noting(
    fn: Callable[..., T], world_size: int, args: tuple[Any, ...], timeout: float, keep: Keep = nobody_keeps
) -> list[T]:
    """`run_ranks` of ``fn(*args, note)``; should that fail, ``keep`` gets what rank 0 last called ``note`` with.

    Raises:
        RankError: as `run_ranks`.
    """
    with TemporaryDirectory(prefix="syncnorm-notes-") as folder:
        note = _Note(Path(folder) / "record")
        try:
            return run_ranks(fn, world_size, (*args, note), timeout)
        except BaseException:  # Ctrl-C too
            if note.file.exists():
                keep(pickle.loads(note.file.read_bytes()))
            raise


@dataclass(frozen=True)
class _Note:
    """In a rank: writes a record to ``file``, whole even if the rank is killed meanwhile."""

    file: Path

    def __call__(self, record: Any) -> None:
        part = self.file.with_suffix(".part")
        part.write_bytes(pickle.dumps(record))
        os.replace(part, self.file)
