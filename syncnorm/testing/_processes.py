"""The caller's side of the kept ranks: spawns them, sends calls, waits for reports, and ends ranks that hang.

It waits for messages and for the ends of processes, with deadlines, and never polls.
"""

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from syncnorm.errors import InputError
from syncnorm.testing import _rank
from syncnorm.testing._transport import IDLE, LEAVE, STOP, Raised, RankCall, Returned

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

# How long the other ranks may take to report once one has failed. Ranks that communicate with it notice its closed
# sockets within milliseconds, or within a second on a busy machine. Others, which compute or wait for something else,
# are not worth a longer wait.
GRACE_S = 2.0
# How long a rank may take to close its process group, which takes about 25 ms on an idle machine. A rank that cannot,
# because fn left an asynchronous collective behind that never completes, is replaced.
LEAVE_S = 5.0
# How long a new rank may take to import torch on a busy machine.
SPAWN_S = 120.0
_GUARD = 'under `if __name__ == "__main__":`'


@dataclass(frozen=True)
class Lost:
    """A rank that did not report: it died, or it was ended because it hung.

    Attributes:
        summary: What happened, in words that follow "rank 1 ".
        stack: Its Python stack when it was ended by a signal; may be empty.
        exception: For the caller.
        at: Time of the monotonic clock.
        exit_code: Of its process, negative for a signal; None if it was ended.
    """

    summary: str
    stack: str
    exception: BaseException
    at: float
    exit_code: int | None = None


Report = Returned | Raised | Lost


@dataclass(frozen=True)
class RankProcess:
    """One kept rank: its process, the pipe to it, and the file that its stack is written to when a signal ends it."""

    process: SpawnProcess
    connection: Connection
    stacks: Path

    @classmethod
    def spawn(cls, stacks: Path) -> "RankProcess":
        """Start the process, whose first message will be IDLE."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # A daemon could not have children, and fn may use a DataLoader with workers.
        process = context.Process(
            target=_rank.main, args=(theirs, str(stacks)), daemon=False, name=_rank.PROCESS_NAME
        )
        try:
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours, stacks)

    def send(self, message: bytes) -> None:
        """Send ``message``; does nothing if the rank has died, which `Pool` sees from the sentinel of its process."""
        with suppress(OSError):
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        """The next message of the rank, or None if it has died."""
        # Must not block: a process that the rank forked may keep the pipe open after the rank has died.
        if not self.connection.poll():
            return None
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return None
        return message if message == IDLE else pickle.loads(message)

    def end(self, patience: float = GRACE_S) -> int | None:
        """Wait for the process to end, kill it after ``patience`` seconds, and return its exit code."""
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.connection.close()
        return code

    def abort(self) -> None:
        """Make the process write its stack and die; ``end`` waits for that."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGABRT)

    def stack(self) -> str:
        """The Python stacks when a signal ended the rank, innermost call first, without our own frames."""
        if not self.stacks.exists():
            return ""
        stacks = []
        for block in self.stacks.read_text().split("\n\n"):
            lines = block.splitlines()
            if "hread 0x" not in block or _rank._end_with_parent.__name__ in block:
                continue
            own = [i for i, line in enumerate(lines) if _rank.__file__ in line]
            stacks.append("\n".join(lines[: own[0]] if own else lines))
        return "\n".join(stacks)


