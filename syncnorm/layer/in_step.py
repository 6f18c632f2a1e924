"""The layer over micro-batches that run in step: statistics of all of them, and of all ranks, in one graph.

A call of the layer for one of K micro-batches makes two nodes of autograd's graph, and between them there is one for
all micro-batches:

    x_1 -> _Moments --+                      +-> _Normalize(x_1) -> y_1
    x_2 -> _Moments --+--> _WholeBatch ------+-> _Normalize(x_2) -> y_2
    x_K -> _Moments --+    gather, merge     +-> _Normalize(x_K) -> y_K

In the backward, ``_Normalize`` sends the sums of its micro-batch to ``_WholeBatch`` in place of a gradient. That node
adds up those of all micro-batches (autograd does) and of all ranks, and sends the totals on to each ``_Moments``,
which computes dx. Autograd therefore waits for all micro-batches at each layer, in one ordinary backward.

Shapes: C = channels, K = micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm import comm
from syncnorm.errors import InputError, SyncNormError
from syncnorm.layer import checkpointing, kernels, micro_batches, moments
from syncnorm.layer.arguments import ForwardCall, NoGradArgs
from syncnorm.layer.global_moments import global_moments
from syncnorm.layer.moments import Count, count_column, statistics_dtype

T = TypeVar("T")

NOT_IN_THE_LOSS = (
    "the loss does not depend on the output of a synced layer for one of the micro-batches that ran in step, but it "
    "does for another one, which shares its statistics. Use all of them in one loss, some with weight 0 if need be"
)


@dataclass(frozen=True)
class Request:
    """What one micro-batch comes with to a layer.

    Attributes:
        local: mean and invstd of its values, (2, C), in autograd's graph.
        count: its values per channel.
        args: of the call.
    """

    local: Tensor
    count: Count
    args: NoGradArgs

    def __str__(self) -> str:
        dtype = str(self.local.dtype).removeprefix("torch.")
        return (
            f"{self.args.sync.layer_name} ({self.local.size(1)} channels, {dtype} statistics, eps {self.args.eps:g})"
        )


@dataclass
class _Link:
    """What the backward of ``_Normalize`` leaves for that of ``_Moments``: ``(dy, x, weight, mean, invstd)``."""

    total_count: Count = 0
    left: tuple[Tensor, ...] | None = None


def run(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Runs the functions in step, with the synced layers that they call over all of them; see ``micro_batches``.

    Raises:
        InputError: under a transform of ``torch.func``, or in a micro-batch that already runs in step.
        SyncNormError: the functions call different layers, in a checkpoint around this call, or as the layer.
        BaseException: what a function raised; ranks that wait for this one raise as well.
    """
    check_surroundings()
    return micro_batches.run_in_step(functions, _meet, _tell_ranks)


