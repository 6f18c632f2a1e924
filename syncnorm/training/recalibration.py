"""Precise batch norm: computes running statistics from batches while the weights are fixed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.comm import process_groups
from syncnorm.comm.gather import gather_objects, gather_rows
from syncnorm.errors import InputError, SyncNormError
from syncnorm.layer.window import without_windows
from syncnorm.modules import Synced, TorchSyncBatchNorm
from syncnorm.training.buffers import check_same_layers, running_stats, tracking_layers

_Inputs = Tensor | dict[str, Any]


def recalibrate(model: nn.Module, batches: Iterable[Any], num_batches: int = 200) -> None:
    """Recomputes the running statistics of every batch norm of ``model``, in place (precise BN).

    Running statistics are averages over past steps, whose weights have changed since. Here the weights are fixed, and
    mean and variance are those of all N values per channel that reach a layer, in all batches of all ranks:

        mean = sum(x) / N        var = sum((x - mean)^2) / (N - 1)

    The values are pooled in fp64 with exact counts; batch statistics are not averaged. Meanwhile batch norms run in
    training mode: each batch is normalized by its own statistics, over all ranks if the layer is synced. All other
    modules keep their mode: after ``model.eval()`` there is no dropout. If a layer is called with a ``mask``, only
    positions where it is True count. A layer that receives no values keeps its statistics. ``num_batches_tracked``
    does not change, because it counts training steps.

    Args:
        model: its parameters, modes and hooks do not change; wrapped in DDP or not.
        batches: inputs on the model's device: tensors, tuples or lists whose first item is the input, or dicts of the
            model's keyword arguments. The first ``num_batches`` are used. The number and sizes of batches may differ
            by rank. A rank that runs out participates with empty batches (``x[:0]``, for each tensor of a dict),
            which the model must accept in that case.
        num_batches: the maximum number of batches per rank.

    Raises:
        InputError: no rank has a batch.
        SyncNormError: the ranks hold different layers, or ``batches`` raised on another rank.
        Exception: any error of ``batches`` or of the model. After an error the running statistics are unchanged.

    Collective: all ranks of the default group must call. Before each batch one small collective finds which ranks
    have another, so that all ranks run the same forwards; after the last, one per process group pools all of its
    layers. Plain batch norms are pooled over the default group. Inside ``syncnorm.no_sync_stats`` there are no
    collectives, and each rank pools only its own values.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3; the pooling is by Chan, Golub,
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> recalibrate(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        >>> layer.running_mean.item(), round(layer.running_var.item(), 3)
        (3.0, 6.667)
    """
    layers, world = tracking_layers(model), process_groups.synced_group(None)
    check_same_layers({n: running_stats(m)[0].numel() for n, m in layers.items()}, world, "recalibrate")
    if not layers:
        return
    moments = {layer: _Moments.of(running_stats(layer)[0].unsqueeze(0)[:0]) for layer in layers.values()}
    device = running_stats(next(iter(moments)))[0].device
    saved = [(buffer, buffer.clone()) for layer in moments for buffer in layer.buffers(recurse=False)]
    modes = [(layer, layer.training) for layer in moments]
    hooks = []
    try:
        for layer in moments:
            layer.training = True  # not train(): a dropout inside the layer keeps its mode
            hooks.append(layer.register_forward_hook(functools.partial(_add_input, moments), with_kwargs=True))
        for inputs in _in_lockstep(islice(batches, num_batches), world, device):
            with torch.no_grad(), without_windows(model):
                _ = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        pooled = _pool_over_ranks(moments)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes:
            layer.training = training
        for buffer, value in saved:
            buffer.copy_(value)
    for layer, of_all in pooled.items():
        if of_all.total > 0:
            running_mean, running_var = running_stats(layer)
            running_mean.copy_(of_all.mean)
            running_var.copy_(of_all.m2 / (of_all.total - 1).clamp(min=1))


class _Moments(NamedTuple):
    """The number of values per channel, their mean (C) and their sum of squared deviations from it (C), in fp64."""

    total: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x_NC: Tensor) -> "_Moments":
        """The moments of N values per channel; N may be 0."""
        x_NC = x_NC.double()
        mean = x_NC.sum(0) / max(x_NC.size(0), 1)
        return cls(mean.new_tensor(x_NC.size(0)), mean, (x_NC - mean).square().sum(0))

    def merged(self, other: "_Moments") -> "_Moments":
        """The moments of the union of both sets of values."""
        total = self.total + other.total
        share = other.total / total.clamp(min=1)
        delta = other.mean - self.mean
        return _Moments(total, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.total * share)


def _add_input(
    moments: dict[_BatchNorm, _Moments], layer: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any
) -> None:
    """Adds the layer's input to its moments; a forward hook, which runs after the layer has checked its input."""
    x = args[0] if args else kwargs["input"]
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    values = x.detach().movedim(1, -1)
    values = values.flatten(0, -2) if mask is None else values[mask.expand(values.shape[:-1])]
    moments[layer] = moments[layer].merged(_Moments.of(values))


def _pool_over_ranks(moments: dict[_BatchNorm, _Moments]) -> dict[_BatchNorm, _Moments]:
    """The moments of each layer over the ranks of its group, with one collective per process group."""
    by_group: dict[dist.ProcessGroup | None, list[_BatchNorm]] = {}
    for layer in moments:
        layer_group = layer.process_group if isinstance(layer, Synced | TorchSyncBatchNorm) else None
        by_group.setdefault(process_groups.synced_group(layer_group), []).append(layer)
    pooled = {}
    for group, layers in by_group.items():
        parts = [part for layer in layers for part in moments[layer]]
        rows = gather_rows(torch.cat([part.view(-1) for part in parts]), group, "recalibrate")
        columns = iter(torch.split(rows, [part.numel() for part in parts], dim=1))
        for layer in layers:
            by_rank = zip(next(columns), next(columns), next(columns), strict=True)
            pooled[layer] = functools.reduce(_Moments.merged, (_Moments(*of_rank) for of_rank in by_rank))
    return pooled


def _in_lockstep(batches: Iterator[Any], group: dist.ProcessGroup | None, device: torch.device) -> Iterator[_Inputs]:
    """Yields inputs until no rank has one left; empty ones on a rank that has run out.

    Args:
        batches: of this rank: inputs (a tensor or a dict), or tuples or lists that begin with them.
        group: the ranks that step together; None is this process alone.
        device: for the empty inputs of a rank that had no batch at all.

    Raises:
        InputError: no rank has a batch, or an input of this rank is neither a tensor nor a dict.
        SyncNormError: ``batches`` of another rank raised. The rank itself raises the original error.

    Collective: all ranks of ``group``, one all_gather_object before each step and one after the last.
    """
    empty: _Inputs = {}
    for step in count():
        inputs, error = _next_inputs(batches)
        state = "end" if inputs is None else "batch"
        states = gather_objects(state if error is None else f"{type(error).__name__}: {error}", group, "recalibrate")
        if error is not None:
            raise error
        failed = [rank for rank, text in enumerate(states) if text not in ("batch", "end")]
        if failed:
            raise SyncNormError(f"recalibrate: the batches of rank {failed[0]} raised {states[failed[0]]}")
        if "batch" not in states:
            break
        if step == 0 and group is not None:
            empty = {} if inputs is None else _map_tensors(inputs, lambda x: x[:0].clone())
            if "end" in states:
                by_rank = gather_objects(_map_tensors(empty, Tensor.cpu), group, "recalibrate")
                empty = _map_tensors(by_rank[states.index("batch")], lambda x: x.to(device))
        yield empty if inputs is None else inputs
    if step == 0:
        raise InputError("recalibrate needs batches, but no rank has one")


def _next_inputs(batches: Iterator[Any]) -> tuple[_Inputs | None, Exception | None]:
    """The next inputs, None at the end; and the error that was raised instead, if any."""
    try:
        item = next(batches, None)
        inputs = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(inputs, Tensor | dict | None):
            raise InputError(f"recalibrate expects tensors or dicts of them as inputs, got {type(inputs).__name__}")
    except Exception as error:
        return None, error
    return inputs, None


def _map_tensors(inputs: _Inputs, function: Callable[[Tensor], Tensor]) -> _Inputs:
    """Applies ``function`` to each tensor that has a batch dimension."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return {k: function(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in inputs.items()}
