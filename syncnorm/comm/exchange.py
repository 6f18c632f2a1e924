"""The exchange of frames between the CPUs of a group, over connections or through memory of its own.

That keeps the layer's messages apart from DDP's collectives: ranks that fall out of step then disagree here, in
frames that say so, and not with a gradient bucket of another size.

An exchange that one rank leaves before it is complete, by an interrupt or an error, cannot be resumed: the next
frames of the other ranks might have another size, for which gloo aborts. It is closed, on all ranks, until all of
them convert their models again.
"""

import atexit
import ctypes
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm._torch_versions import Store
from syncnorm.comm import transports
from syncnorm.comm.call import Call, Kind, explain_disagreement, observers
from syncnorm.comm.connecting import connect_ranks, meet, timeout_of
from syncnorm.comm.failure_flags import FailureFlags
from syncnorm.comm.frames import (
    INITIAL_FRAME_BYTES,
    Frames,
    Header,
    capacity_for,
    headers_agree,
    without_fake_mode,
)
from syncnorm.comm.stall_inspector import StallInspector, StallWatchdog
from syncnorm.comm.transports import SLOTS, Transfer, Transport, TransportName, checked_transport
from syncnorm.errors import SyncNormError, count_exchange, known_everywhere

_POLL_S = 0.3  # between two checks, by a rank that waits, whether another rank has failed
_ABORT_CONNECT_S = 10.0  # how long a rank that reports an error waits for the others to connect
_EXIT_S = 2.0  # how long the end of the process waits until the others have received such a report
_MAX_CALLS = 1_000_000  # per attempt, so that no graph of an earlier attempt has a call number of a later one


class Received(NamedTuple):
    """The result of an exchange, in rank order."""

    payloads: Tensor  # (W, numbers), zero for a rank that has joined; to be read before the next exchange begins
    values: list[int]  # of the headers
    joined: Sequence[int]  # the rows of ranks that have joined


class PendingExchange(NamedTuple):
    """An exchange that has started. It must be either called, which waits for the other ranks, or abandoned."""

    exchange: "Exchange"
    call: Call
    vectors: Sequence[Tensor]
    own: Header
    frames: Frames
    transfer: Transfer
    values: list[int] | None = None  # as of ``Swapped``
    began: float = 0.0  # when this rank began to wait, by time.perf_counter; 0 if it does not wait yet

    def __call__(self) -> Received:
        """Waits for all ranks. Raises as the exchange does."""
        exchange = self.exchange
        with _ClosedByErrors(exchange, self.call), without_fake_mode():
            received = exchange._receive(self)
        exchange._complete()
        return received

    def abandon(self, error: BaseException) -> None:
        """Closes the exchange because of ``error``, unless it is complete."""
        if self.exchange._pending is self.call:
            self.exchange._pending = None
            self.exchange._close(f"left {self.call} before it was complete", error)


class _TransportError(RuntimeError):
    """The frames of the other ranks did not arrive."""


