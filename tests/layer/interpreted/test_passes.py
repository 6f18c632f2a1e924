"""The Triton kernels compared with fp64: compiled on a GPU, otherwise under Triton's interpreter.

``tests/layer/test_triton.py`` selects the interpreter.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from syncnorm.layer import kernels, moments
from syncnorm.layer.kernels import cpu, triton_merge, triton_passes
from syncnorm.testing import assert_close

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# C and the number of positions: 1, not a power of two, more than a tile; and several tiles in both directions.
SHAPES = {
    torch.float32: [(3, 1, 5, 5), (4, 130), (2, 5, 40, 37), (2, 3, 4, 5, 6), (700, 3), (70, 2, 9)],
    torch.bfloat16: [(6, 5, 7, 3), (4, 130)],
    torch.float16: [(1, 9, 3, 1)],
}
CASES = [
    (shape, channels_last, dtype)
    for dtype, shapes in SHAPES.items()
    for shape in shapes
    for channels_last in ((False, True) if len(shape) == 4 else (False,))
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
    """x, dy, residual, mean, invstd, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    big = [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
    big = [kernels.dense(t, kernels.memory_format(t)) for t in big]
    channels = shape[1]
    mean, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    invstd, weight = (torch.rand(channels, generator=generator) + 0.5 for _ in range(2))
    return tuple(t.to(DEVICE) for t in (*big, mean, invstd, weight - 1, bias))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("shape", "channels_last", "dtype"), CASES, ids=str)
def test_passes_equal_fp64(shape, channels_last, dtype, with_residual):
    x, dy, residual, mean, invstd, weight, bias = tensors(shape, dtype, channels_last)
    if not with_residual:
        residual = None
    y = torch.empty_like(x)
    triton_passes.normalize(x, mean, invstd, weight, bias, residual, y)

    view = (1, -1, *(1,) * (len(shape) - 2))
    xmu = x.double() - mean.double().view(view)
    z = xmu * (invstd * weight).double().view(view) + bias.double().view(view)
    z = z if residual is None else z + residual.double()
    assert_close(y, z.relu(), dtype)
    assert y.stride() == x.stride()

    kept = y if with_residual else None
    sum_dy, sum_dy_xmu, dz = triton_passes.reduce_grad(dy, x, mean, invstd, weight, bias, kept)
    want_dz = dy.double() * (y > 0)
    dims = [d for d in range(len(shape)) if d != 1]
    assert_close(sum_dy, want_dz.sum(dims), torch.float32)
    assert_close(sum_dy_xmu, (want_dz * xmu).sum(dims), torch.float32)
    if with_residual:
        assert dz is not None
        assert torch.equal(dz.double(), want_dz)
    else:
        assert dz is None

    dx = torch.empty_like(x)
    count = torch.tensor(77.0, dtype=torch.float64, device=DEVICE)
    passed = dy if dz is None else dz
    triton_passes.finish_grad(passed, x, mean, invstd, weight, bias, sum_dy, sum_dy_xmu, count, dz is None, dx)
    s = invstd.double().view(view)
    slope = s.square() * sum_dy_xmu.double().view(view) / 77
    want = weight.double().view(view) * s * (want_dz - sum_dy.double().view(view) / 77 - xmu * slope)
    assert_close(dx, want, dtype)


def test_without_weight_and_bias():
    x, dy, _, mean, invstd, *_ = tensors((6, 5, 7, 3), torch.float32, False)
    one, zero = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    for weight, bias in [(None, None), (None, zero), (one, None)]:
        y, dx = torch.empty_like(x), torch.empty_like(x)
        triton_passes.normalize(x, mean, invstd, weight, bias, None, y)
        sums = triton_passes.reduce_grad(dy, x, mean, invstd, weight, bias, None)[:2]
        triton_passes.finish_grad(dy, x, mean, invstd, weight, bias, *sums, 9, True, dx)
        got = torch.stack([y, dx])
        if weight is None and bias is None:
            want = got
        assert torch.equal(got, want)


def test_a_nan_propagates_through_the_relu_as_in_torch():
    x, dy, _, mean, invstd, weight, bias = tensors((6, 5, 7, 3), torch.float32, False)
    x[0, 1, 2, 0] = torch.nan
    y = torch.empty_like(x)
    triton_passes.normalize(x, mean, invstd, weight, bias, None, y)
    assert torch.isnan(y).sum() == 1
    assert torch.isnan(F.relu(x)).equal(torch.isnan(y))
    sums = triton_passes.reduce_grad(dy, x, mean, invstd, weight, bias, None)[1]
    assert torch.isnan(sums).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("counts", "channels", "momentum", "running_dtype"),
    [
        ((4, 4, 4), 5, 0.1, torch.float32),
        ((9, 0, 2), 200, 0.7, torch.bfloat16),
        ((0, 5), 1, 1.0, torch.float32),
        ((0, 0), 5, 0.1, torch.float32),
        ((3,), 5, 0.1, None),
        ((70000, 1), 200, 0.1, torch.float32),
    ],
    ids=str,
)
def test_merging_equals_plain_operators(counts, channels, momentum, running_dtype):
    generator = torch.Generator().manual_seed(len(counts))
    rows = torch.randn(len(counts), 2 * channels + 2, generator=generator)
    rows[:, channels:-2] = rows[:, channels:-2].abs() + 0.1
    rows[:, -2] = torch.tensor(counts)
    rows[rows[:, -2] == 0, :channels] = 0
    rows = rows.to(DEVICE)
    gathered, counts_W1 = rows[:, :-2], rows[:, -2:-1]  # with gaps between the rows, as in the exchange
    before = rows.clone()

    def running() -> moments.Running | None:
        if running_dtype is None:
            return None
        buffers = torch.rand(2, channels, generator=torch.Generator().manual_seed(3))
        return moments.Running(*buffers.to(DEVICE, running_dtype), torch.tensor(7, device=DEVICE), momentum)

    ours, theirs = running(), running()
    assert triton_merge.supports(gathered, ours)
    got = triton_merge.merge(gathered, counts_W1, 1e-5, ours)
    want = cpu.merge(gathered, counts_W1, 1e-5, theirs)
    for name, a, b in zip(("mean", "invstd", "var", "count"), got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    if ours is not None and theirs is not None:
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=torch.finfo(running_dtype).eps * 2, atol=1e-7)
    assert torch.equal(rows, before)


def test_inputs_that_the_merging_kernel_does_not_support():
    gathered, buffers = torch.zeros(2, 6), torch.zeros(3)
    assert not triton_merge.supports(gathered.double(), None)
    assert not triton_merge.supports(gathered, moments.Running(buffers, buffers, torch.tensor(0), None))
    assert not triton_merge.supports(gathered, moments.Running(buffers.double(), buffers.double(), None, 0.1))
    assert not triton_merge.supports(gathered, moments.Running(torch.zeros(6)[::2], torch.zeros(6)[::2], None, 0.1))
