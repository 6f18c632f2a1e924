"""What a rank is about to do in a collective, in a form that ranks can compare."""

import hashlib
import struct
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch


class Kind(IntEnum):
    """What a rank comes to a collective for."""

    FORWARD = 1
    BACKWARD = 2
    DOUBLE_BACKWARD = 3
    JOINED = 4  # its data has run out: it brings a count of zero, whatever the others do
    REFUSED = 5  # its input was wrong: it brings the reason, and everyone raises


class Call(NamedTuple):
    """One collective of one layer, as one rank sees it.

    ``number`` counts the calls over the group, of all layers, from 1; a backward has that of its forward.
    """

    kind: Kind
    layer: str = ""
    number: int = 0
    channels: int = 0
    dtype: torch.dtype = torch.float32
    eps: float = 0.0
    built: int = 0  # for a layer that was built synced: 1 for the first of its class and width, as far as known

    def __str__(self) -> str:
        if self.kind == Kind.JOINED:
            return "has no more data (Join)"
        if self.kind == Kind.REFUSED:
            return "the refusal of an input"
        what = self.kind.name.lower().replace("_", " ")
        dtype = str(self.dtype).removeprefix("torch.")
        width = f"{self.channels} channels, {dtype} statistics, eps {self.eps:g}"
        if self.built and not self.layer.endswith(f" {self.built}"):
            width += f", no. {self.built} in the order in which they were built"
        return f"{what} of {self.layer} (call {self.number} of the group; {width})"

    def key(self) -> int:
        """63 bits that are the same on two ranks if they do the same, but for the number, and by chance otherwise."""
        return _key(self.kind, self.layer, self.channels, self.dtype, self.eps, self.built)


@lru_cache(maxsize=4096)
def _key(kind: Kind, layer: str, channels: int, dtype: torch.dtype, eps: float, built: int) -> int:
    if built:  # the number in its name is by the order of this rank's forwards
        layer = f"{layer.rsplit(' ', 1)[0]} {built}"
    text = f"{kind}/{layer}/{channels}/{dtype}/{eps!r}"
    return int(struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())[0]) >> 1


def explain_disagreement(rank: int, calls: dict[int, str]) -> str:
    """The message of an error for ranks that came to one collective for different things.

    Args:
        rank: this one.
        calls: by rank, what it came for.
    """
    told = "\n".join(f"  rank {r}: {call}" for r, call in calls.items())
    message = (
        f"rank {rank}: ranks that share statistics called different layers:\n{told}\n"
        f"All of them must run the same synced layers, of the same width, in the same order, forward and backward. "
        f"A forward that only some ranks make belongs under `with syncnorm.no_sync_stats():`; ranks whose data "
        f"runs out early, under torch's Join with syncnorm.training.joinable(model)."
    )
    if " of model " in told or " in the order in which " in told:
        message += " Several models with such layers, copies included, must be made in the same order on all ranks."
    return message
