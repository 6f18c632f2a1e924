"""Batch normalization over the batch of all ranks.

Read from top to bottom: what a user calls; the checks; the choice of a path. The usual path in training is
``layer.autograd``: local moments, one gather, merge, normalize; in the backward reduce, one sum, apply. On a GPU
``layer.device_step`` does the same in few kernels.

Shapes: C = channels, W = ranks of the group, N = values per channel over all ranks.
Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the derivatives after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from syncnorm import comm
from syncnorm._torch_versions import graph_break, outside_of_graphs
from syncnorm.comm import process_groups
from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.errors import REFUSED, InputError, SyncNormError
from syncnorm.layer import checkpointing, checks, device_step, func_transforms, in_step, local, micro_batches
from syncnorm.layer.arguments import NoGradArgs, Sync
from syncnorm.layer.autograd import SyncBatchNormFunction, has_own_class, plain_tensor
from syncnorm.layer.moments import Running
from syncnorm.layer.window import IN_GRAPH, Window


@graph_break
def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroupLike = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    num_batches_tracked: Tensor | None = None,
    layer_name: str = "sync_batch_norm",
    window: Window | None = None,
) -> Tensor:
    """``F.batch_norm`` over the batches of all ranks, as if they were one.

    Args:
        input: (batch, C, *spatial), floating, 2-D or more; the batch may differ by rank and may be 0.
        running_mean: (C), updated in place in training; None for none.
        running_var: (C), likewise, unbiased over N.
        weight: (C) or None. Its gradient is that of this rank; DDP reduces it like any other.
        bias: (C) or None, likewise.
        training: normalize with the statistics of the batch. In evaluation there is no communication.
        momentum: weight of this batch in the running statistics; None averages over ``num_batches_tracked``.
        eps: added to the biased variance.
        process_group: a ProcessGroup or 1-D DeviceMesh. None is the default group; without one, or in a group
            of one rank, this is ``F.batch_norm``.
        mask: boolean, broadcastable to (batch, *spatial), True where a position counts. The values at other positions
            are ignored, and output and gradient are zero there. Ranks may have different numbers of positions that
            count, or none.
        residual: added to the output, as a residual block does with its shortcut; of a shape that broadcasts to it.
        relu: return the positive part of the sum. On a GPU with Triton, normalization, sum and ReLU are one pass
            (``syncnorm.layer.device_step``); elsewhere sum and ReLU work in place.
        num_batches_tracked: int64 scalar, incremented in training unless all ranks are empty.
        layer_name: the name by which ranks distinguish their calls and errors name the layer.
        window: the earlier micro-batches of a layer that was converted with ``accumulate``; None for none.

    Returns:
        Like ``input``: same shape, dtype and memory format.

    Raises:
        InputError: a wrong shape, dtype or option, which the other ranks raise as well; fewer than two values per
            channel over all ranks (not checked with a mask on a GPU, where the host would have to wait); a rank
            outside of the group. Running statistics are unchanged.
        SyncNormError: the ranks called different layers, or another rank had a wrong input, failed or died.

    Collective: in training all ranks of the group must call, in the same order of layers: one all_gather of
        2C + 1 numbers, in the backward one all_reduce of 2C, in a double backward one of 5C; over gloo, each of
        these is one exchange of frames (``syncnorm.comm``). A rank takes part in a backward if its input, weight or
        bias requires a gradient, so they must require the same on all ranks.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = sync_batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
        >>> y.mean().abs().item() < 1e-6
        True
    """
    group = process_groups.synced_group(process_groups.resolve(process_group)) if training else None
    try:
        checks.check_tensor(input)
        checks.check_input(input)
        checks.check_mask(input, mask)
        running = running_of(running_mean, running_var, num_batches_tracked, momentum)
        sync = Sync(group, layer_name, window=window)
        return batch_norm_over(
            input, weight, bias, running,
            training=training, eps=eps, sync=sync, mask=mask, residual=residual, relu=relu,
        )  # fmt: skip
    except BaseException as error:
        abort_peers_with(error, group, device_of(running_mean, weight, bias, input))
        raise


def batch_norm_over(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    *,
    training: bool,
    eps: float,
    sync: Sync,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`sync_batch_norm` of an input that has passed its checks, over the ranks of ``sync``."""
    if not torch.compiler.is_compiling() and has_own_class(input):
        if torch._C._is_torch_function_enabled():
            # As in torch's own functions: a tensor subclass, such as one with metadata, decides what its output is.
            return handle_torch_function(
                batch_norm_over, (input,), input, weight, bias, running,
                training=training, eps=eps, sync=sync, mask=mask, residual=residual, relu=relu,
            )  # fmt: skip
        input = plain_tensor(input)
    mean, var = (None, None) if running is None else (running.mean, running.var)
    checks.check_vectors(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
    checks.check_residual(input, residual)
    args, padding = None, None
    if training:
        if sync.window is not None and torch.compiler.is_compiling():
            raise InputError(f"{sync.layer_name}: {IN_GRAPH}")
        if not process_groups.syncing():
            sync, running = Sync(None, sync.layer_name), None  # and no window
        checks.check_training(input, weight, bias, running, eps, sync.group is not None, mask is not None)
        args = NoGradArgs(eps, sync._replace(graph_owners=checkpointing.graph_owners()), None, running)
        if micro_batches.current() is None and device_step.applies(input, weight, bias, residual, mask, args):
            return device_step.batch_norm(input, weight, bias, residual, mask, relu, args)
    if mask is not None:
        padding = ~mask.expand(input.size(0), *input.shape[2:]).unsqueeze(1)
        # Also NaN; and the gradient there is zero. Not masked_fill: it would lose the memory format.
        input = torch.where(padding, 0, input)
    if args is None:
        output = add_and_rectify(F.batch_norm(input, mean, var, weight, bias, eps=eps), residual, relu)
    else:
        args = args if padding is None else args._replace(padding=padding)
        output = _in_training(input, weight, bias, args, residual, relu)
    return output if padding is None else torch.where(padding, 0, output)


def _in_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    args: NoGradArgs,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The path for this call: in step, local, compiled, under ``torch.func``, or the usual one."""
    # A checkpointed forward under no_sync_stats may be recomputed outside of it, and must be recognized there; so
    # must that of a micro-batch that ran in step with others.
    unsynced_checkpoint = bool(args.sync.graph_owners) and not process_groups.syncing()
    recognized = unsynced_checkpoint or checkpointing.recomputes_in_step(args.sync.layer_name)
    alone = args.sync.group is None and args.sync.window is None
    if micro_batches.current() is not None:
        output = in_step.batch_norm(input, weight, bias, args)
    elif alone and args.padding is None and not recognized:
        output = local.batch_norm(input, weight, bias, args)
    elif torch.compiler.is_compiling():
        from syncnorm.layer import compiled  # not at the top: it imports the compiler, which takes two seconds

        output = compiled.batch_norm(input, weight, bias, args)
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        output = func_transforms.batch_norm(input, weight, bias, args)
    else:
        output = SyncBatchNormFunction.apply(input, weight, bias, args)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return add_and_rectify(output, residual, relu)


def running_of(
    mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None
) -> Running | None:
    """The running statistics as one value; None if there are none.

    Raises:
        InputError: one of ``mean`` and ``var`` is None, and the other is not.
    """
    if mean is None and var is None:
        return None
    if mean is None or var is None:
        raise InputError("running_mean and running_var come together: one is None, the other is not")
    return Running(mean, var, num_batches_tracked, momentum)


def add_and_rectify(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(output + residual)``, either part only if requested; ``output`` may be overwritten."""
    if residual is not None:
        output = output.add_(residual) if device_step.same_layout(residual, output) else output + residual
    return output.relu_() if relu else output


def device_of(*tensors: Any) -> torch.device:
    """The device of the first argument that is a tensor: where this call's group communicates.

    Buffers and parameters come first, since the input may be what is wrong.
    """
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def abort_peers_with(error: BaseException, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Makes the other ranks, which wait for this one, raise the error that it is about to raise.

    Not in a recomputation: the other ranks may not wait there, and a checkpoint may end one by an exception.
    """
    if group is None:
        return
    if torch.compiler.is_dynamo_compiling():  # torch.export also runs the layer without the tracer
        from syncnorm.layer import compiled

        if compiled.while_tracing(compiled.in_one_graph):
            reason = REFUSED if isinstance(error, InputError) else "it raised an error"
            compiled.while_tracing(compiled.abort_peers, reason, str(error), compiled.name_of(group), str(device))
            # Ends the trace: if the traced code caught the error, the graph would report none when it runs.
            torch._dynamo.graph_break(msg=str(error))
        outside_of_graphs("an error is reported to other ranks", _abort_peers_with, error, group, device)
    else:
        _abort_peers_with(error, group, device)


def _abort_peers_with(error: BaseException, group: dist.ProcessGroup, device: torch.device) -> None:
    if isinstance(error, SyncNormError) or not checkpointing.in_backward():
        comm.abort_peers_with(error, group, device)
