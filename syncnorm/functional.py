"""Batch normalisation over the batch of all ranks.

Read from top to bottom: what a user calls, the forward (local moments, one gather, merge, normalise), the
backward (reduce, one all_reduce, apply), whose own derivative is in ``double_backward``.

Shapes: C = channels, W = ranks of the group, N = values a channel over all ranks.
Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1 and the derivatives after it.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from syncnorm import comm
from syncnorm.comm import process_groups
from syncnorm.errors import REFUSED, InputError, SyncNormError
from syncnorm.layer import checkpointing, func_transforms, fused_relu, kernels, moments
from syncnorm.layer.autograd import SyncBatchNormFunction, Which, has_own_class, plain_tensor
from syncnorm.layer.checks import (
    check_input,
    check_mask,
    check_residual,
    check_synced,
    check_tensor,
    check_vectors,
    shape,
    where,
)
from syncnorm.layer.moments import statistics_dtype
from syncnorm.layer.statistics import global_moments


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
    process_group: Any = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    num_batches_tracked: Tensor | None = None,
    layer: str = "sync_batch_norm",
) -> Tensor:
    """``F.batch_norm`` over the batches of all ranks, as if they were one.

    Args:
        input: (batch, C, *spatial), floating, 2-D or more; the batch may differ by rank and may be 0.
        running_mean: (C), updated in place in training; None for none.
        running_var: (C), likewise, unbiased over N.
        weight: (C) or None. Its gradient is local: DDP reduces it like any other.
        bias: (C) or None, likewise.
        training: normalise with the batch's statistics. In evaluation nothing is communicated.
        momentum: weight of this batch in the running statistics; None averages over ``num_batches_tracked``.
        eps: added to the biased variance.
        process_group: a ProcessGroup or 1-D DeviceMesh. None is the default group; without one, or in a group
            of one rank, this is ``F.batch_norm``.
        mask: boolean, broadcastable to (batch, *spatial), True where a position counts. What the others hold is
            ignored, and output and gradient are zero there. Ranks may have different numbers, or none.
        residual: added to the output, as a residual block does with its shortcut; of a shape that broadcasts to it.
        relu: return the positive part of the sum. On a GPU with Triton normalising, adding and rectifying are
            one pass (``syncnorm.layer.fused_relu``); elsewhere the last two work in place.
        num_batches_tracked: int64 scalar, one more in training unless all ranks are empty.
        layer: the name by which ranks tell one call from another, and errors name it.

    Returns:
        Like ``input``: same shape, dtype and memory format.

    Raises:
        InputError: a wrong shape, dtype or option, of which the other ranks are told; fewer than two values a channel
            over all ranks (not looked for with a mask on a GPU, where the host would have to wait); a rank
            outside the group. Running statistics are as they were.
        SyncNormError: the ranks called different layers, or another rank refused its input, failed or died.

    Collective: in training all ranks of the group must call, in the same order of layers: one all_gather of
        2C + 1 numbers, in the backward one all_reduce of 2C, in a double backward one of 5C; over gloo, each of
        these is one exchange of frames (``syncnorm.comm``). A rank takes part in a backward if its
        input, weight or bias needs a gradient, so let them need the same on all ranks.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = sync_batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
        >>> y.mean().abs().item() < 1e-6
        True
    """
    group = process_groups.synced_group(process_groups.resolve(process_group)) if training else None
    try:
        check_tensor(input)
        check_input(input)
        check_mask(input, mask)
        return batch_norm_over(
            group,
            layer,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            mask,
            num_batches_tracked,
            residual,
            relu,
        )
    except BaseException as error:
        abort_peers_with(error, group, device_of(running_mean, weight, bias, input))
        raise


def device_of(*tensors: Any) -> torch.device:
    """Of the first that is a tensor. What a layer holds says better than an odd input where its ranks meet."""
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def abort_peers_with(error: BaseException, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Lets the other ranks, who wait for this one, raise what it is about to raise, whoever found it.

    Not where a checkpoint computes again: there the other ranks may not wait, and the end of it may be an exception.
    """
    if group is None:
        return
    if torch.compiler.is_compiling():
        from syncnorm.layer import compiled

        what = REFUSED if isinstance(error, InputError) else "it raised an error"
        compiled.while_tracing(compiled.abort_peers, what, str(error), compiled.name_of(group), str(device))
    elif isinstance(error, SyncNormError) or not checkpointing.in_backward():
        comm.abort_peers_with(error, group, device)


