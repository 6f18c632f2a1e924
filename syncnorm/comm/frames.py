"""The wire format of an exchange. A frame is what one rank sends: a header that identifies its call, then numbers.

All frames of one exchange have the same size, so that ranks that disagree still receive each other's headers and can
raise. With messages of different sizes gloo would abort one process and deliver garbage to the other.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from syncnorm.comm.call import Call, Kind

_VERSION = 1  # of the meaning of frames; to be incremented whenever that changes
_HEADER = struct.Struct("<5q")
HEADER_BYTES = _HEADER.size
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
    """The frames of one exchange: the one that this rank writes, and those of all ranks, which it reads.

    They are memory that both Python and torch see: writing a frame needs no tensor operator.

    Args:
        own: the memory of this rank's frame.
        received: memory that begins with the frame of the first rank and has those of the others at equal distances.
        stride: that distance in bytes, a multiple of 8.
        world_size: the number of ranks.
    """

    def __init__(self, own: memoryview, received: memoryview, stride: int, world_size: int):
        self.capacity = len(own)  # bytes of one frame, a multiple of 8
        self.room = self.capacity - _HEADER.size  # bytes for the payload
        self._own, self._received, self._stride = own, received, stride
        self._starts = range(0, world_size * stride, stride)
        self._payload_address = ctypes.addressof(ctypes.c_char.from_buffer(own)) + _HEADER.size
        self._views: dict[tuple[torch.dtype, int], Tensor] = {}

    def write(self, header: Header, vectors: Sequence[Tensor]) -> None:
        """Writes a header and, if there is room for them, the concatenated ``vectors``, which have one dtype."""
        _HEADER.pack_into(self._own, 0, *header)
        if header.size <= self.room:
            address = self._payload_address
            for vector in vectors:
                source = vector.cpu().contiguous()  # the same tensor if it is on the CPU
                ctypes.memmove(address, source.data_ptr(), vector.nbytes)
                address += vector.nbytes

    def write_text(self, call: Call, text: str) -> None:
        """Writes a header and ``text``, truncated to the size of the frame."""
        encoded = text.encode()[: self.room]
        _HEADER.pack_into(self._own, 0, *Header(call.kind, call.key(), call.number, len(encoded), 0))
        self._own[_HEADER.size : _HEADER.size + len(encoded)] = encoded

    def headers(self) -> list[Header]:
        """The header of each rank, in rank order."""
        return [Header._make(_HEADER.unpack_from(self._received, start)) for start in self._starts]

    def texts(self, headers: Sequence[Header]) -> list[str]:
        """The text of each rank, in rank order, for frames whose payloads are texts."""
        begins = [start + _HEADER.size for start in self._starts]
        return [
            bytes(self._received[begin : begin + header.size]).decode(errors="replace")
            for begin, header in zip(begins, headers, strict=True)
        ]

    def payloads(self, size: int, dtype: torch.dtype) -> Tensor:
        """The numbers of all ranks, (W, size / itemsize): a view that a later exchange overwrites.

        Other ranks may read the same memory: it must not be written to.
        """
        view = self._views.get((dtype, size))
        if view is None:
            numbers, step, offset = (n // dtype.itemsize for n in (size, self._stride, _HEADER.size))
            with outside_of_modes():
                received = torch.frombuffer(self._received, dtype=dtype)
                view = received.as_strided((len(self._starts), numbers), (step, 1), offset)
            self._views[dtype, size] = view
        return view


def headers_agree(headers: Sequence[Header]) -> bool:
    """Whether all ranks make the same call, not counting ranks that have joined, and none reports an error."""
    calls = {h[:3] for h in headers if h.kind != Kind.JOINED}
    return len(calls) <= 1 and all(kind != Kind.ABORTED for kind, *_ in calls)


def capacity_for(size: int) -> int:
    """Bytes of a frame for a payload of ``size`` bytes. Even the smallest has room for the reason of an error."""
    return max(_MIN_FRAME_BYTES, -(-(size + _HEADER.size) // 64) * 64)


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """For buffers that outlive a call: allocated in inference mode, they could not be used in training."""
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        yield


_NO_CONTEXT = nullcontext()


def without_fake_mode() -> AbstractContextManager[None]:
    """Disables the mode of fake tensors, under which the operators of an exchange would do nothing."""
    if not torch._C._len_torch_dispatch_stack():
        return _NO_CONTEXT
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # slow to import; an active mode has imported it

    return cast(AbstractContextManager[None], unset_fake_temporarily())
