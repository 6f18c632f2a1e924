"""Run a function in several ranks on this machine, in processes that are kept from call to call.

Spawning two ranks that import torch takes some seconds; a kept rank joins a fresh process group in about ten
milliseconds. The rendezvous is a file, so that test runs side by side cannot take each other's ports.
"""

import math
import os
import pickle
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any, TypeVar

from syncnorm.errors import InputError, SyncNormError
from syncnorm.testing._processes import Ended, Pool, Report
from syncnorm.testing._transport import Raised, Returned, pickle_call

_T = TypeVar("_T")

# What gloo says on a rank whose peer went away: a consequence, never what a reader has to know first.
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class RankError(SyncNormError):
    """At least one rank raised, died or did not end in time.

    The message names the rank that failed first, with its traceback, and says in one line what became of
    each other rank. ``__cause__`` is the exception of the rank that failed first.

    Attributes:
        rank: The rank that failed first.
        exceptions: Rank -> the exception that it raised. A rank that died has a ``ChildProcessError`` here,
            one that was still running a ``TimeoutError``, and one whose exception does not pickle a
            ``RuntimeError`` with its text.
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
    """Call ``fn(*args)`` in ``world_size`` ranks with ``torch.distributed`` initialised; return the results.

    Each call gives the ranks a fresh gloo process group on the CPU, one thread each, the same random seed,
    and the caller's environment variables, ``sys.path`` and working directory, with ``RANK``,
    ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` set. The processes are kept for the next call:
    what ``fn`` changes in a module stays. A script that calls this needs the usual ``if __name__ ==
    "__main__":``, because ranks are spawned.

    Args:
        fn: A function at the top level of a module. It asks ``torch.distributed.get_rank()`` who it is.
        world_size: Number of ranks, 1 or more.
        args: Arguments for ``fn``, the same on every rank. They and the results travel as pickles, tensors
            by copy.
        timeout: Seconds that the call may take, not counting the start of new processes.

    Returns:
        The results of rank 0, 1, ...

    Raises:
        RankError: A rank raised, died, or was still running after ``timeout``. Ranks that wait for it in a
            collective fail at once; the others are given two seconds; the next call finds a pool that works.
        InputError: ``fn`` is a lambda, a local function or does not pickle, ``args`` is no tuple,
            ``world_size`` or ``timeout`` is not positive. Nothing has been started.

    Example:
        >>> import torch.distributed as dist
        >>> from syncnorm.testing import run_ranks
        >>> run_ranks(dist.get_rank, world_size=2)
        [0, 1]
    """
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
    """End the ranks that are kept; the next ``run_ranks`` starts new ones. Runs by itself at exit.

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
    if _kept is None or _kept.owner != os.getpid():  # a forked process cannot use its parent's ranks
        _kept = Pool()
        # multiprocessing joins its children when this process ends, which would wait for ever for ranks
        # that wait for the next task. Its own finalizers run just before that, in a rank that itself has
        # ranks too; atexit's do not.
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
            message = f"the result of rank {rank} does not unpickle here: {type(error).__name__}: {error}"
            raise RankError(message, rank, {rank: error}) from error
    return results


def _rank_error(reports: dict[int, Report], failed: dict[int, Raised | Ended], world_size: int) -> RankError:
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
        lines += ["", *(f"Rank {rank}: {_one_line(reports[rank])}" for rank in others)]
    exceptions = {rank: _exception(report) for rank, report in failed.items()}
    error = RankError("\n".join(lines), first, exceptions)
    error.__cause__ = exceptions[first]
    return error


def _distance_from_cause(report: Raised | Ended) -> int:
    """0: failed by itself; more: because of another. Time alone cannot tell, a dead rank leaves no stamp."""
    if isinstance(report, Raised):
        return int(any(lost in report.summary for lost in _PEER_LOST))
    if isinstance(report.exception, TimeoutError):
        # whoever is not in a collective is who the others wait for
        return 2 if "distributed_c10d.py" in report.stack else 1
    return 0


def _one_line(report: Report) -> str:
    if isinstance(report, Returned):
        return "returned"
    text = " ".join(report.summary.split())
    return f"raised {text[:300]}" if isinstance(report, Raised) else text


def _exception(report: Raised | Ended) -> BaseException:
    if isinstance(report, Ended):
        return report.exception
    try:
        if report.exception is not None:
            loaded: BaseException = pickle.loads(report.exception)
            return loaded
    except Exception:  # a class that only the rank can import
        pass
    return RuntimeError(report.summary)
