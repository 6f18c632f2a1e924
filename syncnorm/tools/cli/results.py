"""What a command found, printed and then written: no failure of one part loses another."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import click

from syncnorm.errors import InputError
from syncnorm.tools.common.files import is_stream
from syncnorm.tools.common.launcher import is_main_rank
from syncnorm.tools.common.loading import told

# The exit code where the result was found and printed, and a file could not be written.
NOT_WRITTEN = 3

R = TypeVar("R")
Writer = tuple[Path | None, Callable[[R, Path], None]]


class Results(Generic[R]):
    """Delivers the record that was kept last, also where the command fails after that; rank 0's alone.

    Each file is a path, None if nobody asked for it, and what writes a record there. They are tried before the work
    that would fill them.

    Attributes:
        exit_code: 0, or `NOT_WRITTEN`.

    Raises:
        click.UsageError: a file cannot be written; at the end of the ``with``, an `InputError` inside.

    Example:
        with Results(print_study, (json_file, write_json)) as results:
            results.keep(run("batch-size", keep=results.keep))
        return results.exit_code
    """

    def __init__(self, show: Callable[[R], None], *files: Writer[R]) -> None:
        self.exit_code = 0
        self._show = show
        self._files = [(path, write) for path, write in files if path is not None]
        self._record: R | None = None
        self._unwritten = self._files
        self._shown = False
        self._unshown: Exception | None = None
        for path, _ in self._files:
            _check_writable(path)

    def __enter__(self) -> Results[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.deliver()
        if isinstance(error, InputError):
            raise click.UsageError(str(error)) from error
        if error is None and self._unshown is not None:
            raise self._unshown

    def keep(self, record: R) -> None:
        """Takes what was found so far, in place of what it had."""
        self._record, self._shown, self._unwritten = record, False, self._files

    def deliver(self, more: bool = False) -> None:
        """Prints and writes what was kept; with ``more`` to come, not to pipes and devices, which take it once."""
        if self._record is None or not is_main_rank():
            return
        if not self._shown:
            self._shown = True
            try:
                self._show(self._record)
            except Exception as error:  # whoever read stdout has gone, mostly; told at the end
                self._unshown = self._unshown or error
        later = [file for file in self._unwritten if more and is_stream(file[0])]
        for path, write in self._unwritten:
            if (path, write) not in later:
                self._write(self._record, path, write)
        self._unwritten = later

    def _write(self, record: R, path: Path, write: Callable[[R, Path], None]) -> None:
        try:
            write(record, path)
        except Exception as error:
            self.exit_code = NOT_WRITTEN
            with suppress(OSError):  # stderr may be gone as well
                command = click.get_current_context().command_path
                print(f"{command}: {_not_written(path, error)}", file=sys.stderr, flush=True)


def _not_written(path: Path, error: Exception) -> str:
    return f"cannot write {path}: {(error.strerror if isinstance(error, OSError) else None) or told(error)}"


def _check_writable(path: Path) -> None:
    """Tries to open ``path``, and leaves it as it was."""
    # Only rank 0's node writes, so only its ranks look. And a pipe ends for its reader when it is closed.
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0") or is_stream(path):
        return
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise click.UsageError(_not_written(path, error)) from error
