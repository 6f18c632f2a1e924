"""One rank's part of an exchange as bytes: a header that says what it is for, then the numbers.

All frames of a group are of one size, so ranks that disagree still exchange what they say, and learn of it. With
messages of different sizes gloo would abort one process and hand garbage to the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.collectives.call import Call, Kind

_WORDS = 4  # int64: kind, key of the call, bytes of the payload, count
HEADER = 8 * _WORDS


@dataclass(frozen=True)
class Header:
    """What a frame says of itself."""

    kind: int
    key: int
    size: int  # of the payload, in bytes; it is left out where the frame is too small
    count: int  # values a channel on that rank


def pack(capacity: int, call: Call, payload: Tensor, count: int) -> Tensor:
    """A frame of ``capacity`` bytes; ``payload`` is a uint8 vector."""
    size = payload.numel()
    frame = torch.zeros(capacity, dtype=torch.uint8)
    frame[:HEADER].view(torch.int64).copy_(torch.tensor([call.kind, call.key(), size, count]))
    if size <= capacity - HEADER:
        frame[HEADER : HEADER + size] = payload
    return frame


def headers(frames: Tensor) -> list[Header]:
    """The headers of received frames (W, capacity)."""
    return [Header(*words) for words in frames[:, :HEADER].view(torch.int64).tolist()]


def payloads(frames: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers of received frames, (W, size / itemsize)."""
    return frames[:, HEADER : HEADER + size].view(dtype)


def agreed(found: Sequence[Header]) -> bool:
    """Whether all ranks came for the same thing, those apart whose data has run out."""
    return len({h.key for h in found if h.kind != Kind.JOINED}) <= 1