def batch_norm_over(
    group: dist.ProcessGroup | None,
    layer: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`sync_batch_norm` of a checked input, over a group of two ranks or more; None is this process alone."""
    if not torch.compiler.is_compiling() and has_own_class(input):
        if torch._C._is_torch_function_enabled():
            # As for torch's own functions: a tensor subclass, such as one that carries metadata, makes of the output
            # what it likes.
            return handle_torch_function(
                batch_norm_over, (input,), group, layer, input, running_mean, running_var, weight, bias, training,
                momentum, eps, mask, num_batches_tracked, residual, relu,
            )  # fmt: skip
        input = plain_tensor(input)
    check_vectors(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if training and not process_groups.syncing():
        group = running_mean = running_var = None
    check_residual(input, residual)
    if group is not None:
        check_synced(input, running_mean, running_var, weight, bias)
    wrong = ""
    if running_mean is None:
        num_batches_tracked = None  # counts what the running statistics have seen
    elif training and momentum is None and num_batches_tracked is None:
        wrong = "momentum=None averages over num_batches_tracked, which was not given"
    if training and eps <= 0 and (group is not None or mask is not None):
        wrong = f"eps must be positive in training, got {eps}"
    if wrong:
        raise InputError(wrong)
    padding = None
    if mask is not None:
        padding = ~mask.expand(input.size(0), *input.shape[2:]).unsqueeze(1)
        # Nothing of what padding holds goes in, NaN included, and no gradient comes out.
        input = input.masked_fill(padding, 0)
    running = None
    if running_mean is not None and running_var is not None:
        running = moments.Running(running_mean, running_var, num_batches_tracked, momentum)
    segments = checkpointing.graph_owners() if training else []
    # Recomputed, it may be outside of no_sync_stats, and has to know.
    plain = group is None and padding is None and (process_groups.syncing() or not segments)
    if plain or not training:
        if training and input.numel() > 0 and (segments or checkpointing.in_backward()):
            output = _checkpointed_batch_norm(input, weight, bias, eps, layer, segments, running)
        else:
            output = _local_batch_norm(
                input, running_mean, running_var, num_batches_tracked, weight, bias, training, momentum, eps
            )
    elif torch.compiler.is_compiling():
        from syncnorm.layer import compiled  # not at the top: it imports the compiler, which takes two seconds

        output, mean, var, count = compiled.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, eps, compiled.name_of(group), padding, layer, running is not None
        )
        if running is not None:
            moments.update_running_(running, mean, var, count)
    else:
        if relu and padding is None and fused_relu.supports(input, residual):
            return fused_relu.sync_batch_norm_relu(
                input, weight, bias, residual, eps, group, layer, segments, running
            )
        which = Which(eps, group, padding, layer, segments, running)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            output = func_transforms.sync_batch_norm(input, weight, bias, which)
        else:
            output = SyncBatchNormFunction.apply(input, weight, bias, which)  # type: ignore[no-untyped-call]
    output = add_and_rectify(output, residual, relu)
    return output if padding is None else output.masked_fill(padding, 0)


def add_and_rectify(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What ``residual`` and ``relu`` stand for, by torch's own operators; ``output`` may be overwritten."""
    if residual is not None:
        output = output.add_(residual) if fused_relu.same_layout(residual, output) else output + residual
    return output.relu_() if relu else output


def _local_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` with the bookkeeping of ``nn.BatchNorm``'s forward."""
    if training:
        _check_local_count(input)
        if num_batches_tracked is not None and input.numel() > 0:
            num_batches_tracked.add_(1)
        if momentum is None and num_batches_tracked is not None:
            momentum = 1.0 / max(int(num_batches_tracked), 1)
    factor = 0.0 if momentum is None else momentum
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)


def _checkpointed_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: str,
    segments: list[Any],
    running: moments.Running | None,
) -> Tensor:
    """:func:`_local_batch_norm` in training, of a batch that may come again, in a backward, but counts once."""
    _check_local_count(input)
    if checkpointing.in_backward():
        # First, because saving a tensor for the backward may end a second run, by an exception.
        with torch.no_grad():
            x = kernels.dense(input, kernels.memory_format(input))
            global_moments(
                *kernels.moments_of(x, eps, torch.empty_like(x), None), eps, None, layer, segments, running
            )
    output, mean, invstd = torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)
    if not checkpointing.in_backward():
        mean, invstd = (v.detach().to(statistics_dtype(input.dtype)) for v in (mean, invstd))
        local = (mean, invstd, input.numel() // input.size(1))
        global_moments(*local, eps, None, layer, segments, running, node=output.grad_fn)
    return output


def _check_local_count(input: Tensor) -> None:
    if input.numel() == input.size(1):
        raise InputError(f"{where()}expected more than 1 value per channel, got input of {shape(input)}")
