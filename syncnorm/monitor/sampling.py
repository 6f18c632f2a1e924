"""What a rank records in a sampled step, and how the records of all ranks are gathered.

Shapes: W = ranks, C = channels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.comm import Call, process_groups
from syncnorm.comm.gather import gather_rows
from syncnorm.layer.moments import statistics_dtype
from syncnorm.modules import Synced, TorchSyncBatchNorm
from syncnorm.monitor.divergence import bit_digest, rank_divergence
from syncnorm.monitor.findings import LayerSample, Sample

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class InputMoments(NamedTuple):
    """Of a layer's input: values per channel, mean (C), biased variance (C); on the input's device."""

    num_values: int
    mean: Tensor
    var: Tensor


class RankSample:
    """One step on this rank: moments of each layer's first input, waits, and buffers after the forward."""

    def __init__(self) -> None:
        self.moments: dict[nn.Module, InputMoments] = {}
        self.wait_s: defaultdict[str, float] = defaultdict(float)  # by the name that the layer has among ranks
        self.buffers: dict[nn.Module, list[Tensor]] = {}
        self.forward_began = 0.0  # of DDP, on the clock of time.perf_counter
        self.broadcast_s = 0.0  # between the beginnings of DDP's forward and the model's

    def record_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of each layer."""
        # A second input is that of another micro-batch or of a recomputed forward.
        if module.training and module not in self.moments and observable():
            x = args[0] if args else kwargs["input"]
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            if isinstance(x, Tensor) and x.dim() >= 2 and x.is_floating_point():
                self.moments[module] = input_moments(x, mask)

    def record_wait(self, call: Call, seconds: float) -> None:
        """An observer of ``comm.call.observers``."""
        self.wait_s[call.layer] += seconds

    def record_buffers(self, layers: Iterable[_BatchNorm]) -> None:
        """Saves the running statistics after a forward, because DDP makes them equal before the next one."""
        self.buffers = {layer: [b.detach().clone() for b in buffers_of(layer)] for layer in layers}

    def record_broadcast(self) -> None:
        """To be called when the forward of the model inside DDP begins."""
        self.broadcast_s += time.perf_counter() - self.forward_began


def buffers_of(layer: _BatchNorm) -> list[Tensor]:
    """The layer's running statistics in the order of `BUFFERS`, with an empty tensor for each that is None."""
    buffers = (getattr(layer, name) for name in BUFFERS)
    return [torch.empty(0) if buffer is None else buffer for buffer in buffers]


def observable() -> bool:
    """Whether the current forward runs eagerly on all ranks: not traced, not captured, not in ``no_sync_stats``."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return process_groups.syncing() and not torch.compiler.is_compiling() and not capturing


@torch.no_grad()
def input_moments(x: Tensor, mask: Tensor | None = None) -> InputMoments:
    """The moments of ``x`` (N, C, *spatial), at the positions where ``mask`` is True if there is one."""
    values = x.detach().to(statistics_dtype(x.dtype))
    if mask is not None:
        values = values.movedim(1, -1)[mask.expand(x.size(0), *x.shape[2:])]
    if values.numel() == 0:
        zeros = values.new_zeros(x.size(1))
        return InputMoments(0, zeros, zeros)
    var, mean = torch.var_mean(values, [d for d in range(values.dim()) if d != 1], correction=0)
    return InputMoments(values.numel() // x.size(1), mean, var)


def gather_sample(
    step: int,
    step_s: float,
    rank_sample: RankSample,
    layers: Mapping[str, _BatchNorm],
    group: dist.ProcessGroup | None,
) -> Sample:
    """Gathers what all ranks recorded in one step; the result is the same on every rank.

    Collective: all ranks of ``group``, a gloo group: one all_gather.
    """
    with torch.device("cpu"):  # the job may have set another default device
        numbers = [torch.tensor([step_s, rank_sample.broadcast_s], dtype=torch.float64)]
        for layer in layers.values():
            numbers += _numbers(layer, rank_sample)
        rows = gather_rows(torch.cat(numbers), group, "syncnorm.monitor.monitor")
        columns = iter(torch.split(rows, [n.numel() for n in numbers], dim=1))
        step_ms, ddp_wait_ms = (tuple(times.tolist()) for times in next(columns).T * 1e3)
        samples = tuple(_layer_sample(name, layer, columns) for name, layer in layers.items())
        return Sample(step, step_ms, ddp_wait_ms if any(ddp_wait_ms) else None, samples)


def _numbers(layer: _BatchNorm, rank_sample: RankSample) -> list[Tensor]:
    """What is gathered of one layer: five scalars, mean (C), var (C), all fp64 on the host."""
    name = layer.sync_name(process_groups.synced_group(layer.process_group)) if isinstance(layer, Synced) else ""
    wait_s = rank_sample.wait_s.get(name, -1.0)  # negative if unknown
    buffers = buffers_of(layer)
    digests = [bit_digest(*both) for both in zip(buffers, rank_sample.buffers.get(layer, buffers), strict=True)]
    zeros = torch.zeros(num_channels(layer), dtype=torch.float64)
    num_values, mean, var = rank_sample.moments.get(layer, InputMoments(0, zeros, zeros))
    scalars = torch.tensor([float(num_values), wait_s, *digests], dtype=torch.float64)
    return [scalars, mean.double().cpu(), var.double().cpu()]


def num_channels(layer: _BatchNorm) -> int:
    """The layer's current number of channels; pruning does not update ``num_features``."""
    tensor = layer.weight if layer.running_mean is None else layer.running_mean
    return layer.num_features if tensor is None else tensor.numel()


def _layer_sample(name: str, layer: _BatchNorm, columns: Iterator[Tensor]) -> LayerSample:
    scalars_W5, means_WC, vars_WC = next(columns), next(columns), next(columns)
    counts_W, wait_s_W, digests_W3 = scalars_W5[:, 0], scalars_W5[:, 1], scalars_W5[:, 2:]
    ran = bool(counts_W.any())
    divergence = rank_divergence(means_WC, vars_WC, counts_W) if ran else None
    # JSON has no NaN.
    of_mean, of_var = (None if value != value else value for value in divergence or (None, None))
    return LayerSample(
        name=name,
        synced=isinstance(layer, Synced | TorchSyncBatchNorm),
        ran=ran,
        spread_mean=of_mean,
        spread_var=of_var,
        wait_ms=tuple((wait_s_W * 1e3).tolist()) if bool((wait_s_W >= 0).all()) else None,
        differing=tuple(
            name
            for name, digests_W in zip(BUFFERS, digests_W3.T, strict=True)
            if bool((digests_W != digests_W[0]).any())
        ),
    )
