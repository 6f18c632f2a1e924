"""The exchange of frames between the CPUs of a group, over gloo connections of its own.

Of its own, so that DDP's collectives and the layer's never meet: ranks that fall out of step then disagree here, in
frames that say so, and not with a gradient bucket of another size.

An exchange that one rank leaves half-way, by an interrupt or an error, is not taken up again: the others' next frames
might be of another size, for which gloo aborts. It is closed, on all ranks, until all of them convert again.
"""

import atexit
import ctypes
import functools
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.call import Call, Kind, explain_disagreement
from syncnorm.comm.connecting import copy_of, meet, reach, timeout_of
from syncnorm.comm.failure_flags import Notices
from syncnorm.comm.frames import FIRST, Frames, Header, agreed, capacity_for, in_earnest
from syncnorm.comm.lookout import Lookout
from syncnorm.comm.observers import observers
from syncnorm.comm.waiting import Waiting
from syncnorm.errors import SyncNormError, exchange_begins, known_everywhere

_PATIENCE = timedelta(seconds=0.3)  # how long a rank waits before it looks whether another has failed
# Seconds that a waiting rank stays awake. A thread that sleeps is woken late, on a core that has gone cold; one that
# yields leaves the core to gloo's own threads, and to whoever else has work.
_SPIN = 0.005
_REFUSING = 10.0  # seconds that a rank with an error of its own waits for the others to connect
_AT_EXIT = 2.0  # and for them to hear of it
_CALLS = 1_000_000  # of an attempt at most, so that no graph of an earlier one finds its forward's number again
_yield = getattr(os, "sched_yield", functools.partial(time.sleep, 0))


_exchanges: "weakref.WeakSet[Exchange]" = weakref.WeakSet()


@atexit.register
def _leave_connections_to_the_system() -> None:
    """Keeps gloo from being taken down at exit where its work is not done: it would wait for the other ranks."""
    deadline = time.monotonic() + _AT_EXIT
    for exchange in list(_exchanges):
        if exchange._refusal_is_unheard(deadline) or exchange._closed:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(exchange._group))


class Received(NamedTuple):
    """What an exchange brought."""

    headers: list[Header]  # in rank order
    payloads: Tensor  # (W, numbers), zero where a rank has joined; a view that the next exchange overwrites


class UnderWay(NamedTuple):
    """An exchange that has begun. Called, it waits for the other ranks; else it has to be abandoned."""

    exchange: "Exchange"
    call: Call
    vectors: Sequence[Tensor]
    own: Header
    frames: Frames
    work: dist.Work

    def __call__(self) -> Received:
        """What all ranks brought. Raises as the exchange does."""
        with self.exchange._guarded(self.call):
            return self.exchange._receive(self)

    def abandon(self, error: BaseException) -> None:
        """Closes the exchange because of ``error``, unless it is over."""
        if self.exchange._under_way is self.call:
            self.exchange._under_way = None
            self.exchange._close(f"left {self.call} half-way", error)


class _Failed(RuntimeError):
    """The other ranks' frames did not come."""


