"""Precise batch norm: running statistics computed anew, from batches, once the weights stand."""

import functools
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.comm import process_groups
from syncnorm.comm.gather import gather_rows
from syncnorm.modules import Synced
from syncnorm.training.layers import check_same, running, tracking
from syncnorm.training.lockstep import in_step


def recalibrate(model: nn.Module, batches: Iterable[Any], num_batches: int = 200) -> None:
    """Computes the running statistics of every batch norm anew, in place: precise BN.

    Running statistics are averages over past steps, of weights that have changed since. Here the weights stand
    still, and mean and variance are those of all N values a channel that reach the layer, of all batches on all
    ranks:

        mean = sum(x) / N        var = sum((x - mean)^2) / (N - 1)

    They are pooled in fp64 with exact counts (not the average of each batch's statistics). Batch norms run as in
    training meanwhile: each batch is normalised by its own statistics, over all ranks where the layer is synced.
    All other modules stay in the mode that they are in: after ``model.eval()`` there is no dropout. What counts is
    the input of the layer, at the positions of its ``mask`` if it gets one. A layer that sees no value keeps its
    statistics. ``num_batches_tracked`` stays as it is: it counts steps of training.

    Args:
        model: its parameters, modes and hooks are left as they were; wrapped in DDP or not.
        batches: inputs, on the model's device: tensors, tuples or lists whose first item is the input, or dicts
            of the model's keyword arguments. The first ``num_batches`` are used. Ranks may have different
            numbers of them, of different sizes; a rank that runs out takes part with batches of no samples
            (``x[:0]``, as of each tensor in a dict), which the model must be able to take then.
        num_batches: at most so many on each rank.

    Raises:
        InputError: no rank has a batch.
        SyncNormError: ranks hold different layers, or another rank's ``batches`` raised.
        Exception: whatever ``batches`` or the model raise. Running statistics are always as they were.

    Collective: all ranks of the default group must call. One small one before each batch says which ranks have
    another, so that all run the same forwards; then one for all layers of a process group. Plain batch norms are
    pooled over the default group. Inside ``syncnorm.no_sync_stats`` there are none, and each rank pools alone.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3; the pooling is by Chan, Golub,
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> recalibrate(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        >>> layer.running_mean.item(), round(layer.running_var.item(), 3)
        (3.0, 6.667)
    """
    layers, world = tracking(model), process_groups.synced_group(None)
    check_same(layers, world, "recalibrate")
    if not layers:
        return
    seen = {layer: Moments.of(running(layer)[0].unsqueeze(0)[:0]) for layer in layers.values()}
    device = running(next(iter(seen)))[0].device
    kept = [(buffer, buffer.clone()) for layer in seen for buffer in layer.buffers(recurse=False)]
    modes = [(layer, layer.training) for layer in seen]
    hooks = []
    try:
        for layer in seen:
            layer.training = True  # not train(): a dropout inside it keeps its mode
            hooks.append(layer.register_forward_hook(functools.partial(_watch, seen), with_kwargs=True))
        for inputs in in_step(islice(batches, num_batches), world, device):
            with torch.no_grad():
                _ = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        pooled = _over_ranks(seen)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes:
            layer.training = training
        for buffer, value in kept:
            buffer.copy_(value)
    for layer, of_all in pooled.items():
        if of_all.total > 0:
            running_mean, running_var = running(layer)
            running_mean.copy_(of_all.mean)
            running_var.copy_(of_all.m2 / (of_all.total - 1).clamp(min=1))


class Moments(NamedTuple):
    """Of some values a channel, in fp64: how many, their mean (C), the sum of squared distances from it (C)."""

    total: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x_NC: Tensor) -> "Moments":
        """Of N values a channel; N may be 0."""
        x_NC = x_NC.double()
        mean = x_NC.sum(0) / max(x_NC.size(0), 1)
        return cls(mean.new_tensor(x_NC.size(0)), mean, (x_NC - mean).square().sum(0))

    def merged(self, other: "Moments") -> "Moments":
        """Of the values of both."""
        total = self.total + other.total
        share = other.total / total.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(total, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.total * share)


def _watch(
    seen: dict[_BatchNorm, Moments], layer: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any
) -> None:
    """A forward hook, for by then the layer has judged its input, and with the other ranks."""
    x = args[0] if args else kwargs["input"]
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    values = x.detach().movedim(1, -1)
    values = values.flatten(0, -2) if mask is None else values[mask.expand(values.shape[:-1])]
    seen[layer] = seen[layer].merged(Moments.of(values))


def _over_ranks(seen: dict[_BatchNorm, Moments]) -> dict[_BatchNorm, Moments]:
    """Each layer's moments over its ranks: one collective a process group."""
    by_group: dict[dist.ProcessGroup | None, list[_BatchNorm]] = {}
    for layer in seen:
        own = layer.process_group if isinstance(layer, Synced | nn.SyncBatchNorm) else None
        by_group.setdefault(process_groups.synced_group(own), []).append(layer)
    pooled = {}
    for group, layers in by_group.items():
        packed = torch.cat([part.view(-1) for layer in layers for part in seen[layer]])
        rows = gather_rows(packed, group, "recalibrate")
        columns = iter(torch.split(rows, [part.numel() for layer in layers for part in seen[layer]], dim=1))
        for layer in layers:
            ranks = zip(next(columns), next(columns), next(columns), strict=True)
            pooled[layer] = functools.reduce(Moments.merged, (Moments(*of_rank) for of_rank in ranks))
    return pooled
