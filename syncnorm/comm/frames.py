"""One rank's part of an exchange as bytes: a header that says what it is for, then the numbers.

All frames of one exchange are of one size, so ranks that disagree still exchange what they say, and learn of it. With
messages of different sizes gloo would abort one process and hand garbage to the other.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from syncnorm.comm.call import Call, Kind

_VERSION = 1  # of what frames mean; one more whenever that changes
_HEADER = struct.Struct("<5q")
_LEAST = 512
FIRST = 1024  # bytes of a frame of which nothing is known yet


def protocol() -> str:
    """What ranks must have in common before a frame of one can be read by another."""
    return f"frames of version {_VERSION}: a header {_HEADER.format}, {FIRST} bytes at first, {_LEAST} at least"


@contextmanager
def _lasting() -> Iterator[None]:
    """For memory that outlives a call, which must not take after the modes that the call is made in.

    Made in inference mode it could not be used in training.
    """
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        yield


def in_earnest() -> AbstractContextManager[None]:
    """For an exchange: without the mode of fake tensors, under which its operators would do nothing."""
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # what is on the stack has imported it, or more

    return cast(AbstractContextManager[None], unset_fake_temporarily())


class Header(NamedTuple):
    """What a frame says of itself."""

    kind: int
    key: int
    number: int
    size: int  # of the payload, in bytes; it is left out where the frame is too small
    values: int  # a channel, on that rank


class Frames:
    """The memory of exchanges of one size: what this rank sends to each rank, and what it gets from each.

    Host memory that Python and torch both see: a header costs one ``struct`` call, and no tensor operator.
    """

    def __init__(self, world_size: int, capacity: int):
        self.world_size = world_size
        self.capacity = capacity  # bytes, a multiple of 8
        self.room = capacity - _HEADER.size
        self._out, self._in = bytearray(world_size * capacity), bytearray(world_size * capacity)
        with _lasting():
            self.sent = torch.frombuffer(self._out, dtype=torch.uint8)
            self.received = torch.frombuffer(self._in, dtype=torch.uint8)
        self._views: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = {}

    def write(self, call: Call, vectors: Sequence[Tensor], values: int) -> Header:
        """Puts ``vectors``, of one dtype, behind one another into the frame for each rank."""
        size = sum(v.numel() for v in vectors) * vectors[0].itemsize if vectors else 0
        header = Header(call.kind, call.key(), call.number, size, values)
        _HEADER.pack_into(self._out, 0, *header)
        used = _HEADER.size
        if 0 < size <= self.room:
            torch.cat([v.cpu() for v in vectors], out=self._payloads(size, vectors[0].dtype)[0])
            used += size
        for start in range(self.capacity, len(self._out), self.capacity):
            self._out[start : start + used] = self._out[:used]
        return header

    def write_text(self, call: Call, text: str) -> None:
        """Puts ``text``, as much of it as there is room for, into the frame for each rank."""
        self.write(call, [torch.frombuffer(bytearray(text.encode()[: self.room] or b" "), dtype=torch.uint8)], 0)

    def texts(self, found: Sequence[Header]) -> list[str]:
        """By rank, where frames under these headers hold texts."""
        rows = self.payloads(self.room, torch.uint8)
        return [bytes(row[: h.size].tolist()).decode(errors="replace") for row, h in zip(rows, found, strict=True)]

    def headers(self) -> list[Header]:
        """By rank."""
        return [
            Header._make(_HEADER.unpack_from(self._in, start)) for start in range(0, len(self._in), self.capacity)
        ]

    def payloads(self, size: int, dtype: torch.dtype) -> Tensor:
        """The numbers of all ranks, (W, size / itemsize): a view, good until the next exchange."""
        return self._payloads(size, dtype)[1]

    def _payloads(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What this rank sends, (size / itemsize), and what all ranks sent."""
        if (dtype, size) not in self._views:
            numbers, step, offset = (n // dtype.itemsize for n in (size, self.capacity, _HEADER.size))
            with _lasting():
                sent, received = self.sent.view(dtype), self.received.view(dtype)
                self._views[dtype, size] = (
                    sent[offset : offset + numbers],
                    received.as_strided((self.world_size, numbers), (step, 1), offset),
                )
        return self._views[dtype, size]


def capacity_for(size: int) -> int:
    """Bytes of the frames that a payload of ``size`` fits in, and the reason of a rank that refuses instead."""
    return max(_LEAST, -(-(size + _HEADER.size) // 64) * 64)


def agreed(found: Sequence[Header]) -> bool:
    """Whether all ranks came for the same thing, those apart whose data has run out."""
    calls = {h[:3] for h in found if h.kind != Kind.JOINED}
    return len(calls) <= 1 and all(kind != Kind.REFUSED for kind, *_ in calls)
