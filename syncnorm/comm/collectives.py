"""The collectives of a synced layer: one gather in the forward, one sum in the backward, and a report of errors.

Each goes over the group's exchange of frames where there is one, and otherwise over its native collectives.
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

from syncnorm._torch_versions import is_initialized
from syncnorm.comm.call import Call, Kind
from syncnorm.comm.exchange import Exchange, failure_flags_of
from syncnorm.comm.layer_names import ModelNumbers
from syncnorm.comm.native import (
    NativeCall,
    NativeCollectives,
    exchanges_values,
    gather,
    has_other_ranks,
    reduce,
    settings,
)
from syncnorm.comm.process_groups import alive, check_not_inherited
from syncnorm.comm.transports import TransportName, checked_transport, default_transport
from syncnorm.errors import REFUSED, InputError, SyncNormError, is_known_everywhere, known_everywhere


@dataclass
class Peers:
    """What this process stores for a process group.

    Attributes:
        exchange: the open exchange of frames, if there is one. It carries values, or compares native calls.
        native: the native collectives, by device.
        attempt: how often the ranks have connected or tried to.
        closed: earlier exchanges, and native collectives; kept because gloo, or a kernel in a CUDA graph, may still
            write to their memory.
        models: numbers models that have layers of the same names.
        joins: the ids of torch's Joins that the ranks are in. Frames then carry all values, so that a rank that has
            joined can answer.
        carries_cpu: whether the open exchange carries the values of tensors on CPUs.
        transport: what :func:`set_transport` set; None for the default.
    """

    exchange: Exchange | None = None
    native: dict[torch.device, NativeCollectives] = field(default_factory=dict)
    attempt: int = 0
    closed: list[Exchange | NativeCollectives] = field(default_factory=list)
    models: ModelNumbers = field(default_factory=ModelNumbers)
    joins: set[int] = field(default_factory=set)
    carries_cpu: bool = False
    transport: TransportName | None = None

    @property
    def chosen(self) -> str:
        """The transport that was chosen on this rank; it may be an unknown name."""
        return self.transport or default_transport()

    def carries(self, device: torch.device) -> bool:
        """Whether an exchange is open that carries the values of tensors on ``device``."""
        return self.exchange is not None and ((self.carries_cpu and device.type == "cpu") or bool(self.joins))


class Gathered(NamedTuple):
    """What :func:`gather_moments` returns."""

    moments: Tensor  # (W, 2C): each rank's mean and then its invstd
    counts: Sequence[int] | Tensor  # W numbers, or (W, 1) if only the device knows them
    number: int  # of the call


_creating = threading.Lock()  # two threads at their first layers must get the same exchange, which then raises
_peers: "weakref.WeakKeyDictionary[dist.ProcessGroup, Peers]" = weakref.WeakKeyDictionary()
_NO_GROUP: tuple[Callable[[], dist.ProcessGroup | None], Peers] = lambda: None, Peers()
_latest = _NO_GROUP


def peers_of(group: dist.ProcessGroup) -> Peers:
    """What this process stores for ``group``."""
    global _latest
    latest, peers = _latest
    if latest() is not group:  # a comparison takes less time than a look into the dictionary, and this runs often
        peers = _peers.get(group) or _peers.setdefault(group, Peers())
        _latest = weakref.ref(group, _forget_latest), peers
    return peers


def _forget_latest(_: object) -> None:
    global _latest
    _latest = _NO_GROUP


def exchange_of(group: dist.ProcessGroup, device: torch.device) -> Exchange | None:
    """The exchange that carries values on ``device``; None if the group's native collectives do.

    Raises:
        SyncNormError: this process was forked from a rank.
    """
    check_not_inherited(group)
    peers = peers_of(group)
    if peers.carries(device):
        return peers.exchange
    if peers.joins or (peers.exchange is None and peers.chosen != "native" and exchanges_values(group, device)):
        return _open(group)
    return None


def _open(group: dist.ProcessGroup) -> Exchange:
    peers = peers_of(group)
    with _creating:
        if peers.exchange is None:
            peers.carries_cpu = peers.chosen != "native" and exchanges_values(group, torch.device("cpu"))
            peers.exchange = Exchange(group, peers.attempt, peers.chosen, settings())
        return peers.exchange


def native_of(group: dist.ProcessGroup, device: torch.device) -> NativeCollectives:
    """The native collectives of ``group`` for tensors on ``device``, where :func:`exchange_of` is None."""
    peers = peers_of(group)
    found = peers.native.get(device)
    if found is None:
        exchange = (peers.exchange or _open(group)) if has_other_ranks(group, device) else None
        found = peers.native[device] = NativeCollectives(group, device, exchange)
    return found


def native_call(
    kind: Kind,
    layer_name: str,
    channels: int,
    dtype: torch.dtype,
    eps: float,
    group: dist.ProcessGroup,
    device: torch.device,
    number: int = 0,
    micro_batch: int = 0,
) -> NativeCall | None:
    """Begins a native collective; None if frames carry the values of this group and device.

    Args:
        kind: what the call is for.
        layer_name: the name of the layer, which ranks compare and errors mention.
        channels: of the layer.
        dtype: of the statistics.
        eps: of the layer; 0 in a backward.
        group: the process group.
        device: of the tensors.
        number: of the forward, for a backward.
        micro_batch: as of `Call`.

    Raises:
        SyncNormError: the ranks make different calls, an earlier call was out of step, or another rank has failed.

    Collective: all ranks of ``group`` must call, and then gather or sum.
    """
    if exchange_of(group, device) is not None:
        return None
    built = peers_of(group).models.built(layer_name)
    return native_of(group, device).begin(Call(kind, layer_name, number, channels, dtype, eps, built, micro_batch))


def set_transport(group: dist.ProcessGroup | None, transport: TransportName | None) -> None:
    """Chooses how the layers of ``group``, None for the default one, exchange their numbers on CPUs.

    Raises:
        InputError: no such transport, the ranks have connected in another way, or there is no process group yet.
    """
    if transport is None:
        return
    checked_transport(transport)
    if not is_initialized():
        raise InputError(
            f"transport={transport!r} belongs to a process group: call torch.distributed.init_process_group first"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):  # this rank is outside of the group: an error at the first forward
        return
    peers = peers_of(group)
    if peers.exchange is not None and transport != peers.chosen:
        raise InputError(
            f"transport={transport!r}, but the ranks of this group have already connected in another way "
            f"({peers.chosen}). Choose it before the first forward, or create a new group"
        )
    peers.transport = transport


def transport_of(group: dist.ProcessGroup | None) -> str:
    """For people: how the ranks of ``group``, None for the default one, exchange numbers; empty if they cannot."""
    group = dist.group.WORLD if group is None and is_initialized() else group
    if not isinstance(group, dist.ProcessGroup) or not alive(group):
        return ""
    peers = peers_of(group)
    if peers.native or peers.chosen == "native" or not exchanges_values(group, torch.device("cpu")):
        over = {native.communicator.description for native in peers.native.values()} or {dist.get_backend(group)}
        return f"native: the collectives of torch.distributed over {' and '.join(sorted(over))}"
    if peers.exchange is not None and peers.exchange.transport:
        return f"{peers.chosen}: {peers.exchange.transport}"
    return f"{peers.chosen}, not connected yet"


def reopen(group: dist.ProcessGroup | None) -> None:
    """Lets the ranks of ``group`` connect again if their exchange was closed by an interrupt or by a failed rank.

    Collective: communicates nothing, but the next call connects only if all ranks have called this.
    """
    group = dist.group.WORLD if group is None and is_initialized() else group
    # For a rank outside of a new group torch returns a number instead of a group.
    if group is None or not isinstance(group, dist.ProcessGroup) or not alive(group):
        return
    peers = peers_of(group)
    if peers.exchange is not None and not peers.exchange.closed:
        return
    # A rank that comes late may have missed several attempts of the other ranks.
    while failure_flags_of(group, peers.attempt).any_failure():
        peers.attempt += 1
    if peers.exchange is not None:
        peers.closed += [peers.exchange, *peers.native.values()]
        peers.exchange = None
        peers.native.clear()
        peers.joins.clear()


def gather_moments(
    moments: Sequence[Tensor],
    count: int | Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    layer_name: str,
    native: NativeCall | None = None,
    micro_batch: int = 0,
) -> Gathered:
    """Gathers the moments of every rank, packed as ``[mean (C), invstd (C), count (1)]``.

    Args:
        moments: of this rank and of one dtype: mean (C) and invstd (C), or both in one tensor (2, C).
        count: values per channel on this rank; may be 0 and may differ between ranks; a tensor () if a mask on the
            device determines it.
        eps: the eps inside ``invstd``; ranks compare it.
        group: the process group; None means this process alone.
        layer_name: the name of the layer, which ranks compare and errors mention.
        native: what :func:`native_call` returned for this forward; None if frames carry the moments.
        micro_batch: as of `Call`.

    Returns:
        The moments of each rank in rank order, with the same bits on every rank.

    Raises:
        SyncNormError: the ranks made different calls, or the collective failed.

    Collective: all ranks of ``group`` must call; one gather.
    """
    first = moments[0]
    if group is None:
        counts = count.view(1, 1) if isinstance(count, Tensor) else [count]
        return Gathered(torch.cat([m.view(-1) for m in moments]).unsqueeze(0), counts, 0)
    channels = first.size(-1)
    if native is not None:
        # full() and not tensor(): a fill is a kernel, while a copy of host memory would synchronize with a GPU.
        packed = count.view(1).to(first.dtype) if isinstance(count, Tensor) else first.new_full((1,), count)
        gathered = gather([*(m.view(-1) for m in moments), packed], native)
        return Gathered(gathered[:, :-1], gathered[:, -1:], native.number)
    exchange = exchange_of(group, first.device)
    assert exchange is not None, "there is no native call"
    number = exchange.calls + 1
    built = peers_of(group).models.built(layer_name)
    call = Call(Kind.FORWARD, layer_name, number, channels, first.dtype, eps, built, micro_batch)
    _check_has_data(first)
    received, counts, joined = exchange(call, moments, int(count))
    for row in joined:
        received[row, channels:] = 1  # the invstd of an empty rank must be finite
    if not first.is_cpu:
        received = received.to(first.device)
    return Gathered(received, counts, number)


def gather_sums(sums: Tensor, group: dist.ProcessGroup, layer_name: str, number: int) -> Tensor:
    """The sums of a backward of each rank: (W, 2C), for a caller that adds them up; else as :func:`reduce_sums`.

    Args:
        sums: (2, C), on the CPU; ``[sum_dy, sum_dy_xmu]``.
        group: a group that exchanges frames.
        layer_name: as for :func:`gather_moments`.
        number: the number that :func:`gather_moments` returned in the forward.
    """
    exchange, built = exchange_of(group, sums.device), peers_of(group).models.built(layer_name)
    assert exchange is not None, "as in the forward"
    return exchange(Call(Kind.BACKWARD, layer_name, number, sums.size(1), sums.dtype, 0.0, built), (sums,)).payloads


@contextmanager
def reduce_sums(
    sums: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    layer_name: str,
    number: int | Tensor,
    kind: Kind = Kind.BACKWARD,
) -> Iterator[Callable[[], Sequence[Tensor]]]:
    """Sums each of ``sums`` over all ranks, in one collective that is in progress while the block runs.

    In the backward these are ``[sum_dy (C), sum_dy_xmu (C)]``. Over gloo every rank receives the sums of the others
    and adds them up: for a few KiB that takes less time than gloo's all_reduce.

    Args:
        sums: vectors of one length and dtype, equally many on all ranks.
        group: the process group; None means this process alone.
        layer_name: as for :func:`gather_moments`.
        number: the number that :func:`gather_moments` returned in the forward; a tensor () on the device of the sums
            if only the device knows it.
        kind: what the sums belong to.

    Yields:
        A function that waits for the sums and returns them. No other collective of the group may start before.

    Raises:
        SyncNormError: at the start or in that function: the ranks made different calls, or the collective failed.

    Collective: all ranks of ``group`` must call; one sum.
    """
    if group is None:
        yield lambda: sums
        return
    first = sums[0]
    known, on_device = (0, number) if isinstance(number, Tensor) else (number, None)
    native = native_call(kind, layer_name, first.numel(), first.dtype, 0.0, group, first.device, known)
    if native is not None:
        yield reduce(sums, native, on_device)
        return
    exchange = exchange_of(group, first.device)
    assert exchange is not None, "there is no native call"
    call = Call(
        kind, layer_name, int(number), first.numel(), first.dtype, built=peers_of(group).models.built(layer_name)
    )
    _check_has_data(first)
    pending = exchange.start(call, sums)
    try:
        yield lambda: pending().payloads.sum(0).to(first.device).chunk(len(sums))
    except BaseException as error:
        pending.abandon(error)
        raise


def _check_has_data(vector: Tensor) -> None:
    if type(vector) is not Tensor:
        raise InputError(
            f"rank {dist.get_rank()}: expected tensors with data, got a {type(vector).__name__}, whose values cannot "
            f"be sent to other ranks. Trace the model, or run it on fake tensors, under "
            f"`with syncnorm.no_sync_stats():`"
        )


def abort_peers(cause: str, message: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Makes the other ranks raise ``cause: message`` where they wait for this rank."""
    with suppress(SyncNormError):  # this rank's own error says more than one about peers that are gone
        exchange = exchange_of(group, device)
        if exchange is not None:
            exchange.abort_peers(f"{cause}: {message}")
        else:
            native_of(group, device).refuse(f"{cause}: {message}")


def abort_peers_with(error: BaseException, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Makes the other ranks raise because this rank is about to raise ``error``; once per error."""
    if group is not None and not is_known_everywhere(error):
        cause = REFUSED if isinstance(error, InputError) else f"it raised {type(error).__name__}"
        abort_peers(cause, str(error), group, device)
        known_everywhere(error)


@contextmanager
def aborting_peers(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """Calls :func:`abort_peers_with` for any error that the block raises."""
    try:
        yield
    except BaseException as error:
        abort_peers_with(error, group, device)
        raise
