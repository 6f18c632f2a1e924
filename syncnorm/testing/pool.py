"""Run a function in several ranks on this machine, in processes that are kept from call to call.

Spawning two ranks that import torch takes some seconds; a kept rank joins a new process group in about ten
milliseconds. The rendezvous uses a file, so that concurrent test runs cannot take each other's ports.
"""

import math
import os
import pickle
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any, TypeVar

from syncnorm.errors import InputError, SyncNormError
from syncnorm.testing._processes import Lost, Pool, Report
from syncnorm.testing._rank import refuse_while_importing
from syncnorm.testing._transport import Raised, Returned, pickle_call

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

_T = TypeVar("_T")

# Errors of gloo on a rank whose peer is gone. They are consequences of the failure and never its cause.
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankError(SyncNormError):
    """At least one rank raised, died or did not finish in time.

    The message names the rank that failed first, with its traceback, and has one line for each other rank.
    ``__cause__`` is the exception of the rank that failed first.

    Attributes:
        rank: The rank that failed first.
        exceptions: Rank -> the exception that it raised: ``ChildProcessError`` for a rank that died, ``TimeoutError``
            for one that was still running, and ``RuntimeError`` with the text of an exception that does not pickle.
    """

    def __init__(self, message: str, rank: int, exceptions: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.rank = rank
        self.exceptions = exceptions

    def __reduce__(self) -> tuple[type["RankError"], tuple[str, int, dict[int, BaseException]]]:
        return type(self), (str(self), self.rank, self.exceptions)


def run_ranks(
    fn: Callable[..., _T], world_size: int = 2, args: tuple[Any, ...] = (), timeout: float = 60
) -> list[_T]:
    """Call ``fn(*args)`` in ``world_size`` ranks with ``torch.distributed`` initialized; return the results.

    In each call the ranks have a new gloo process group on the CPU, one thread each, the same random seed, and the
    caller's environment variables, ``sys.path`` and working directory; ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and
    ``LOCAL_WORLD_SIZE`` are set. The processes are kept for the next call, and with them what ``fn`` changes in a
    module. New ranks import the caller's script, so a script calls this under ``if __name__ == "__main__":``.

    Args:
        fn: A function at the top level of a module. It finds its rank with ``torch.distributed.get_rank()``.
        world_size: Number of ranks, 1 or more.
        args: Arguments of ``fn``, the same on every rank. They and the results are pickled, and tensors are copied.
        timeout: Time limit of the call in seconds, not counting the start of new processes.

    Returns:
        The results of rank 0, 1, ...

    Raises:
        RankError: A rank raised, died, or was still running after ``timeout``. Ranks that wait for it in a collective
            fail at once, and the others get two seconds to finish. Later calls work.
        InputError: ``fn`` or a function in ``args`` cannot be imported by another process (a lambda, a local
            function, one of a notebook), something does not pickle, ``args`` is not a tuple, or ``world_size`` or
            ``timeout`` is not positive: nothing has been started. Or the script lacks
            ``if __name__ == "__main__":``.

    Example:
        >>> import torch.distributed as dist
        >>> from syncnorm.testing import run_ranks
        >>> run_ranks(dist.get_rank, world_size=2)
        [0, 1]
    """
    refuse_while_importing()
    if not isinstance(world_size, int) or world_size < 1:
        raise InputError(f"run_ranks needs a world_size of 1 or more, got {world_size!r}.")
    if not isinstance(args, tuple):
        raise InputError(f"run_ranks needs args as a tuple, got {type(args).__name__}; write args=(x,) for one x.")
    if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InputError(f"run_ranks needs a positive timeout in seconds, got {timeout!r}.")
    if not callable(fn):
        raise InputError(f"run_ranks needs a function, got {type(fn).__name__}.")
    modules, call = pickle_call(fn, args)
    return _results(_pool().run(world_size, modules, call, timeout), world_size)


def shutdown() -> None:
    """End the ranks that are kept; the next ``run_ranks`` starts new ones. Called automatically at exit.

    Example:
        >>> from syncnorm.testing import shutdown
        >>> shutdown()
    """
    global _kept
    pool, _kept = _kept, None
    if pool is not None and pool.owner == os.getpid():
        pool.close()


_kept: Pool | None = None


def _pool() -> Pool:
    global _kept
    if _kept is None or _kept.owner != os.getpid():  # a forked process cannot use the ranks of its parent
        _kept = Pool()
        # At exit, multiprocessing joins its children, and would wait forever for ranks that wait for the next call.
        # Its own finalizers run before that, also in a rank that has ranks itself, where those of atexit do not.
        Finalize(None, shutdown, exitpriority=100)
    return _kept


def _results(reports: dict[int, Report], world_size: int) -> list[Any]:
    failed = {rank: report for rank, report in reports.items() if not isinstance(report, Returned)}
    if failed:
        raise _rank_error(reports, failed, world_size)
    results = []
    for rank, report in reports.items():
        assert isinstance(report, Returned)
        try:
            results.append(pickle.loads(report.result))
        except Exception as error:
            message = (
                f"the result of rank {rank} cannot be unpickled in this process: {type(error).__name__}: {error}"
            )
            raise RankError(message, rank, {rank: error}) from error
    return results


def _rank_error(reports: dict[int, Report], failed: dict[int, Raised | Lost], world_size: int) -> RankError:
    by_cause = sorted(failed, key=lambda rank: (_distance_from_cause(failed[rank]), failed[rank].at))
    first = by_cause[0]
    if all(isinstance(report.exception, TimeoutError) for report in failed.values()):
        shown = by_cause
        who = " and ".join(f"rank {rank}" for rank in shown)
        head = f"{who} (world size {world_size}): {failed[first].summary}"
    else:
        shown = [first]
        head = f"rank {first} (world size {world_size}) failed first: {failed[first].summary}"
    lines = [head]
    for rank in shown:
        report = failed[rank]
        detail = report.traceback if isinstance(report, Raised) else report.stack
        if detail:
            lines += ["", f"Rank {rank}:", detail]
    others = [rank for rank in reports if rank not in shown]
    if others:
        lines += ["", *(f"Rank {rank}: {_outcome(reports[rank])}" for rank in others)]
    exceptions = {rank: _exception(report) for rank, report in failed.items()}
    error = RankError("\n".join(lines), first, exceptions)
    error.__cause__ = exceptions[first]
    return error


def _distance_from_cause(report: Raised | Lost) -> int:
    """0 if the rank failed by itself, more if because of another. A rank that died has no time of its failure."""
    if isinstance(report, Raised):
        return int(any(lost in report.summary for lost in _PEER_LOST))
    if isinstance(report.exception, TimeoutError):
        # The others wait for the rank that is not in a collective.
        return 2 if "distributed_c10d.py" in report.stack else 1
    return 0


def _outcome(report: Report) -> str:
    if isinstance(report, Returned):
        return "returned"
    text = " ".join(report.summary.split())
    return f"raised {text[:300]}" if isinstance(report, Raised) else text


def _exception(report: Raised | Lost) -> BaseException:
    if isinstance(report, Lost):
        return report.exception
    try:
        if report.exception is not None:
            loaded: BaseException = pickle.loads(report.exception)
            return loaded
    except Exception:  # of a class that only the rank can import
        pass
    return RuntimeError(report.summary)