class Pool:
    """The kept ranks. A call of world size n uses the first n of them."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="syncnorm-ranks-"))
        self._ranks: dict[int, RankProcess] = {}
        self._calls = 0

    def run(self, world_size: int, modules: dict[str, str], pickled: bytes, timeout: float) -> dict[int, Report]:
        """Run the pickled call on ranks 0 to ``world_size - 1`` and return the report of every rank."""
        self._calls += 1
        store = self._folder / f"store{self._calls}"
        environ, cwd = dict(os.environ), os.getcwd()
        try:
            reports: dict[int, Report] = dict(self._make_ready(world_size))
            if not reports:
                for rank in range(world_size):
                    call = RankCall(rank, world_size, str(store), timeout, environ, sys.path, cwd, modules, pickled)
                    self._ranks[rank].send(pickle.dumps(call))
                reports = self._collect(world_size, timeout)
                self._leave_groups([rank for rank, report in reports.items() if not isinstance(report, Lost)])
        except BaseException:
            # Ctrl-C or the timeout of a test: the state of the ranks is unknown, so none is kept.
            self._kill(list(self._ranks))
            raise
        finally:
            store.unlink(missing_ok=True)
        return reports

    def close(self) -> None:
        """End every rank; those that do not exit within two seconds are killed."""
        for rank in self._ranks.values():
            rank.send(STOP)
        for rank in self._ranks.values():
            rank.end()
        self._ranks.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_ready(self, world_size: int) -> dict[int, Lost]:
        """Start the ranks that are missing; return those that died before they were ready.

        Raises:
            InputError: The ranks cannot import the script of this process, or its import starts ranks.
        """
        for rank, kept in list(self._ranks.items()):
            if not kept.process.is_alive():
                self._ranks.pop(rank).end()
        new = {rank for rank in range(world_size) if rank not in self._ranks}
        script = _script_to_import() if new else ""
        for rank in new:
            self._ranks[rank] = RankProcess.spawn(self._folder / f"rank{rank}.stacks")
        failed: dict[int, Lost] = {}
        deadline = time.monotonic() + SPAWN_S
        while new and not failed and (arrived := self._next(new, deadline)):
            when = f": it died while it imported {script}, see its output above"
            failed = {rank: self._remove_dead(rank, when) for rank, message in arrived if message is None}
            new -= {rank for rank, _ in arrived}
        if any(lost.exit_code == _rank.STARTED_BY_IMPORT for lost in failed.values()):
            raise InputError(
                f"{script} starts ranks at its top level, and would do so again in each rank, which imports it: put "
                f"the call {_GUARD}"
            )
        if new:  # one died, or the deadline has passed
            unready = (
                f"not ready after {SPAWN_S:.0f} s, in which it imports {script}: what a script does at its top level "
                f"belongs {_GUARD}"
            )
            failed = failed or {
                min(new): Lost(unready, "", TimeoutError(f"rank {min(new)} was {unready}"), time.monotonic())
            }
            self._kill([rank for rank in new if rank in self._ranks])
        return failed

    def _next(self, ranks: set[int], deadline: float) -> list[tuple[int, Any]]:
        """The next messages of ``ranks``, None for a rank that died; an empty list at the deadline."""
        sources: dict[Any, int] = {}
        for rank in ranks:
            sources[self._ranks[rank].connection] = sources[self._ranks[rank].process.sentinel] = rank
        ready = wait(list(sources), max(0.0, deadline - time.monotonic()))
        return [(rank, self._ranks[rank].receive()) for rank in sorted({sources[source] for source in ready})]

    def _collect(self, world_size: int, timeout: float) -> dict[int, Report]:
        reports: dict[int, Report] = {}
        pending = set(range(world_size))
        deadline = time.monotonic() + timeout
        while pending and (arrived := self._next(pending, deadline)):
            for rank, message in arrived:
                reports[rank] = self._remove_dead(rank) if message is None else message
                if not isinstance(reports[rank], Returned):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            pending -= reports.keys()
        failed = any(not isinstance(report, Returned) for report in reports.values())
        after = f"{GRACE_S:g} s after another rank had failed" if failed else f"after {timeout:g} s"
        for rank in pending:
            self._ranks[rank].abort()
        for rank in sorted(pending):
            hung = self._ranks.pop(rank)
            hung.end()
            summary = f"still running {after}"
            reports[rank] = Lost(summary, hung.stack(), TimeoutError(f"rank {rank} was {summary}"), time.monotonic())
        return dict(sorted(reports.items()))

    def _remove_dead(self, rank: int, when: str = "") -> Lost:
        at = time.monotonic()
        dead = self._ranks.pop(rank)
        code = dead.end()
        if code is not None and code < 0:
            try:
                how = f"was ended by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was ended by signal {-code}"
        else:
            how = f"ended its process with exit code {code}"
        how += when
        return Lost(how, dead.stack(), ChildProcessError(f"rank {rank} {how}"), at, code)

    def _leave_groups(self, ranks: list[int]) -> None:
        """Make the ranks that reported close their process groups, and wait until they have."""
        for rank in ranks:
            self._ranks[rank].send(LEAVE)
        pending = set(ranks)
        deadline = time.monotonic() + LEAVE_S
        while pending and (arrived := self._next(pending, deadline)):
            self._kill([rank for rank, message in arrived if message is None])
            pending -= {rank for rank, _ in arrived}
        self._kill(list(pending))

    def _kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._ranks.pop(rank).end(patience=0)


def _script_to_import() -> str:
    """The script of this process, which a new rank imports before anything else; "torch" without a script.

    Raises:
        InputError: It is not a file.
    """
    main = sys.modules["__main__"]
    file: str | None = getattr(main, "__file__", None)
    if file is None:  # an interactive session
        return "torch"
    if getattr(main, "__spec__", None) is None and not Path(file).exists():
        raise InputError(f"the ranks import the script of this process, but {file} is no file: save it as one")
    return file