class Exchange:
    """All-to-all exchange of frames between the ranks of one group, by one thread of each rank.

    Collective: all ranks of the group must make the first exchange, which connects them, and all later ones.

    Args:
        group: of two ranks or more.
        attempt: how many exchanges of this group were closed before this one.
    """

    def __init__(self, group: dist.ProcessGroup, attempt: int = 0):
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.calls = attempt * _CALLS  # the same on all ranks
        # Ranks that are about to disagree must still send frames of one size. So that is foretold from what all of
        # them know: the largest that has followed the last exchange that they agreed on.
        self._last = 0
        self._follows: dict[int, int] = {}
        self._frames: dict[int, Frames] = {}
        self._notices = notices_of(group, attempt)
        self._waiting = Waiting(self._notices)
        self._shared_by = weakref.ref(group)
        self._group: dist.ProcessGroup | None = None  # of connections, once there are
        self._entering = threading.Lock()
        self._under_way: Call | None = None
        self._closed = ""  # because of what
        self._refusal: tuple[dist.Work, Frames, str] | None = None
        _exchanges.add(self)
        self.ended = math.inf

    @property
    def closed(self) -> bool:
        """Whether this rank, or as far as can be known another one, has left an exchange half-way."""
        return bool(self._closed) or self._notices.any_failure()

    def __call__(self, call: Call, vectors: Sequence[Tensor] = (), values: int = 0) -> Received:
        """Gives this rank's ``vectors`` to the others, and theirs to this one.

        Args:
            call: what this rank comes for.
            vectors: of one dtype; all that come for the same call bring as many numbers.
            values: a channel; goes into the header.

        Raises:
            SyncNormError: the ranks came for different calls, or one refused its input, on all ranks alike; or the
                exchange failed, or is closed.
        """
        return self.start(call, vectors, values)()

    def start(self, call: Call, vectors: Sequence[Tensor], values: int = 0) -> UnderWay:
        """Begins an exchange. No other may begin before it is over."""
        self._enter(call)
        with self._guarded(call, leaves=False):
            self._connected(call)
            frames = self._of(self._follows.get(self._last, FIRST))
            self.calls += 1
            own = frames.write(call, vectors, values)
            return UnderWay(self, call, vectors, own, frames, self._send(frames))

    def abort_peers(self, reason: str) -> None:
        """Tells the ranks that come, or will come, to the next exchange that this one will not, and why."""
        call = Call(Kind.REFUSED)
        self._enter(call)
        unheard = f"did not take part, because {reason}"
        with self._guarded(call, unheard):
            # This rank has an error of its own to raise. Ranks that come later find the reason in the store.
            self._connected(call, _REFUSING)
            self.calls += 1
            # Frames of its own: the next exchange may come before the others have these.
            frames = Frames(len(self.ranks), self._follows.get(self._last, FIRST))
            frames.write_text(call, reason)
            work = self._send(frames)
            # Not waited for beyond that: the others may be slow to come. The tensors must live until they do.
            self._refusal = work, frames, unheard
            with suppress(RuntimeError):
                _done(work)

    def _refusal_is_unheard(self, deadline: float) -> bool:
        """Whether other ranks have not come for this rank's last refusal until then; it is left in the store."""
        if self._refusal is None:
            return False
        work, _, reason = self._refusal
        while not work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not work.is_completed():
            self._notices.post_failure(reason)
        return not work.is_completed()

    def _enter(self, call: Call) -> None:
        """Makes ``call`` the one that is under way.

        Raises:
            SyncNormError: it cannot be.
        """
        self.ended = math.inf
        exchange_begins()
        with self._entering:
            other, self._under_way = self._under_way, self._under_way or call
        if other is not None:
            self._close(f"began {call} before {other} was over")
            raise self._known(
                f"{call} began before {other} was over. Only one thread may run the layers of a process group at a "
                f"time, because its exchanges have one order. Give each thread's model a group of its own"
            )
        if self._closed:
            self._under_way = None
            raise self._known(
                f"{call} cannot be synchronized over ranks {self.ranks} any more: {self._closed}. To go on, call "
                f"syncnorm.convert(model) again on all ranks, or start anew from a checkpoint"
            )

    @contextmanager
    def _guarded(self, call: Call, reason: str = "", leaves: bool = True) -> Iterator[None]:
        """Closes the exchange, for that reason, if the block ends by an error that the other ranks do not have."""
        try:
            with in_earnest():
                yield
        except BaseException as error:
            self._under_way = None
            if isinstance(error, _Failed):
                message = self._waiting.why(call, error, reason)
                self._closed = f"{call} failed"
                raise known_everywhere(SyncNormError(message)) from error.__cause__
            if not isinstance(known_everywhere(error), SyncNormError):
                self._close(f"left {call} half-way", error)
            raise
        if leaves:
            self._under_way = None
            self.ended = time.monotonic()

    def _close(self, reason: str, error: BaseException | None = None) -> None:
        """Ends all exchanges of the group, here and, as soon as they look, on the other ranks."""
        if error is not None:
            known_everywhere(error)
            # By its class alone: who looks for the words of a full memory in a message should not find them in ours.
            reason += f", because of {type(error).__name__}"
        self._closed = f"rank {self.rank} {reason}"
        self._notices.post_failure(reason)

    def _known(self, message: str) -> SyncNormError:
        return known_everywhere(SyncNormError(f"rank {self.rank}: {message}"))

    def _receive(self, begun: UnderWay) -> Received:
        _, call, vectors, own, frames, work = begun
        while True:
            self._wait(work, call)
            found = frames.headers()
            if any(h[:4] != own[:4] for h in found):
                self._check(call, found, frames)
            size = max(h.size for h in found)
            if size <= frames.room:
                break
            frames = self._of(capacity_for(size))
            frames.write(call, vectors, own.values)
            work = self._send(frames)
        self._follows[self._last] = max(capacity_for(size), self._follows.get(self._last, 0))
        self._last = next((h.key for h in found if h.kind != Kind.JOINED), 0)
        payloads = frames.payloads(size, vectors[0].dtype if vectors else torch.uint8)
        for row, header in enumerate(found):
            if header.size == 0:
                payloads[row] = 0  # what was there is of another exchange
        return Received(found, payloads)

    def _of(self, capacity: int) -> Frames:
        if capacity not in self._frames:
            self._frames[capacity] = Frames(len(self.ranks), capacity)
        return self._frames[capacity]

    def _check(self, call: Call, found: list[Header], frames: Frames) -> None:
        if agreed(found):
            return
        refused = [rank for rank, h in enumerate(found) if h.kind == Kind.REFUSED]
        if refused:
            reason = frames.texts(found)[refused[0]]
            raise SyncNormError(
                f"rank {self.rank}: rank {self.ranks[refused[0]]} did not take part in {call}, because {reason}"
            )
        # All ranks see the same headers, so all of them come here.
        names = Frames(len(self.ranks), FIRST)
        names.write_text(call, str(call))
        self._wait(self._send(names), call)
        told = names.texts(names.headers())
        raise SyncNormError(explain_disagreement(self.rank, dict(zip(self.ranks, told, strict=True))))

    def _send(self, frames: Frames) -> dist.Work:
        assert self._group is not None
        try:
            # Each rank sends its frame to each other one: gloo's all_gather passes them round a ring instead.
            return self._group.alltoall_base(frames.received, frames.sent, [], [])
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise _Failed(str(error)) from error

    def _wait(self, work: dist.Work, call: Call) -> None:
        """Returns when all ranks' frames are here."""
        began = time.perf_counter()
        try:
            while not _done(work):
                # A rank whose neighbor died need not be the dead one's neighbor.
                self._waiting.look_around(call, self.calls, time.perf_counter() - began)
        except RuntimeError as error:
            raise _Failed(str(error)) from error
        for observer in observers:
            observer(call, time.perf_counter() - began)

    def _connected(self, call: Call, patience: float = math.inf) -> None:
        """Connects this rank to all others, if it is not; with an eye on them, which gloo alone would not have."""
        if self._group is not None:
            return
        group = self._shared_by()
        assert group is not None, "who calls has it"
        timeout = min(patience, timeout_of(group))
        try:
            meet(self._notices, self._waiting, call, timeout)
            store = copy_of(self._notices.store)
            # Called by its name at that time, for who puts another in its place.
            self._group = reach(lambda: _connect(store, group), self._waiting, call, timeout)
            Lookout(self, Notices(self._notices.store, self.rank, self.ranks)).start()
        except SyncNormError:
            raise
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise _Failed(f"could not connect to ranks {self.ranks}: {error}") from error


def notices_of(group: dist.ProcessGroup, attempt: int) -> Notices:
    """Of the ranks of ``group``, in one attempt to connect."""
    store = dist.distributed_c10d._get_default_store()
    # The name of a group is the same on all of its ranks.
    store = dist.distributed_c10d.PrefixStore(f"syncnorm/{group.group_name}/{attempt}", store)
    return Notices(store, dist.get_rank(), dist.get_process_group_ranks(group))


def _done(work: dist.Work) -> bool:
    deadline = time.monotonic() + _SPIN
    while not work.is_completed() and time.monotonic() < deadline:
        _yield()
    try:
        work.wait(_PATIENCE)
    except RuntimeError:
        if not work.is_completed():  # only our patience ended
            return False
        work.wait()  # raises what failed, if it did not complete in between
    return True


def _connect(store: Any, group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks that torch.distributed keeps no list of, for dist.new_group needs all ranks."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_of(group)))
    own._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return own
