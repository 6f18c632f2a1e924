"""What a rank does in one collective, in a form that ranks can compare, and the error for ranks that disagree."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch


class Kind(IntEnum):
    """Why a rank takes part in a collective."""

    FORWARD = 1
    BACKWARD = 2
    DOUBLE_BACKWARD = 3
    JOINED = 4  # its data has run out: it contributes a count of zero to whatever the other ranks compute
    ABORTED = 5  # it raises an error: it sends the reason, and all ranks raise


class Call(NamedTuple):
    """One collective of one layer, as one rank sees it.

    Attributes:
        kind: why the rank takes part.
        layer: the layer's name.
        number: counts the forwards of all layers over the group, from 1. A backward has the number of its forward,
            or 0 if the host does not know it.
        channels: the number of channels.
        dtype: of the statistics.
        eps: of the layer.
        built: for a layer that was constructed as a synced one, its place among the layers of its class and width in
            order of construction, from 1, as far as this rank knows. 0 for a layer of a converted model.
        micro_batch: the place of a forward in the layer's window of micro-batches, from 1; 0 for none.
    """

    kind: Kind
    layer: str = ""
    number: int = 0
    channels: int = 0
    dtype: torch.dtype = torch.float32
    eps: float = 0.0
    built: int = 0
    micro_batch: int = 0

    def __str__(self) -> str:
        if self.kind == Kind.JOINED:
            return "has no more data (Join)"
        if self.kind == Kind.ABORTED:
            return "the report of an error on this rank"
        pass_name = self.kind.name.lower().replace("_", " ")
        dtype = str(self.dtype).removeprefix("torch.")
        details = f"{self.channels} channels, {dtype} statistics, eps {self.eps:g}"
        if self.built and not self.layer.endswith(f" {self.built}"):
            details += f", no. {self.built} in order of construction"
        if self.micro_batch:
            details += f", micro-batch {self.micro_batch} of its window"
        place = f"call {self.number} of the group; " if self.number else ""
        return f"{pass_name} of {self.layer} ({place}{details})"

    @property
    def payload_bytes(self) -> int:
        """What one rank sends, without a header: mean and invstd, or the sums of a backward. 0 without data."""
        vectors = {Kind.FORWARD: 2, Kind.BACKWARD: 2, Kind.DOUBLE_BACKWARD: 5}.get(self.kind, 0)
        return vectors * self.channels * self.dtype.itemsize

    def key(self) -> int:
        """A 63-bit hash of all fields except ``number``: ranks whose keys are equal make the same call."""
        return _key(self.kind, self.layer, self.channels, self.dtype, self.eps, self.built, self.micro_batch)


@lru_cache(maxsize=4096)
def _key(kind: Kind, layer: str, channels: int, dtype: torch.dtype, eps: float, built: int, micro_batch: int) -> int:
    if built:  # the number in the name follows the order of this rank's forwards, which may differ between ranks
        layer = f"{layer.rsplit(' ', 1)[0]} {built}"
    text = f"{kind}/{layer}/{channels}/{dtype}/{eps!r}" + (f"/{micro_batch}" if micro_batch else "")
    return int(struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())[0]) >> 1


# Functions that are called after each exchange with the call and the seconds that this rank waited for the others, in
# the thread that waited. Empty unless something measures, such as the monitor or a benchmark.
observers: list[Callable[[Call, float], None]] = []


@contextmanager
def observing(observer: Callable[["Call", float], None]) -> Iterator[None]:
    """Has ``observer`` called after each exchange in the block."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def explain_disagreement(rank: int, calls: dict[int, str]) -> str:
    """The message of the error for ranks that made different calls in one collective.

    Args:
        rank: this rank.
        calls: the call of each rank, as text.
    """
    by_rank = "\n".join(f"  rank {r}: {call}" for r, call in calls.items())
    message = (
        f"rank {rank}: ranks that share statistics called different layers:\n{by_rank}\n"
        f"All ranks must run the same synced layers, with the same number of channels, in the same order, in the "
        f"forward and in the backward. Run a forward that only some ranks make under "
        f"`with syncnorm.no_sync_stats():`. If some ranks run out of data earlier than others, use torch's Join with "
        f"syncnorm.training.joinable(model)."
    )
    if " of its window" in by_rank:
        message += (
            " With convert(accumulate=...), all ranks must make the same micro-batches, optimizer steps and calls of "
            "syncnorm.training.end_window."
        )
    if " of model " in by_rank or " in order of construction" in by_rank:
        message += (
            " Models that contain such layers, including copies, must be created in the same order on all ranks."
        )
    return message
