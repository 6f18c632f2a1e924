"""The wire format of an exchange. A frame is what one rank sends: a header that identifies its call, then numbers.

All frames of one exchange have the same size, so that ranks that disagree still receive each other's headers and can
raise. With messages of different sizes gloo would abort one process and deliver garbage to the other.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from syncnorm.comm.call import Call, Kind

_VERSION = 1  # of the meaning of frames; to be incremented whenever that changes
_HEADER = struct.Struct("<5q")
_MIN_FRAME_BYTES = 512
INITIAL_FRAME_BYTES = 1024  # before a rank knows what size the exchange needs


def protocol() -> str:
    """A description of the format, which must be equal on all ranks before they can read each other's frames."""
    return (
        f"frames of version {_VERSION}: header {_HEADER.format}, initially {INITIAL_FRAME_BYTES} bytes, "
        f"at least {_MIN_FRAME_BYTES} bytes"
    )


class Header(NamedTuple):
    """The header of a frame."""

    kind: int
    key: int
    number: int
    size: int  # of the payload, in bytes; a frame that is too small for its payload has only the header
    values: int  # values per channel on the sending rank


class Frames:
    """The buffers of exchanges of one frame size: what this rank sends to each rank, and what it receives from each.

    They are host memory that both Python and torch see: writing a header costs one ``struct`` call and no tensor
    operator.
    """

    def __init__(self, world_size: int, capacity: int):
        self.world_size = world_size
        self.capacity = capacity  # bytes of one frame, a multiple of 8
        self.room = capacity - _HEADER.size  # bytes for the payload
        self._out, self._in = bytearray(world_size * capacity), bytearray(world_size * capacity)
        with _outside_of_modes():
            self.sent = torch.frombuffer(self._out, dtype=torch.uint8)
            self.received = torch.frombuffer(self._in, dtype=torch.uint8)
        self._views: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = {}

    def write(self, call: Call, vectors: Sequence[Tensor], values: int) -> Header:
        """Writes a header and the concatenated ``vectors``, which have one dtype, into the frame for each rank."""
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
        """Writes a header and ``text``, truncated to the size of the frame, into the frame for each rank."""
        self.write(call, [torch.frombuffer(bytearray(text.encode()[: self.room] or b" "), dtype=torch.uint8)], 0)

    def headers(self) -> list[Header]:
        """The header of each rank, in rank order."""
        return [
            Header._make(_HEADER.unpack_from(self._in, start)) for start in range(0, len(self._in), self.capacity)
        ]

    def texts(self, headers: Sequence[Header]) -> list[str]:
        """The text of each rank, in rank order, for frames whose payloads are texts."""
        rows = self.payloads(self.room, torch.uint8)
        return [bytes(row[: h.size].tolist()).decode(errors="replace") for row, h in zip(rows, headers, strict=True)]

    def payloads(self, size: int, dtype: torch.dtype) -> Tensor:
        """The numbers of all ranks, (W, size / itemsize): a view that the next exchange overwrites."""
        return self._payloads(size, dtype)[1]

    def _payloads(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Views of the payload that this rank sends, (size / itemsize), and of those that it receives from all."""
        if (dtype, size) not in self._views:
            numbers, step, offset = (n // dtype.itemsize for n in (size, self.capacity, _HEADER.size))
            with _outside_of_modes():
                sent, received = self.sent.view(dtype), self.received.view(dtype)
                self._views[dtype, size] = (
                    sent[offset : offset + numbers],
                    received.as_strided((self.world_size, numbers), (step, 1), offset),
                )
        return self._views[dtype, size]


def headers_agree(headers: Sequence[Header]) -> bool:
    """Whether all ranks make the same call, not counting ranks that have joined, and none reports an error."""
    calls = {h[:3] for h in headers if h.kind != Kind.JOINED}
    return len(calls) <= 1 and all(kind != Kind.ABORTED for kind, *_ in calls)


def capacity_for(size: int) -> int:
    """Bytes of a frame for a payload of ``size`` bytes. Even the smallest has room for the reason of an error."""
    return max(_MIN_FRAME_BYTES, -(-(size + _HEADER.size) // 64) * 64)


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    """For buffers that outlive a call: allocated in inference mode, they could not be used in training."""
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        yield


def without_fake_mode() -> AbstractContextManager[None]:
    """Disables the mode of fake tensors, under which the operators of an exchange would do nothing."""
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # slow to import; an active mode has imported it

    return cast(AbstractContextManager[None], unset_fake_temporarily())
