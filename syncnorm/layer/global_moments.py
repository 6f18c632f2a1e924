"""From the moments of this rank's batch to those of the global batch: gather or sum, merge, check, remember."""

from typing import Any

import torch
from torch import Tensor

from syncnorm import comm
from syncnorm.errors import SyncNormError
from syncnorm.layer import checkpointing, global_sums, kernels, moments
from syncnorm.layer.arguments import ForwardCall, Sync
from syncnorm.layer.checks import check_count
from syncnorm.layer.moments import Count


def global_moments(
    local: tuple[Tensor, Tensor, Count],
    eps: float,
    sync: Sync,
    running: moments.Running | None = None,
    *,
    node: Any = None,
    tracks: bool = False,
) -> tuple[checkpointing.ForwardStatistics, bool]:
    """The statistics of the global batch; updates ``running`` with them.

    A checkpointed forward that is recomputed gets the statistics of its first run, without a gather, and updates
    only what the first run did not.

    Args:
        local: ``(mean (C), invstd (C), count)`` of this rank's batch, the count in values per channel.
        eps: inside ``invstd``.
        sync: all ranks of its group must call.
        running: the running statistics to update, or None.
        node: of the autograd graph that the statistics are for; it keeps the record of a checkpointed forward alive.
        tracks: True if the caller updates running statistics itself.

    Returns:
        The statistics, and whether running statistics are to be updated with them.

    Raises:
        InputError: the global batch has one value per channel; ``running`` is unchanged.
        SyncNormError: as ``comm.gather_moments``.
    """
    mean, invstd, count = local
    moves, counts = (1, True) if tracks else checkpointing.updates_of(running)
    recomputed = checkpointing.in_backward()
    fingerprint, local_count = mean, 0
    if sync.graph_owners or recomputed:
        fingerprint, local_count = torch.stack([mean, invstd]), _known_to_the_host(count)
    if recomputed:
        first = None
        if not mean.is_cpu:
            first = checkpointing.only_candidate(sync.layer_name, mean.numel(), local_count)
        if first is None:
            first = checkpointing.lookup(sync.layer_name, fingerprint, local_count, moves)
        if first is not None:
            return first, first.complete(running, moves, counts)
        if checkpointing.recomputes_in_step(sync.layer_name):
            raise SyncNormError(
                f"a checkpoint has recomputed a forward of {sync.layer_name} with an input that none of the "
                f"micro-batches of its first run had: the checkpointed function must compute the same again"
            )
        if sync.group is None and checkpointing.known(sync.layer_name):
            running = None  # the input is too far from the first one to be recognized, but was counted then
    window = None if recomputed else sync.window
    micro_batch = 0 if window is None else window.begin(mean)
    (merged_mean, merged_invstd, var, total), number = _merged(
        local, eps, sync, running if window is None else None, micro_batch
    )
    present = total
    if window is not None:
        present = total - window.count
        window.add(micro_batch, merged_mean, merged_invstd, total, (node, *sync.graph_owners))
        if running is not None:
            window.track(running, merged_mean, var, total)
    call = ForwardCall(present, sync.group, sync.layer_name, number, window)
    record = checkpointing.ForwardStatistics(merged_mean, merged_invstd, var, total, call)
    record.note(moves, counts)
    if sync.graph_owners:
        checkpointing.remember(record, fingerprint, local_count, sync.graph_owners, node)
    return record, moves != 0


def _merged(
    local: tuple[Tensor, Tensor, Count],
    eps: float,
    sync: Sync,
    running: moments.Running | None,
    micro_batch: int,
) -> tuple[tuple[Tensor, Tensor, Tensor, Count], int]:
    """``(mean, invstd, var, count)`` of the global batch, and the number of the call. One gather, or one sum.

    From micro-batch 1 on also of the earlier ones in the window; 0 stands for no window.
    """
    mean, invstd, count = local
    group, name = sync.group, sync.layer_name
    native = None
    if group is not None:
        kind = comm.Kind.FORWARD
        native = comm.native_call(
            kind, name, mean.numel(), mean.dtype, eps, group, mean.device, micro_batch=micro_batch
        )
    if native is not None and native.sums:
        summed = native.sum_(global_sums.pack_sums_of_moments(mean, invstd, count, eps, native.tag))
        if micro_batch == 0:
            check_count(summed[:1], count)
        merged = global_sums.from_sums(summed, eps, native.tag_sum, native.mismatch, native.reported, running)
        if micro_batch == 0:
            return merged, native.number
        gathered = comm.Gathered(torch.cat(merged[:2]).unsqueeze(0), summed[:1].view(1, 1), native.number)
    else:
        gathered = comm.gather_moments((mean, invstd), count, eps, group, name, native, micro_batch)
    rows, counts, number = gathered
    if sync.window is not None and micro_batch > 0:
        rows, counts = sync.window.with_earlier(rows, counts)
    check_count(counts, count)
    merge = kernels.passes_for(mean).merge
    return merge(rows, counts, eps, running), number


def _known_to_the_host(count: Count) -> int:
    """The count, unless the host would have to wait for it."""
    return int(count) if isinstance(count, int) or count.is_cpu else checkpointing.UNKNOWN
