"""Batch norm in training over this process's batch alone: ``F.batch_norm`` with ``nn.BatchNorm``'s bookkeeping."""

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.layer import checkpointing, kernels
from syncnorm.layer.arguments import NoGradArgs
from syncnorm.layer.checks import shape, where
from syncnorm.layer.global_moments import global_moments
from syncnorm.layer.moments import statistics_dtype


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
    """The output; updates ``args.running``, once if a checkpoint runs the forward again.

    Raises:
        InputError: the batch has one value per channel.
    """
    if input.numel() == input.size(1):
        raise InputError(f"{where()}expected more than 1 value per channel, got input of {shape(input)}")
    if input.numel() > 0 and (args.sync.graph_owners or checkpointing.in_backward()):
        return _checkpointed(input, weight, bias, args)
    running = args.running
    if running is None:
        return F.batch_norm(input, None, None, weight, bias, True, 0.0, args.eps)
    momentum, num_batches_tracked = running.momentum, running.num_batches_tracked
    if num_batches_tracked is not None and input.numel() > 0:
        num_batches_tracked.add_(1)
    if momentum is None:
        assert num_batches_tracked is not None  # functional checks it
        momentum = 1.0 / max(int(num_batches_tracked), 1)
    return F.batch_norm(input, running.mean, running.var, weight, bias, True, momentum, args.eps)


def _checkpointed(input: Tensor, weight: Tensor | None, bias: Tensor | None, args: NoGradArgs) -> Tensor:
    """The same of a batch that a checkpoint may run again in the backward, where it must not count twice."""
    if checkpointing.in_backward():
        # Before the output: saving a tensor for the backward may end a recomputation, by an exception.
        with torch.no_grad():
            x = kernels.dense(input, kernels.memory_format(input))
            global_moments(
                kernels.moments_of(x, args.eps, torch.empty_like(x), None), args.eps, args.sync, args.running
            )
    output, mean, invstd = torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, args.eps)
    if not checkpointing.in_backward():
        mean, invstd = (v.detach().to(statistics_dtype(input.dtype)) for v in (mean, invstd))
        local = mean, invstd, input.numel() // input.size(1)
        global_moments(local, args.eps, args.sync, args.running, node=output.grad_fn)
    return output
