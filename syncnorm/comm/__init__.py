"""The two collectives of a synced layer: one gather in the forward, one sum in the backward.

The only package that communicates tensors. On CPUs over gloo both are an ``exchange`` of frames that say what they
are for; elsewhere they are ``direct``: an all_gather and an all_reduce of the group itself.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm import native
from syncnorm.comm.call import Call, Kind
from syncnorm.comm.exchange import Exchange, notices_of
from syncnorm.comm.layer_names import Numbers
from syncnorm.comm.native import set_debug
from syncnorm.comm.process_groups import alive, check_not_inherited
from syncnorm.errors import REFUSED, InputError, SyncNormError, is_known_everywhere, known_everywhere

__all__ = [
    "Call",
    "Exchange",
    "Kind",
    "abort_peers",
    "abort_peers_with",
    "aborting_peers",
    "exchange_of",
    "gather_moments",
    "peers_of",
    "reduce_sums",
    "reopen",
    "set_debug",
]


@dataclass
class Peers:
    """What this process remembers of a group's exchanges and layers."""

    calls: int = 0  # forwards of all layers
    compared: set[tuple[Kind, str]] = field(default_factory=set)
    exchange: Exchange | None = None
    attempt: int = 0  # of connecting
    closed: list[Exchange] = field(default_factory=list)  # before it; kept, for gloo may still write to them
    models: Numbers = field(default_factory=Numbers)
    staged: bool = False  # tensors of GPUs travel as frames too: a rank that has joined cannot answer otherwise

    def is_first(self, call: Call) -> bool:
        """Whether the layer has not come for this before."""
        known = (call.kind, call.layer) in self.compared
        self.compared.add((call.kind, call.layer))
        return not known


class Gathered(NamedTuple):
    """What :func:`gather_moments` returns."""

    moments: Tensor  # (W, 2C): each rank's mean and then its invstd
    counts: Sequence[int] | Tensor  # W numbers, or (W, 1) where only the device knows them
    number: int  # of the call


_making = threading.Lock()  # of exchanges: two threads at their first layers have to meet in one, which refuses them
_peers: "weakref.WeakKeyDictionary[dist.ProcessGroup, Peers]" = weakref.WeakKeyDictionary()


def peers_of(group: dist.ProcessGroup) -> Peers:
    """The one record of ``group``."""
    return _peers.get(group) or _peers.setdefault(group, Peers())


def exchange_of(group: dist.ProcessGroup, device: torch.device) -> Exchange | None:
    """The exchange for tensors on ``device``; None where they travel by the group's own collectives.

    Raises:
        SyncNormError: this process was forked from a rank.
    """
    check_not_inherited(group)
    peers = peers_of(group)
    if peers.exchange is not None and (device.type == "cpu" or peers.staged):
        return peers.exchange
    on_gloo = device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group)
    if not on_gloo and not peers.staged:
        return None
    with _making:
        if peers.exchange is None:
            peers.exchange = Exchange(group, peers.attempt)
        return peers.exchange


def reopen(group: dist.ProcessGroup | None) -> None:
    """Lets the ranks of ``group`` connect again if their exchange was closed: by an interrupt, or a rank that failed.

    Collective: none, but the next call connects only if all ranks have come here.
    """
    group = dist.group.WORLD if group is None and dist.is_initialized() else group
    if group is None or not isinstance(group, dist.ProcessGroup) or not alive(group):  # a rank outside has a number
        return
    peers = peers_of(group)
    if peers.exchange is not None and not peers.exchange.closed:
        return
    # A rank that comes late may have missed more than one attempt of the others.
    while notices_of(group, peers.attempt).any_failure():
        peers.attempt += 1
    if peers.exchange is not None:
        peers.closed.append(peers.exchange)
        peers.exchange = None


