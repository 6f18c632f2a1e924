"""The two collectives of a layer as torch.distributed's own, on the tensors' device: NCCL and others.

Ranks compare what they are about to do on their CPUs, in an exchange of frames without values: in every call where
the host waits for the collective anyway, and otherwise in the first calls of the group, a rule that all ranks share
whatever each of them runs. After those calls nothing waits: a tag that stands for the call travels behind the values,
a rank that finds another tag poisons its results with NaN on the device, and the host raises at its next call. A
rank that does not take part, because it raised an error, says so in the job's store, where a thread of each other
rank finds it and ends the collective that waits.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.call import Call, Kind
from syncnorm.comm.communicator import COMMUNICATOR, Communicator, backend_of, chosen
from syncnorm.comm.exchange import Exchange
from syncnorm.comm.frames import outside_of_modes, without_fake_mode
from syncnorm.comm.gather import explained
from syncnorm.errors import SyncNormError, known_everywhere

COMPARED_CALLS = 1000  # of a group; some ten steps of a ResNet-50
_NAMED_CALLS = 4096  # the latest, for errors that name the layer
# The number of ranks from which on a sum costs less than a gather for each layer of a ResNet-50, the narrowest, of 64
# channels, included. From the cost model of ``syncnorm bench scaling --simulate 4096``, for nodes of 8 GPUs and with
# the latencies of NCCL's own model; not measured. For all layers together it is 16 ranks.
SUM_FROM_RANKS = 32
FORWARD = "SYNCNORM_FORWARD", ("auto", "gather", "sum")
# Backends whose collectives the host does not wait for.
_ON_THE_DEVICE = ("nccl", "xccl", "hccl")

_debug = os.environ.get("SYNCNORM_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Sets whether ranks compare layer, width and dtype before every collective also on GPUs.

    All ranks must set the same value; before the first 1,000 calls of a group one rank that sets True is enough.
    On CPUs ranks always compare them, and this changes nothing. Over NCCL they compare them in those first calls;
    after that the comparison makes the hosts, but not the GPUs, wait for each other twice per layer.
    ``SYNCNORM_DEBUG=1`` in the environment has the same effect.
    """
    global _debug
    _debug = enabled


def settings() -> str:
    """What the environment chooses for native collectives, as it is, for ranks to compare."""
    return ", ".join(f"{name}={os.environ.get(name) or allowed[0]}" for name, allowed in (COMMUNICATOR, FORWARD))


