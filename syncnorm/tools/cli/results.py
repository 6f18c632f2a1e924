"""The result of a command, printed and then written to files: if one of these fails, the others still happen."""

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
from syncnorm.tools.common.errors import one_line
from syncnorm.tools.common.files import is_stream
from syncnorm.tools.common.launcher import is_main_rank

# The exit code if the result was printed, but a file could not be written.
NOT_WRITTEN = 3

R = TypeVar("R")
Writer = tuple[Path | None, Callable[[R, Path], None]]


class Results(Generic[R]):
    """Prints and writes, on rank 0, the record that was kept last, even if the command fails afterwards.

    Args:
        show: prints a record.
        files: pairs of a path, or None to write no such file, and a function that writes a record to it. The paths
            are tried at once, before the work whose result they get.

    Attributes:
        exit_code: 0, or `NOT_WRITTEN`.

    Raises:
        click.UsageError: a file cannot be written; at the end of the ``with``, for an `InputError` inside of it.

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
        self._show_error: Exception | None = None
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
        if error is None and self._show_error is not None:
            raise self._show_error

    def keep(self, record: R) -> None:
        """Keeps ``record`` in place of the one before."""
        self._record, self._shown, self._unwritten = record, False, self._files

    def deliver(self, more: bool = False) -> None:
        """Prints and writes the record. If ``more`` records follow, pipes and devices wait for the last."""
        if self._record is None or not is_main_rank():
            return
        if not self._shown:
            self._shown = True
            try:
                self._show(self._record)
            except Exception as error:  # mostly because the reader of stdout has exited; raised at the end
                self._show_error = self._show_error or error
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
            with suppress(OSError):  # stderr may be closed as well
                command = click.get_current_context().command_path
                print(f"{command}: {_not_written(path, error)}", file=sys.stderr, flush=True)


def _not_written(path: Path, error: Exception) -> str:
    return f"cannot write {path}: {(error.strerror if isinstance(error, OSError) else None) or one_line(error)}"


def _check_writable(path: Path) -> None:
    """Opens ``path`` for writing without changing it."""
    # Only rank 0 writes, so only the ranks on its node can check. Not a pipe: closing it is the end for its reader.
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0") or is_stream(path):
        return
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise click.UsageError(_not_written(path, error)) from error