class Exchange:
    """All-to-all exchange of frames between the ranks of a group, by one thread of each rank.

    Collective: all ranks of the group must make the first exchange, which connects them, and all later ones.

    Args:
        group: a process group of at least two ranks.
        attempt: how many exchanges of this group were closed before this one.
        transport: how frames are to travel; compared by the ranks when they meet, and checked after that.
        native_settings: what the environment chooses for native collectives; the ranks compare it when they meet.
    """

    def __init__(
        self, group: dist.ProcessGroup, attempt: int = 0, transport: str = "auto", native_settings: str = ""
    ):
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.calls = self.first_call = attempt * _MAX_CALLS  # the same on all ranks
        self.idle_since = math.inf
        # Frames must have one size even if ranks disagree. So it is predicted from what all ranks know: the largest
        # frame that ever followed the last call that all of them agreed on.
        self._last_key = 0
        self._next_capacity: dict[int, int] = {}  # by the key of a call
        self._flags = failure_flags_of(group, attempt)
        self._inspector = StallInspector(self._flags)
        self._user_group = weakref.ref(group)
        self._chosen = transport
        self._native_settings = native_settings
        self._transport: Transport | None = None
        self._on_failure: Callable[[], None] | None = None
        self._observed = True  # False while ranks compare a call without exchanging its values
        self._entering = threading.Lock()
        self._pending: Call | None = None
        self.closed_because = ""
        self._reports: list[tuple[Transfer, str]] = []  # of errors, with what the store says instead of them
        _exchanges.add(self)

    @property
    def transport(self) -> str:
        """How frames travel; empty before the first exchange has connected the ranks."""
        return "" if self._transport is None else self._transport.description

    @property
    def watches(self) -> bool:
        """Whether :meth:`watch` was called."""
        return self._on_failure is not None

    @property
    def closed(self) -> bool:
        """Whether this rank, or another one as far as is known, has left an exchange before it was complete."""
        return bool(self.closed_because) or self._flags.any_failure()

    def __call__(self, call: Call, vectors: Sequence[Tensor] = (), values: int = 0) -> Received:
        """Sends this rank's ``vectors`` to the other ranks and receives theirs.

        Args:
            call: what this rank does.
            vectors: of one dtype; all ranks that make the same call send equally many numbers.
            values: values per channel on this rank, for the header.

        Raises:
            SyncNormError: the ranks made different calls, or one of them reported an error, both on all ranks; or the
                exchange failed or is closed.
        """
        self._enter(call)
        with _ClosedByErrors(self, call), without_fake_mode():
            received = self._receive(self._begin(call, vectors, values, waits=True))
        self._complete()
        return received

    def compare(self, call: Call, flag: bool = False) -> bool:
        """Compares ``call`` with those of the other ranks; its values travel in another way. Raises as a call.

        Returns:
            Whether ``flag`` is true on any rank.
        """
        self._observed = False
        try:
            return any(self(call, values=flag).values)
        finally:
            self._observed = True

    def skip(self, call: Call) -> None:
        """Counts ``call``, which is not compared.

        Raises:
            SyncNormError: the exchange is closed.
        """
        self._enter(call)
        self.calls += 1
        self._complete()

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Has ``on_failure`` called, in a thread, if another rank fails: this one may wait for it elsewhere."""
        self._on_failure = on_failure

    def leave(self, reason: str) -> None:
        """Ends the exchanges of the group, because this rank ``reason``."""
        if not self.closed_because:
            self._close(reason)

    def peers_failed(self, failures: dict[int, str]) -> None:
        """Ends the exchanges on this rank because of those of other ranks, with their reasons."""
        if not self.closed_because:
            reasons = [f"rank {rank} {reason or 'failed'}" for rank, reason in failures.items()]
            self.closed_because = " and ".join(reasons) or "another rank failed"
            self._flags.post_failure("")
        if self._on_failure is not None:
            self._on_failure()

    def start(self, call: Call, vectors: Sequence[Tensor]) -> PendingExchange:
        """Starts an exchange. No other one may start before it is complete."""
        self._enter(call)
        with _ClosedByErrors(self, call), without_fake_mode():
            return self._begin(call, vectors, 0, waits=False)

    def _begin(self, call: Call, vectors: Sequence[Tensor], values: int, waits: bool) -> PendingExchange:
        """Sends a frame. If this rank ``waits`` for the others at once, that may take less work."""
        transport = self._transport or self._connect(call)
        if self._reports:
            self._wait_for_reports(call)
        self.calls += 1
        size = sum([v.nbytes for v in vectors])
        own = Header(call.kind, call.key(), call.number, size, values)
        capacity = self._predicted_capacity()
        if waits and len(vectors) == 1:
            began = time.perf_counter()
            swapped = transport.swap(capacity, own, vectors[0])
            if swapped is not None:
                return PendingExchange(self, call, vectors, own, *swapped, began)
        frames = transport.frames(capacity)
        frames.write(own, vectors)
        return PendingExchange(self, call, vectors, own, frames, self._send(frames))

    def abort_peers(self, reason: str) -> None:
        """Makes the other ranks raise at the next exchange, now or later: this rank does not take part in it."""
        call = Call(Kind.ABORTED)
        self._enter(call)
        absence = f"did not take part, because {reason}"
        with _ClosedByErrors(self, call, absence), without_fake_mode():
            # This rank has an error to raise. Ranks that come after this time find the reason in the store.
            transport = self._transport or self._connect(call, _ABORT_CONNECT_S)
            if len(self._reports) == SLOTS - 1 and not self._reports[0][0].arrived(_POLL_S):
                raise _TransportError(f"{SLOTS} errors of this rank, and another rank has not come to the first one")
            frames = transport.frames(self._predicted_capacity())
            self.calls += 1
            frames.write_text(call, reason)
            transfer = self._send(frames)
            # The other ranks may come late: no further waiting.
            self._reports = [*self._reports[-(SLOTS - 2) :], (transfer, absence)]
            with suppress(RuntimeError):
                if not transfer.arrived(_POLL_S):
                    transfer.leave()
        self._complete()

    def _wait_for_reports(self, call: Call) -> None:
        """Waits until the other ranks have come to the errors that this rank has reported."""
        while self._reports:
            self._wait(self._reports[0][0], call)
            del self._reports[0]

    def _report_pending(self, deadline: float) -> bool:
        """Whether the other ranks depend on this one for the last report at ``deadline``. The store then has it."""
        if not self._reports:
            return False
        transfer, reason = self._reports[-1]
        while not transfer.delivered() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not transfer.delivered():
            self._flags.post_failure(reason)
        return not transfer.delivered()

    def _enter(self, call: Call) -> None:
        """Makes ``call`` the pending one.

        Raises:
            SyncNormError: another one is pending, or the exchange is closed.
        """
        self.idle_since = math.inf
        count_exchange()
        with self._entering:
            other, self._pending = self._pending, self._pending or call
        if other is not None:
            self._close(f"started {call} before {other} was complete")
            raise self._error_known_everywhere(
                f"{call} was started before {other} was complete. Only one thread may run the layers of a process "
                f"group at a time, because ranks match their exchanges by order. Give the model of each thread its "
                f"own process group"
            )
        if self.closed_because:
            self._pending = None
            raise self._error_known_everywhere(
                f"{call} cannot be synchronized over ranks {self.ranks} anymore: {self.closed_because}. To "
                f"continue, call syncnorm.convert(model) again on all ranks, or restart the job from a checkpoint"
            )

    def _complete(self) -> None:
        self._pending = None
        self.idle_since = time.monotonic()

    def _close(self, reason: str, error: BaseException | None = None) -> None:
        """Ends the exchanges of the group: on this rank now, on the other ranks as soon as they check."""
        if error is not None:
            known_everywhere(error)
            # Only its class: a training loop that looks for "out of memory" in messages must not find it in ours.
            reason += f", because of {type(error).__name__}"
        self.closed_because = f"rank {self.rank} {reason}"
        self._flags.post_failure(reason)

    def _error_known_everywhere(self, message: str) -> SyncNormError:
        return known_everywhere(SyncNormError(f"rank {self.rank}: {message}"))

    def _receive(self, pending: PendingExchange) -> Received:
        _, call, vectors, own, frames, transfer, values, began = pending
        dtype = vectors[0].dtype if vectors else torch.uint8
        if values is not None:  # all ranks make the same call
            if observers:
                self._observe(call, began)
            self._learn(own.size, own.key if own.kind != Kind.JOINED else 0)
            return Received(frames.payloads(own.size, dtype), values, ())
        while True:
            self._wait(transfer, call, began)
            headers = frames.headers()
            if any(h[:4] != own[:4] for h in headers):
                self._check_headers(call, headers, frames)
            size = max(h.size for h in headers)
            if size <= frames.room:
                break
            frames = self._frames(capacity_for(size))
            frames.write(own, vectors)
            transfer, began = self._send(frames), 0.0
        self._learn(size, next((h.key for h in headers if h.kind != Kind.JOINED), 0))
        payloads = frames.payloads(size, dtype)
        joined = [row for row, header in enumerate(headers) if header.kind == Kind.JOINED]
        empty = [row for row in joined if headers[row].size < size]
        if empty:
            payloads = payloads.clone()  # other ranks read the same memory
            payloads[empty] = 0  # numbers of an earlier exchange
        return Received(payloads, [h.values for h in headers], joined)

    def _check_headers(self, call: Call, headers: list[Header], frames: Frames) -> None:
        """Raises unless the headers, which all ranks see, are those of one call."""
        if headers_agree(headers):
            return
        aborted = [row for row, h in enumerate(headers) if h.kind == Kind.ABORTED]
        if aborted:
            reason = frames.texts(headers)[aborted[0]]
            raise SyncNormError(
                f"rank {self.rank}: rank {self.ranks[aborted[0]]} did not take part in {call}, because {reason}"
            )
        # All ranks see the same headers, so all of them exchange the names of their calls.
        names = self._frames(INITIAL_FRAME_BYTES)
        names.write_text(call, str(call))
        self._wait(self._send(names), call)
        calls = names.texts(names.headers())
        raise SyncNormError(explain_disagreement(self.rank, dict(zip(self.ranks, calls, strict=True))))

    def _predicted_capacity(self) -> int:
        return self._next_capacity.get(self._last_key, INITIAL_FRAME_BYTES)

    def _learn(self, size: int, key: int) -> None:
        """Notes the size of the payloads of a call with that key, which follows the last call."""
        capacity = capacity_for(size)
        if self._next_capacity.get(self._last_key, 0) < capacity:
            self._next_capacity[self._last_key] = capacity
        self._last_key = key

    def _frames(self, capacity: int) -> Frames:
        assert self._transport is not None, "connected at the start of the exchange"
        return self._transport.frames(capacity)

    def _send(self, frames: Frames) -> Transfer:
        assert self._transport is not None
        try:
            return self._transport.send(frames)
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise _TransportError(str(error)) from error

    def _wait(self, transfer: Transfer, call: Call, began: float = 0.0) -> None:
        """Returns when the frames of all ranks have arrived."""
        began = began or time.perf_counter()
        try:
            while not transfer.arrived(_POLL_S):
                # The rank that we wait for may itself be waiting for one that died.
                self._inspector.check(call, self.calls, time.perf_counter() - began)
        except RuntimeError as error:
            raise _TransportError(str(error)) from error
        self._observe(call, began)

    def _observe(self, call: Call, began: float) -> None:
        for observer in observers if self._observed else ():
            observer(call, time.perf_counter() - began)

    def _connect(self, call: Call, timeout_s: float = math.inf) -> Transport:
        """Connects this rank to all others, and notices if one of them fails meanwhile."""
        group = self._user_group()
        assert group is not None, "the caller holds a reference"
        timeout_s = min(timeout_s, timeout_of(group))
        try:
            meet(self._flags, self._inspector, call, timeout_s, self._chosen, self._native_settings)
            name = checked_transport(self._chosen)
            try:
                # A lambda looks _connect up when it is called, so that tests can replace it.
                self._transport = connect_ranks(
                    lambda store: _connect(store, group, name), self._flags, self._inspector, call, timeout_s
                )
            except SyncNormError as error:  # on all ranks; another attempt must not find the addresses of this one
                self._close(f"could not connect: {error}")
                raise
            StallWatchdog(self, FailureFlags(self._flags.store, self.rank, self.ranks)).start()
        except SyncNormError:
            raise
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise _TransportError(f"could not connect to ranks {self.ranks}: {error}") from error
        return self._transport


class _ClosedByErrors:
    """A context that closes an exchange if its block raises an error that the other ranks do not raise.

    Args:
        exchange: to close.
        call: the pending call.
        reason: what the other ranks need to know if the transport fails.
    """

    def __init__(self, exchange: Exchange, call: Call, reason: str = ""):
        self._exchange, self._call, self._reason = exchange, call, reason

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        exchange, call = self._exchange, self._call
        exchange._pending = None
        if isinstance(error, _TransportError):
            message = exchange._inspector.explain_failure(call, error, self._reason)
            exchange.closed_because = f"{call} failed"
            raise known_everywhere(SyncNormError(message)) from error.__cause__
        if not isinstance(known_everywhere(error), SyncNormError):
            exchange._close(f"left {call} before it was complete", error)


def failure_flags_of(group: dist.ProcessGroup, attempt: int) -> FailureFlags:
    """The flags of the ranks of ``group`` in one attempt to connect."""
    store = dist.distributed_c10d._get_default_store()
    # The name of a group is the same on all of its ranks.
    store = dist.distributed_c10d.PrefixStore(f"syncnorm/{group.group_name}/{attempt}", store)
    return FailureFlags(store, dist.get_rank(), dist.get_process_group_ranks(group))


def _connect(store: Store, group: dist.ProcessGroup, name: TransportName) -> Transport:
    rank, size, timeout_s = dist.get_rank(group), dist.get_world_size(group), timeout_of(group)

    def gloo(store: Store, rank: int, size: int) -> dist.ProcessGroup:
        """A group that is not registered with torch.distributed: dist.new_group needs all ranks."""
        own = dist.ProcessGroup(store, rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        own._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return own

    return transports.connect(name, store, rank, size, timeout_s, gloo)


_exchanges: "weakref.WeakSet[Exchange]" = weakref.WeakSet()


@atexit.register
def _leave_connections_to_the_system() -> None:
    """Prevents the destruction of gloo's connections with unfinished work, which would wait for the other ranks."""
    deadline = time.monotonic() + _EXIT_S
    for exchange in list(_exchanges):
        if exchange._report_pending(deadline) or exchange.closed_because:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(exchange._transport))
