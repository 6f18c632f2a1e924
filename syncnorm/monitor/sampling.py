"""What a rank notes in a step that is sampled, and how the ranks' notes become one record.

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
from syncnorm.modules import Synced
from syncnorm.monitor.bits import bits_of
from syncnorm.monitor.divergence import spread
from syncnorm.monitor.findings import LayerSample, Sample

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Moments(NamedTuple):
    """Of what a layer was given: values a channel, mean (C), biased variance (C); on their device."""

    values: int
    mean: Tensor
    var: Tensor


class Notes:
    """This rank's step: moments of each layer's first input, seconds waited, buffers after the forward."""

    def __init__(self) -> None:
        self.moments: dict[nn.Module, Moments] = {}
        self.waited: defaultdict[str, float] = defaultdict(float)
        self.buffers: dict[nn.Module, list[Tensor]] = {}
        self.entered = self.broadcast = 0.0  # when DDP's forward began; seconds until the model's did

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """For a forward pre-hook of each layer."""
        # A second input is another micro-batch, or the same one, computed again.
        if module.training and module not in self.moments and observable():
            x = args[0] if args else kwargs["input"]
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            if isinstance(x, Tensor) and x.dim() >= 2 and x.is_floating_point():
                self.moments[module] = moments_of(x, mask)

    def wait(self, call: Call, seconds: float) -> None:
        """For ``comm.call.observers``."""
        self.waited[call.layer] += seconds

    def after_forward(self, layers: Iterable[_BatchNorm]) -> None:
        """Keeps running statistics as the forward left them: DDP makes them equal before any next one."""
        self.buffers = {layer: [b.detach().clone() for b in buffers_of(layer)] for layer in layers}

    def after_broadcast(self) -> None:
        """When the model's forward begins, inside DDP's."""
        self.broadcast += time.perf_counter() - self.entered


def buffers_of(layer: _BatchNorm) -> list[Tensor]:
    """Its running statistics, in the order of `BUFFERS`; an empty tensor for what it does not keep."""
    found = (getattr(layer, name) for name in BUFFERS)
    return [torch.empty(0) if buffer is None else buffer for buffer in found]


def observable() -> bool:
    """Whether a forward is eager code that all ranks run: not traced, not captured, not this rank's alone."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return process_groups.syncing() and not torch.compiler.is_compiling() and not capturing


@torch.no_grad()
def moments_of(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Of ``x`` (N, C, *spatial); of the positions where ``mask`` is True, if there is one."""
    values = x.detach().to(statistics_dtype(x.dtype))
    if mask is not None:
        values = values.movedim(1, -1)[mask.expand(x.size(0), *x.shape[2:])]
    if values.numel() == 0:
        zeros = values.new_zeros(x.size(1))
        return Moments(0, zeros, zeros)
    var, mean = torch.var_mean(values, [d for d in range(values.dim()) if d != 1], correction=0)
    return Moments(values.numel() // x.size(1), mean, var)


def gather_sample(
    step: int, seconds: float, notes: Notes, layers: Mapping[str, _BatchNorm], group: dist.ProcessGroup | None
) -> Sample:
    """All ranks' notes on one step, the same record on every rank.

    Collective: all ranks of ``group``, a gloo group: one all_gather.
    """
    with torch.device("cpu"):  # whatever the job's default device is
        numbers = [torch.tensor([seconds, notes.broadcast], dtype=torch.float64)]
        for layer in layers.values():
            numbers += _numbers(layer, notes)
        rows = gather_rows(torch.cat(numbers), group, "syncnorm.monitor.monitor")
        columns = iter(torch.split(rows, [n.numel() for n in numbers], dim=1))
        step_ms, ddp_wait_ms = (tuple(times.tolist()) for times in next(columns).T * 1e3)
        samples = tuple(_layer_sample(name, layer, columns) for name, layer in layers.items())
        return Sample(step, step_ms, ddp_wait_ms if any(ddp_wait_ms) else None, samples)


def _numbers(layer: _BatchNorm, notes: Notes) -> list[Tensor]:
    """Of one layer: scalars, mean (C), var (C), all fp64 on the host."""
    name = layer.sync_name(process_groups.synced_group(layer.process_group)) if isinstance(layer, Synced) else ""
    waited = notes.waited.get(name, -1.0)
    now = buffers_of(layer)
    digests = [bits_of(*both) for both in zip(now, notes.buffers.get(layer, now), strict=True)]
    nothing = torch.zeros(width(layer), dtype=torch.float64)
    values, mean, var = notes.moments.get(layer, Moments(0, nothing, nothing))
    scalars = torch.tensor([float(values), waited, *digests], dtype=torch.float64)
    return [scalars, mean.double().cpu(), var.double().cpu()]


def width(layer: _BatchNorm) -> int:
    """Channels that the layer holds, which pruning may have made fewer than it was built with."""
    held = layer.weight if layer.running_mean is None else layer.running_mean
    return layer.num_features if held is None else held.numel()


def _layer_sample(name: str, layer: _BatchNorm, columns: Iterator[Tensor]) -> LayerSample:
    scalars_W5, means_WC, vars_WC = next(columns), next(columns), next(columns)
    counts_W, waited_W, digests_W3 = scalars_W5[:, 0], scalars_W5[:, 1], scalars_W5[:, 2:]
    ran = bool(counts_W.any())
    apart = spread(means_WC, vars_WC, counts_W) if ran else None
    return LayerSample(
        name=name,
        synced=isinstance(layer, Synced | nn.SyncBatchNorm),
        ran=ran,
        spread_mean=_number(apart.mean if apart else None),
        spread_var=_number(apart.var if apart else None),
        wait_ms=tuple((waited_W * 1e3).tolist()) if bool((waited_W >= 0).all()) else None,
        differing=tuple(b for b, of in zip(BUFFERS, digests_W3.T, strict=True) if bool((of != of[0]).any())),
    )


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else value  # JSON knows no NaN
