"""The cost of a step in collectives, bytes, passes over the tensors and small operators.

Unlike times, these do not depend on the machine. A change that increases one of them needs a reason.
"""

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import syncnorm
from syncnorm import comm
from syncnorm.comm.frames import capacity_for
from syncnorm.comm.transports.gloo import GlooTransport
from syncnorm.testing import run_ranks
from syncnorm.tools.compare.measurements import CollectiveRecorder

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VIEWS = {"aten.view.default", "aten.split.Tensor", "aten.detach.default", "aten.t.default", "aten.slice.Tensor"}
# Allocations, which neither read nor write.
MEMORY = {"aten.empty_like.default", "aten.new_empty.default"}


class Operators(TorchDispatchMode):
    """Records the operators that run, separated by whether they touch a tensor of ``size`` values."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.passes: list[str] = []
        self.small: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name in VIEWS | MEMORY or not name.startswith("aten."):
            return result
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        touched = any(isinstance(t, torch.Tensor) and t.numel() == self.size for t in flat)
        (self.passes if touched else self.small).append(name)
        return result


def _rank_counts_of_a_step(memory_format: str) -> tuple[list[str], list[str], list[Any]]:
    torch.manual_seed(dist.get_rank())
    layer = syncnorm.SyncBatchNorm2d(64)
    x = torch.randn(8, 64, 16, 16).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    dy = torch.randn(x.shape).contiguous(memory_format=FORMATS[memory_format])
    layer(x).backward(dy)  # connects, and determines the size of the frames
    layer(x).backward(dy)
    x.grad = layer.weight.grad = layer.bias.grad = None
    with CollectiveRecorder() as recorder, Operators(x.numel()) as operators:
        layer(x).backward(dy)
    return operators.passes, operators.small, [(c.op, c.origin, c.calls, c.payload_bytes) for c in recorder.counts()]


# Forward: the mean, the squared deviations, their mean, the normalization.
# Backward: the two sums, a * dy, and its completion; if the channel is the fastest axis, a * dy takes no extra pass.
PASSES = {
    "contiguous": "mean mse_loss mean native_batch_norm native_batch_norm_backward mul add_ addcmul_",
    "channels_last": "mean mse_loss mean addcmul native_batch_norm_backward addcmul addcmul_",
}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_step_costs_no_more_than_this(memory_format):
    world_size, channels = 2, 64
    for passes, small, collectives in run_ranks(_rank_counts_of_a_step, world_size, args=(memory_format,)):
        assert " ".join(p.split(".")[1] for p in passes) == PASSES[memory_format]
        # Some 10 more than with torch's lerp: running statistics in fp64, step by step, have the same bits as in C.
        assert len(small) <= 49, Counter(small)
        # One in the forward and one in the backward; each sends 2C fp32 values.
        assert collectives == [("exchange", "norm", 2, 2 * 2 * channels * 4)]


def _rank_capacities(widths: list[int]) -> list[int]:
    """The frame sizes in bytes in the third pass over layers of these widths, over gloo."""
    group = dist.new_group()
    comm.set_transport(group, "gloo")
    layers = [syncnorm.SyncBatchNorm1d(width, process_group=group) for width in widths]
    sent: list[int] = []
    with mock.patch.object(GlooTransport, "frames", autospec=True, side_effect=GlooTransport.frames) as frames:
        for _ in range(3):
            frames.reset_mock()
            for layer in layers:
                layer(torch.randn(4, layer.num_features))
        sent = [call.args[1] for call in frames.call_args_list]
    return sent


def test_frame_size_depends_only_on_the_content():
    widths = [16, 1024, 16, 64, 300]
    for sent in run_ranks(_rank_capacities, args=(widths,)):
        assert sent == [capacity_for(8 * width) for width in widths]
        assert all(
            8 * width < frame <= max(512, 8 * width + 40 + 63) for frame, width in zip(sent, widths, strict=True)
        )


def _rank_bad_input_after_small_frames() -> str:
    """Rank 0 gets a bad input in a step whose frames are small."""
    layer = syncnorm.SyncBatchNorm1d(3)
    for _ in range(3):
        layer(torch.randn(4, 3))
    try:
        layer(torch.randn(4, 5) if dist.get_rank() == 0 else torch.randn(4, 3))
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


def test_an_error_message_fits_the_smallest_frame():
    own, other = run_ranks(_rank_bad_input_after_small_frames)
    assert "expected 3 channels" in own
    assert own in other
