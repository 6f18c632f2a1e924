"""The exchange of frames between the CPUs of a group, over gloo connections of its own.

Of its own, so that DDP's collectives and the layer's never meet: ranks that fall out of step then disagree here, in
frames that say so, and not with a gradient bucket of another size.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.collectives.call import Call, Kind, explain_disagreement
from syncnorm.collectives.frames import Frames, Header, agreed, capacity_for
from syncnorm.collectives.notices import Notices
from syncnorm.collectives.observers import observers
from syncnorm.errors import SyncNormError

_PATIENCE = timedelta(seconds=0.3)  # how long a rank waits before it looks whether another has failed
# Seconds that a waiting rank stays awake. A thread that sleeps is woken late, on a core that has gone cold; one that
# yields leaves the core to gloo's own threads, and to whoever else has work.
_SPIN = 0.005
_yield = getattr(os, "sched_yield", functools.partial(time.sleep, 0))
_FIRST = 1024  # bytes of a frame of which nothing is known yet
_ROLL_CALL = 0.6  # seconds that a failed rank waits for the others to say where they were


class Received(NamedTuple):
    """What an exchange brought."""

    headers: list[Header]  # in rank order
    payloads: Tensor  # (W, numbers), zero where a rank has joined; a view that the next exchange overwrites


class Exchange:
    """All-to-all exchange of frames between the ranks of one group.

    Collective: all ranks of the group must make the first exchange, which connects them, and all later ones.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.calls = 0  # the same on all ranks
        # Ranks that are about to disagree must still send frames of one size. So that is foretold from what all of
        # them know: the largest that has followed the last exchange that they agreed on.
        self._last = 0
        self._follows: dict[int, int] = {}
        self._frames: dict[int, Frames] = {}
        store = dist.distributed_c10d._get_default_store()
        # The name of a group is the same on all of its ranks.
        store = dist.distributed_c10d.PrefixStore(f"syncnorm/{group.group_name}", store)
        self._notices = Notices(store)
        self._group = _connect(store, group)
        self._pending: list[object] = []

    def __call__(self, call: Call, vectors: Sequence[Tensor] = (), values: int = 0) -> Received:
        """Gives this rank's ``vectors`` to the others, and theirs to this one.

        Args:
            call: what this rank comes for.
            vectors: of one dtype; all that come for the same call bring as many numbers.
            values: a channel; goes into the header.

        Raises:
            SyncNormError: the ranks came for different calls, or one refused its input, on all ranks alike; or
                the exchange failed.
        """
        return self.start(call, vectors, values)()

    def start(self, call: Call, vectors: Sequence[Tensor], values: int = 0) -> Callable[[], Received]:
        """The exchange under way; what is returned waits for it. No other may start before that has been called."""
        self.calls += 1
        frames = self._of(self._follows.get(self._last, _FIRST))
        own = frames.write(call, vectors, values)
        return functools.partial(self._finish, call, vectors, own, frames, self._send(frames, call))

    def _finish(
        self, call: Call, vectors: Sequence[Tensor], own: Header, frames: Frames, work: dist.Work
    ) -> Received:
        while True:
            self.wait(work, call)
            found = frames.headers()
            if any(h[:4] != own[:4] for h in found):
                self._check(call, found, frames)
            size = max(h.size for h in found)
            if size <= frames.room:
                break
            frames = self._of(capacity_for(size))
            frames.write(call, vectors, own.values)
            work = self._send(frames, call)
        self._follows[self._last] = max(capacity_for(size), self._follows.get(self._last, 0))
        self._last = next((h.key for h in found if h.kind != Kind.JOINED), 0)
        payloads = frames.payloads(size, vectors[0].dtype if vectors else torch.uint8)
        for row, header in enumerate(found):
            if header.size == 0:
                payloads[row] = 0  # what was there is of another exchange
        return Received(found, payloads)

    def refuse(self, reason: str) -> None:
        """Tells the ranks that come, or will come, to the next exchange that this one will not, and why."""
        self.calls += 1
        # Frames of its own: the next exchange may come before the others have these.
        frames = Frames(len(self.ranks), self._follows.get(self._last, _FIRST))
        frames.write(Call(Kind.REFUSED), [_text(reason, frames.room)], 0)
        work = self._group.alltoall_base(frames.received, frames.sent, [], [])
        # Not waited for beyond that: the others may be slow to come. The tensors must live until they do.
        self._pending = [work, frames]
        with suppress(RuntimeError):
            _done(work)

    def _of(self, capacity: int) -> Frames:
        if capacity not in self._frames:
            self._frames[capacity] = Frames(len(self.ranks), capacity)
        return self._frames[capacity]

    def _check(self, call: Call, found: list[Header], frames: Frames) -> None:
        if agreed(found):
            return
        refused = [rank for rank, h in enumerate(found) if h.kind == Kind.REFUSED]
        if refused:
            reason = _told(frames, found)[refused[0]]
            raise SyncNormError(
                f"rank {self.rank}: rank {self.ranks[refused[0]]} did not take part in {call}, because its own "
                f"input was refused: {reason}"
            )
        # All ranks see the same headers, so all of them come here.
        names = Frames(len(self.ranks), _FIRST)
        names.write(call, [_text(str(call), names.room)], 0)
        self.wait(self._send(names, call), call)
        told = _told(names, names.headers())
        raise SyncNormError(explain_disagreement(self.rank, dict(zip(self.ranks, told, strict=True))))

    def _send(self, frames: Frames, call: Call) -> dist.Work:
        try:
            # Each rank sends its frame to each other one: gloo's all_gather passes them round a ring instead.
            return self._group.alltoall_base(frames.received, frames.sent, [], [])
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise SyncNormError(self._explain(call, error)) from error

    def wait(self, work: dist.Work, call: Call) -> None:
        """Returns when all ranks' frames are here."""
        began = time.perf_counter() if observers else 0.0
        try:
            while not _done(work):
                # A rank whose neighbour died need not be the dead one's neighbour.
                if self._notices.posted("failed"):
                    raise RuntimeError("another rank's exchange failed")
        except RuntimeError as error:
            raise SyncNormError(self._explain(call, error)) from error
        for observer in observers:
            observer(call, time.perf_counter() - began)

    def _explain(self, call: Call, error: RuntimeError) -> str:
        absent: list[int] | None = None
        try:
            self._notices.post("failed")
            self._notices.post(f"failed/{self.rank}", str(call))
            deadline = time.monotonic() + _ROLL_CALL
            absent = [r for r in self.ranks if r != self.rank]
            while absent and time.monotonic() < deadline:
                time.sleep(0.05)
                absent = [r for r in absent if not self._notices.posted(f"failed/{r}")]
        except RuntimeError:
            pass  # the store went with the rank that kept it
        waited = "another rank" if absent is None else f"ranks {absent}" if absent else "a rank that failed as well"
        return (
            f"rank {self.rank}: {call} over ranks {self.ranks} failed, waiting for {waited}. It died, raised an "
            f"error of its own (look for the first one), or does not run this layer. The backend said: {error}"
        )


def _text(text: str, room: int) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()[:room] or b" "), dtype=torch.uint8)


def _told(frames: Frames, found: Sequence[Header]) -> list[str]:
    """The texts in frames that hold such."""
    rows = frames.payloads(frames.room, torch.uint8)
    return [bytes(row[: h.size].tolist()).decode(errors="replace") for row, h in zip(rows, found, strict=True)]


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
    device = torch.device("cpu")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    timeout = None
    with suppress(RuntimeError):  # a group of GPUs alone has no backend for the CPU
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
    own = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, timeout or dist.default_pg_timeout)
    own._register_backend(device, dist.ProcessGroup.BackendType.GLOO, backend)
    return own