class NativeCollectives:
    """The native collectives of the layers of one group, on one device.

    Args:
        group: the process group.
        device: of the tensors.
        exchange: compares calls; None if there is no other rank, as in torch's fake backend.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, exchange: Exchange | None) -> None:
        self.exchange = exchange
        self.world_size = group.size()
        self.communicator = Communicator(group, device, "" if exchange is None else f"{exchange.first_call}")
        self._waits = self.communicator.backend not in _ON_THE_DEVICE
        # The fake backend returns this rank's own values instead of their sum.
        self._tag_ranks = 1 if self.communicator.backend == "fake" else self.world_size
        self._calls = 0  # without an exchange
        self._debugged = False  # whether any rank was in debug mode at the last comparison: the same on all ranks
        self._begun = False  # whether ranks have agreed on a call whose collective this rank has not joined yet
        self._named: dict[int, Call] = {}
        # A kernel stores here the number of a call whose tags were wrong, and the host reads it without waiting.
        # Whatever mode or transform the first call runs under.
        with without_fake_mode(), outside_of_modes(), torch._C._DisableFuncTorch():
            self.mismatch = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._mismatch = ctypes.c_int64.from_address(self.mismatch.data_ptr())
        if exchange is not None and not self._waits:
            exchange.watch(self.communicator.abort)

    @functools.cached_property
    def sums(self) -> bool:
        """Whether forwards sum instead of gathering; the same on all ranks, which have compared their settings."""
        forward = chosen(*FORWARD)
        return forward == "sum" or (forward == "auto" and self.world_size >= SUM_FROM_RANKS)

    @property
    def compares(self) -> bool:
        """Whether ranks compare the next call: the same on all ranks."""
        exchange = self.exchange
        if exchange is None:
            return False
        return self._waits or _debug or self._debugged or exchange.calls - exchange.first_call < COMPARED_CALLS

    def begin(self, call: Call) -> "NativeCall":
        """Begins a call, whose number is that of the forward that it belongs to, or 0 for a forward.

        Raises:
            SyncNormError: the ranks make different calls, an earlier one was out of step, or another rank has failed.
        """
        exchange, self._begun = self.exchange, False
        if self._mismatch.value:
            number, self._mismatch.value = self._mismatch.value, 0
            if exchange is None or not exchange.closed_because:  # whose error, raised below, is the cause
                self._raise_mismatch(number)
        number = 1 + (self._calls if exchange is None else exchange.calls)
        call = call._replace(number=call.number or number)
        if exchange is None:
            self._calls += 1
        elif self.compares:
            # A compiled backward over a GPU does not know its number on the host; the tag contains it.
            known = self._waits or call.kind == Kind.FORWARD
            self._debugged = exchange.compare(call if known else call._replace(number=0), _debug)
        else:
            exchange.skip(call)
        self._named[number % _NAMED_CALLS] = call
        self._begun = True
        return NativeCall(self, call, number)

    def refuse(self, reason: str) -> None:
        """Makes the other ranks raise: this rank does not take part in the call that has begun, or the next."""
        if self.exchange is not None:
            # Where the call has begun, the others do not wait for frames but in the collective.
            if self.compares and not self._begun:
                self.exchange.abort_peers(reason)
            else:
                self.exchange.leave(f"did not take part, because {reason}")

    def _raise_mismatch(self, number: int) -> None:
        call = self._named.get(number % _NAMED_CALLS, f"call {number}")
        if self.exchange is not None:
            self.exchange.leave(f"was out of step in {call}")
        raise known_everywhere(
            SyncNormError(
                f"rank {dist.get_rank()}: another rank did not run {call}. Its results are NaN, and its running "
                f"statistics were not updated. To see which layer each rank ran, set SYNCNORM_DEBUG=1 or call "
                f"syncnorm.set_debug(True) on all ranks"
            )
        )


class NativeCall:
    """One collective that this rank is about to take part in. Exactly one of :meth:`gather` and :meth:`sum_` follows.

    Attributes:
        number: of the call, among all of the group; for a backward, that of its forward.
        tag: to be sent behind the values, in their dtype.
        tag_sum: the sum of the tags of all ranks, exact in fp32.
        tag_ranks: how many tags are summed.
        mismatch: (), int64, in memory that the host reads without waiting: a kernel that finds another tag stores
            ``reported`` there.
        reported: a number by which this rank finds the call again.
        sums: whether the moments of a forward are summed instead of gathered; the same on all ranks.
    """

    def __init__(self, collectives: NativeCollectives, call: Call, reported: int) -> None:
        self._collectives = collectives
        self._call = call
        self.number = call.number
        self.reported = reported
        # fp32 represents integers exactly up to 2**24, also as a sum over ranks.
        self.tag = float((call.key() + call.number) % (2**24 // collectives.world_size))
        self.tag_ranks = collectives._tag_ranks
        self.tag_sum = self.tag * self.tag_ranks
        self.mismatch = collectives.mismatch
        # Means of 53 bits cannot be summed exactly (``layer.global_sums``), so fp64 is always gathered.
        self.sums = call.kind == Kind.FORWARD and call.dtype == torch.float32 and collectives.sums

    def tag_of(self, number: Tensor) -> Tensor:
        """The tag (), int64, if the call had this number (), which only the device knows."""
        tags = 2**24 // self._collectives.world_size
        return (number + self._call.key() % tags) % tags

    def gather(self, packed: Tensor) -> Tensor:
        """``packed`` (n) of all ranks, in rank order: (W, n). On the current stream."""
        rows = packed.new_empty(self._collectives.world_size, packed.numel())
        communicator = self._collectives.communicator
        with explained(self._call, communicator.group):
            communicator.gather(rows.view(-1), packed)
        self._collectives._begun = False
        return rows

    def sum_(self, packed: Tensor) -> Tensor:
        """Sums ``packed`` (n) over all ranks, in place. On the current stream."""
        communicator = self._collectives.communicator
        with explained(self._call, communicator.group):
            communicator.sum_(packed)
        self._collectives._begun = False
        return packed

    def report(self, agree: Tensor) -> None:
        """Stores the number of the call if not ``agree`` (), boolean, on the device: for passes without kernels."""
        if type(agree) is not Tensor:  # one without data, while something traces
            return
        wrong = torch.where(agree, 0, self.reported)
        if wrong.device.type != "cpu":
            wrong = torch.maximum(wrong, self.mismatch.to(wrong.device, non_blocking=True))
        self.mismatch.copy_(wrong, non_blocking=True)


def gather(vectors: Sequence[Tensor], call: NativeCall) -> Tensor:
    """Gathers the concatenated ``vectors`` (n), of one dtype, of all ranks into (W, n); NaN if tags were wrong.

    For passes without kernels, and so is :func:`reduce`.
    """
    packed = torch.cat([*vectors, vectors[0].new_full((1,), call.tag)])
    rows = call.gather(packed)
    agree = rows[:, -1].eq(call.tag).all()
    call.report(agree)
    return torch.where(agree, rows[:, :-1], torch.nan)


def reduce(
    vectors: Sequence[Tensor], call: NativeCall, number: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that sums each of ``vectors``, of one dtype, over all ranks; NaN if tags were wrong.

    Args:
        vectors: of this rank.
        call: of all ranks.
        number: the number of the call if only the device knows it.
    """

    def finish() -> tuple[Tensor, ...]:
        tag: Tensor = vectors[0].new_full((1,), call.tag)
        expected: float | Tensor = call.tag_sum
        if number is not None:
            tag = call.tag_of(number).to(tag.dtype).view(1)
            expected = tag * call.tag_ranks
        packed = call.sum_(torch.cat([*vectors, tag]))
        agree = packed[-1].eq(expected).all()
        call.report(agree)
        return torch.where(agree, packed[:-1], torch.nan).chunk(len(vectors))

    return finish


def exchanges_values(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether frames can carry values on ``device``: where the user's group is gloo's on the CPU."""
    return device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group)


def has_other_ranks(group: dist.ProcessGroup, device: torch.device) -> bool:
    """False for a world of one, and for torch's fake backend, whose other ranks do not exist."""
    return group.size() > 1 and backend_of(group, device) != "fake"