def gather_moments(
    mean: Tensor, invstd: Tensor, count: int | Tensor, eps: float, group: dist.ProcessGroup | None, layer: str
) -> Gathered:
    """Every rank's moments, from one gather of the packed ``[mean (C), invstd (C), count (1)]``.

    Args:
        mean: (C) of this rank.
        invstd: (C) of this rank, same dtype.
        count: values a channel on this rank; may be 0 and may differ by rank; a tensor () where a mask says it.
        eps: inside ``invstd``; compared between ranks.
        group: all of its ranks must call; None is this process alone.
        layer: the name by which ranks compare and errors call it.

    Returns:
        What each rank brought, in rank order, the same bits on every rank.

    Raises:
        SyncNormError: the ranks came for different things, or the collective failed.
    """
    channels = mean.numel()
    if group is None:
        counts = count.view(1, 1) if isinstance(count, Tensor) else [count]
        return Gathered(torch.cat([mean, invstd]).unsqueeze(0), counts, 0)
    peers = peers_of(group)
    exchange = exchange_of(group, mean.device)
    number = 1 + (peers.calls if exchange is None else exchange.calls)
    call = Call(Kind.FORWARD, layer, number, channels, mean.dtype, eps, peers.models.built(layer))
    if exchange is None:
        peers.calls += 1
        # full() and not tensor(): a fill is a kernel, a copy of host memory would synchronise a GPU.
        packed = count.view(1).to(mean.dtype) if isinstance(count, Tensor) else mean.new_full((1,), count)
        gathered = native.gather([mean, invstd, packed], group, call, peers.is_first(call))
        return Gathered(gathered[:, :-1], gathered[:, -1:], call.number)
    _check_data(mean)
    headers, received = exchange(call, (mean, invstd), int(count))
    for row, header in enumerate(headers):
        if header.kind == Kind.JOINED:
            received[row, channels:] = 1  # the invstd of an empty rank: finite
    return Gathered(received.to(mean.device), [h.values for h in headers], call.number)


@contextmanager
def reduce_sums(
    sums: Sequence[Tensor], group: dist.ProcessGroup | None, layer: str, number: int, kind: Kind = Kind.BACKWARD
) -> Iterator[Callable[[], Sequence[Tensor]]]:
    """Adds up each of ``sums`` over all ranks, in one collective of them packed, while the block runs.

    In the backward these are ``[sum_dy (C), sum_dy_xmu (C)]``. Over gloo every rank gets the others' sums and adds
    them up itself: for a few KiB that takes less time than gloo's all_reduce.

    Args:
        sums: vectors of one length and dtype, the same number on all ranks.
        group: all of its ranks must call; None is this process alone.
        layer: as in :func:`gather_moments`.
        number: what that one returned.
        kind: what they are the sums of.

    Yields:
        What waits for the sums and returns them. No other collective of the group may begin before that.

    Raises:
        SyncNormError: now or at the end: the ranks came for different things, or the collective failed.
    """
    if group is None:
        yield lambda: sums
        return
    like = sums[0]
    call = Call(kind, layer, number, like.numel(), like.dtype, built=peers_of(group).models.built(layer))
    exchange = exchange_of(group, like.device)
    if exchange is None:
        yield native.reduce(sums, group, call, peers_of(group).is_first(call))
        return
    _check_data(like)
    under_way = exchange.start(call, sums)
    try:
        yield lambda: under_way().payloads.sum(0).to(like.device).chunk(len(sums))
    except BaseException as error:
        under_way.abandon(error)
        raise


def _check_data(vector: Tensor) -> None:
    if type(vector) is not Tensor:
        raise InputError(
            f"rank {dist.get_rank()}: expected tensors with numbers, got a {type(vector).__name__}, of which other "
            f"ranks can get none; trace the model, or run it on fake tensors, under `with syncnorm.no_sync_stats():`"
        )


_told: set[str] = set()  # while tracing; torch.compile may run the same in eager mode afterwards


def abort_peers(what: str, text: str, group: dist.ProcessGroup, device: torch.device, tracing: bool = False) -> None:
    """Lets the other ranks raise ``what: text`` where they wait for this one; nothing where no frames travel."""
    if tracing:
        _told.add(text)
    elif text in _told:
        return _told.remove(text)
    with suppress(SyncNormError):  # what was wrong here says more than that the others are gone
        exchange = exchange_of(group, device)
        if exchange is not None:
            exchange.abort_peers(f"{what}: {text}")


def abort_peers_with(error: BaseException, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Lets the other ranks raise where they wait for this one, which is about to raise ``error``; once an error."""
    if group is not None and not is_known_everywhere(error):
        what = REFUSED if isinstance(error, InputError) else f"it raised {type(error).__name__}"
        abort_peers(what, str(error), group, device)
        known_everywhere(error)


@contextmanager
def aborting_peers(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """:func:`abort_peers_with` of whatever ends the block."""
    try:
        yield
    except BaseException as error:
        abort_peers_with(error, group, device)
        raise