def check_surroundings() -> None:
    """Raises the errors of :func:`run` for the place of the call."""
    # In the forward of a function without gradients, as a reentrant checkpoint is, nothing would be remembered.
    repeated = not torch.is_grad_enabled() and bool(checkpointing.graph_owners())
    if repeated or checkpointing.in_backward():
        raise SyncNormError(
            "torch.utils.checkpoint runs micro-batches in step once more in a backward: call it inside of the model "
            "or function that is divided, not around it"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError("micro-batches cannot run in step under a transform of torch.func: transform inside of them")


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
    """The output for the micro-batch that this thread runs; waits for the others."""
    micro_batch = micro_batches.current()
    assert micro_batch is not None
    link = _Link()
    x = input.detach()
    local = kernels.moments_of(
        kernels.dense(x, kernels.memory_format(x)), args.eps, torch.empty_like(x), args.padding
    )
    statistics = _Moments.apply(input, torch.stack(local[:2]), link)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    del x
    whole, record = micro_batch.meet(Request(statistics, local[2], args))
    link.total_count = record.call.total_count
    output = _Normalize.apply(whole, input, weight, bias, record.call, link)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    _remember(record, local, args, output.grad_fn)
    return output  # type: ignore[no-any-return]  # torch leaves it untyped


def _remember(
    record: checkpointing.ForwardStatistics, local: tuple[Tensor, Tensor, Count], args: NoGradArgs, node: Any
) -> None:
    """Keeps the statistics for a checkpoint that runs this micro-batch's forward again."""
    moves, counts = checkpointing.updates_of(args.running)
    own = checkpointing.ForwardStatistics(record.mean, record.invstd, record.var, record.count, record.call)
    own.note(moves, counts)
    if args.sync.graph_owners:
        mean, invstd, count = local
        known = int(count) if isinstance(count, int) or count.is_cpu else checkpointing.UNKNOWN
        checkpointing.remember(own, torch.stack([mean, invstd]), known, args.sync.graph_owners, node)


def _meet(requests: list[Any]) -> list[Any]:
    """The statistics of all micro-batches and ranks, for each of the micro-batches."""
    names = [str(request) for request in requests]
    if len(set(names)) > 1:
        raise SyncNormError(micro_batches.different_layers(dict(enumerate(names))))
    record = _whole_batch(requests)
    whole = _WholeBatch.apply(record, *(request.local for request in requests))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return [(whole, record)] * len(requests)


@torch.no_grad()
def _whole_batch(requests: list[Request]) -> checkpointing.ForwardStatistics:
    first = requests[0]
    eps, running = first.args.eps, first.args.running
    sync = first.args.sync._replace(graph_owners=(), window=None)  # the batch is whole
    rows = torch.stack([request.local.flatten() for request in requests])
    known = [request.count for request in requests if isinstance(request.count, int)]
    counts = known if len(known) == len(requests) else count_column([request.count for request in requests], rows)
    mean, var_eps, count = moments.merge(rows, counts, eps)
    dtype = first.local.dtype
    local = mean.to(dtype), var_eps.rsqrt().to(dtype), count
    record, _ = global_moments(local, eps, sync, running)
    record.call = record.call._replace(in_step=True)
    return record


def _tell_ranks(error: BaseException, waiting: list[Any]) -> None:
    """Makes the ranks that wait for this one at a layer raise."""
    for request in waiting[:1]:
        comm.abort_peers_with(error, request.args.sync.group, request.local.device)


class _Moments(torch.autograd.Function):
    """From the input to its statistics; the backward is the last step of the layer's."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, statistics: Tensor, link: _Link) -> Tensor:
        ctx.link = link
        return statistics.view_as(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, totals: Tensor) -> tuple[Tensor | None, ...]:
        link: _Link = ctx.link
        if link.left is None:
            raise SyncNormError(NOT_IN_THE_LOSS)
        dy, x, weight, mean, invstd = link.left
        link.left = None
        if x.numel() == 0:
            return torch.empty_like(x), None, None
        passes = kernels.passes_for(x, dy, weight)
        sum_dy, sum_dy_xmu = totals.unbind(0)
        begun = passes.begin_grad(dy, invstd, weight)
        return passes.finish_grad(begun, x, mean, invstd, weight, sum_dy, sum_dy_xmu, link.total_count), None, None


class _WholeBatch(torch.autograd.Function):
    """From the statistics of each micro-batch to those of all, on all ranks. Collective: in the backward one sum."""

    @staticmethod
    def forward(ctx: Any, record: checkpointing.ForwardStatistics, *locals: Tensor) -> Tensor:
        ctx.call, ctx.num_parts = record.call, len(locals)
        return torch.stack([record.mean, record.invstd])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        checkpointing.backward_begins()
        call: ForwardCall = ctx.call
        with (
            comm.aborting_peers(call.group, sums.device),
            comm.reduce_sums(list(sums.unbind(0)), call.group, call.layer_name, call.number) as finish,
        ):
            totals = torch.stack(list(finish()))
        return None, *(totals,) * ctx.num_parts


class _Normalize(torch.autograd.Function):
    """From the input and the statistics of all to the output."""

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: ForwardCall,
        link: _Link,
    ) -> Tensor:
        mean, invstd = whole.unbind(0)
        ctx.call, ctx.link = call, link
        ctx.bias_dtype = None if bias is None else bias.dtype
        # As SyncBatchNormFunction does: a checkpoint that runs the forward again calls that one.
        ctx.save_for_backward(input, weight, mean, invstd)
        x = kernels.dense(input, kernels.memory_format(input))
        y = torch.empty_like(x)
        return kernels.passes_for(x, weight, bias).normalize(x, mean, invstd, weight, bias, y) if x.numel() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with comm.aborting_peers(ctx.call.group, dy.device):
            input, weight, mean, invstd = ctx.saved_tensors
            mean, invstd = (v.to(statistics_dtype(input.dtype)) for v in (mean, invstd))
            x = kernels.dense(input, kernels.memory_format(input))
            dy = kernels.dense(dy, kernels.memory_format(x))
            if x.numel() > 0:
                sum_dy, sum_dy_xmu = kernels.passes_for(x, dy, weight).reduce_grad(dy, x, mean, invstd)
            else:
                sum_dy, sum_dy_xmu = torch.zeros_like(mean), torch.zeros_like(mean)
            _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:4]
            if needs_x:
                ctx.link.left = dy, x, weight, mean, invstd
            d_weight = (sum_dy_xmu * invstd).to(weight.dtype) if needs_weight else None
            d_bias = sum_dy.to(ctx.bias_dtype) if needs_bias else None
            return torch.stack([sum_dy, sum_dy_xmu]), None, d_weight, d_bias, None, None
