"""The exchange of frames between the CPUs of a group, over gloo connections of its own.

Of its own, so that DDP's collectives and the layer's never meet: ranks that fall out of step then disagree here, in
frames that say so, and not with a gradient bucket of another size.
"""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.collectives import frames
from syncnorm.collectives.call import Call, Kind, explain_disagreement
from syncnorm.errors import SyncNormError

_PATIENCE = timedelta(seconds=0.3)  # how long a rank waits before it looks whether another has failed
_ROLL_CALL = 0.6  # seconds that a failed rank waits for the others to say where they were


class Exchange:
    """All-to-all exchange of frames between the ranks of one group.

    Collective: all ranks of the group must make the first exchange, which connects them, and all later ones.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.calls = 0  # the same on all ranks
        self._capacity = 1024  # bytes of a frame; grows on all ranks alike
        store = dist.distributed_c10d._get_default_store()
        # The name of a group is the same on all of its ranks.
        self._store = dist.distributed_c10d.PrefixStore(f"syncnorm/{group.group_name}", store)
        self._group = _connect(self._store, group)
        self._pending: list[object] = []

    def __call__(self, call: Call, payload: Tensor, count: int = 0) -> tuple[list[frames.Header], Tensor]:
        """Gives this rank's ``payload`` to the others, and theirs to this one.

        Args:
            call: what this rank comes for.
            payload: a vector; all that come for the same call bring the same number of bytes.
            count: goes into the header.

        Returns:
            ``(headers, payloads (W, payload.numel()))`` in rank order. Payloads are zero where a rank has joined.

        Raises:
            SyncNormError: the ranks came for different calls, or one refused its input, on all ranks alike; or
                the exchange failed.
        """
        self.calls += 1
        raw = payload.view(torch.uint8)
        while True:
            received = self._gather(frames.pack(self._capacity, call, raw, count), call)
            found = frames.headers(received)
            self._check(call, found, received)
            size = max(h.size for h in found)
            if size <= self._capacity - frames.HEADER:
                return found, frames.payloads(received, size, payload.dtype)
            while size > self._capacity - frames.HEADER:
                self._capacity *= 2

    def refuse(self, reason: str) -> None:
        """Tells the ranks that come, or will come, to the next exchange that this one will not, and why."""
        self.calls += 1
        message = torch.frombuffer(bytearray(reason.encode()[: self._capacity - frames.HEADER]), dtype=torch.uint8)
        frame = frames.pack(self._capacity, Call(Kind.REFUSED), message, 0)
        received = frame.new_empty(len(self.ranks), self._capacity)
        work = self._group._allgather_base(received.view(-1), frame)
        # Not waited for beyond that: the others may be slow to come. The tensors must live until they do.
        self._pending = [work, frame, received]
        with suppress(RuntimeError):
            _done(work)

    def _check(self, call: Call, found: list[frames.Header], received: Tensor) -> None:
        refused = [r for r, h in enumerate(found) if h.kind == Kind.REFUSED]
        if refused:
            told = frames.payloads(received[refused[0]].unsqueeze(0), found[refused[0]].size, torch.uint8)
            reason = bytes(told.flatten().tolist()).decode(errors="replace")
            raise SyncNormError(
                f"rank {self.rank}: rank {self.ranks[refused[0]]} did not take part in {call}, because its own "
                f"input was refused: {reason}"
            )
        if not frames.agreed(found):
            # All ranks see the same headers, so all of them come here.
            text = torch.zeros(512, dtype=torch.uint8)
            name = torch.frombuffer(bytearray(str(call).encode()[: text.numel()]), dtype=torch.uint8)
            text[: name.numel()] = name
            names = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self._gather(text, call).tolist()]
            raise SyncNormError(explain_disagreement(self.rank, dict(zip(self.ranks, names, strict=True))))

    def _gather(self, frame: Tensor, call: Call) -> Tensor:
        received = frame.new_empty(len(self.ranks), frame.numel())
        try:
            work = self._group._allgather_base(received.view(-1), frame)
            while not _done(work):
                # A rank whose neighbour died need not be the dead one's neighbour.
                if self._store.check(["failed"]):
                    raise RuntimeError("another rank's exchange failed")
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise SyncNormError(self._explain(call, error)) from error
        return received

    def _explain(self, call: Call, error: RuntimeError) -> str:
        absent: list[int] | None = None
        try:
            self._store.set("failed", "1")
            self._store.set(f"failed/{self.rank}", str(call))
            deadline = time.monotonic() + _ROLL_CALL
            absent = [r for r in self.ranks if r != self.rank]
            while absent and time.monotonic() < deadline:
                time.sleep(0.05)
                absent = [r for r in absent if not self._store.check([f"failed/{r}"])]
        except RuntimeError:
            pass  # the store went with the rank that kept it
        waited = "another rank" if absent is None else f"ranks {absent}" if absent else "a rank that failed as well"
        return (
            f"rank {self.rank}: {call} over ranks {self.ranks} failed, waiting for {waited}. It died, raised an "
            f"error of its own (look for the first one), or does not run this layer. The backend said: {error}"
        )


def _done(work: dist.Work) -> bool:
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
