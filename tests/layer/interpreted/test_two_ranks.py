"""The layer fused with its ReLU on two ranks, in Triton's interpreter, compared with fp64 on the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, before Triton is imported", allow_module_level=True)

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

CHANNELS = 5
EPS, MOMENTUM = 1e-5, 0.3


def batch(rows: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, shortcuts and gradients by rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(rows), CHANNELS, 4, 3)
    x, shortcut, dy = ((torch.randn(shape, generator=generator) * 2 + m).to(dtype) for m in (3, 0, 0))
    return list(x.split(rows)), list(shortcut.split(rows)), list(dy.split(rows))


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(CHANNELS, generator=generator) - 0.3, torch.randn(CHANNELS, generator=generator)


def _rank_step(
    rows: tuple[int, ...], dtype: torch.dtype, layout: str, with_shortcut: bool
) -> dict[str, Tensor | None]:
    rank = dist.get_rank()
    x, shortcut, dy = (part[rank] for part in batch(rows, dtype))
    x = x.contiguous(memory_format=getattr(torch, layout)).requires_grad_()
    shortcut.requires_grad_()
    layer = syncnorm.SyncBatchNorm2d(CHANNELS, eps=EPS, momentum=MOMENTUM)
    layer.weight, layer.bias = (nn.Parameter(v) for v in vectors())
    y = layer(x, residual=shortcut if with_shortcut else None, relu=True)
    assert type(y.grad_fn).__name__ == "_SyncBatchNormReluBackward"
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "d_shortcut": shortcut.grad,
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
        "tracked": layer.num_batches_tracked,
    }


@pytest.mark.parametrize(
    ("rows", "dtype", "layout", "with_shortcut"),
    [
        ((3, 3), torch.float32, "contiguous_format", True),
        ((4, 1), torch.float32, "channels_last", False),
        ((0, 3), torch.bfloat16, "contiguous_format", True),
        ((2, 0), torch.float32, "contiguous_format", False),
    ],
    ids=str,
)
def test_the_fused_step_is_that_of_the_full_batch(rows, dtype, layout, with_shortcut):
    inputs, shortcuts, grads = batch(rows, dtype)
    weight, bias = vectors()
    found = run_ranks(_rank_step, len(rows), (rows, dtype, layout, with_shortcut))
    # Where the ReLU is open is taken from the rank's output, because within rounding of zero either is correct.
    passed = [dy.double() * (got["y"] > 0) for dy, got in zip(grads, found, strict=True)]
    start = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    want = batch_norm_oracle(inputs, passed, weight, bias, *start, MOMENTUM, EPS)
    for rank, got in enumerate(found):
        z = want.outputs[rank] + (shortcuts[rank].double() if with_shortcut else 0)
        assert_close(got["y"], z.relu(), dtype)
        assert_close(got["dx"], want.grad_inputs[rank], dtype)
        assert_close(got["dw"], want.grad_weight[rank], torch.float32)
        assert_close(got["db"], want.grad_bias[rank], torch.float32)
        assert_close(got["mean"], want.running_mean, torch.float32)
        assert_close(got["var"], want.running_var, torch.float32)
        assert got["tracked"] == 1
        if with_shortcut:
            assert torch.equal(got["d_shortcut"].double(), passed[rank])


def _rank_fp64_and_strided_weight() -> tuple[bool, bool]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(3, CHANNELS, 2, 2, generator=generator)
    layer = syncnorm.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    wide = layer(x.double(), relu=True)
    strided = torch.rand(2 * CHANNELS, generator=torch.Generator().manual_seed(1))[::2]
    y, z = (
        syncnorm.functional.sync_batch_norm(x, None, None, w, None, training=True, relu=True, layer_name=name)
        for name, w in (("strided", strided), ("dense", strided.contiguous()))
    )
    return torch.allclose(wide, layer(x.double()).relu(), rtol=1e-13, atol=1e-13), torch.equal(y, z)


def test_fp64_input_and_a_strided_weight():
    assert run_ranks(_rank_fp64_and_strided_weight, 2) == [(True, True)] * 2


def _rank_penalty() -> str:
    layer = syncnorm.SyncBatchNorm2d(3)
    x = torch.randn(2, 3, 2, 2).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, relu=True).square().sum(), x, create_graph=True)
    try:
        dx.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_second_derivative_raises():
    assert all("once_differentiable" in told for told in run_ranks(_rank_penalty, 2))
