"""Each CPU kernel separately, in one process."""

import pytest
import torch

from syncnorm.layer import kernels
from syncnorm.layer.kernels import cpu

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 1.9, 2.1, 1e2, 1e4, 1e5])
def test_local_moments_are_accurate_to_rounding(layout, offset):
    """Also far from zero: the second pass recovers what the sum of the first one lost to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 16, 40, 40, generator=generator, dtype=torch.float64) + offset).float()
    x = x.contiguous(memory_format=FORMATS[layout])
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    got_mean, got_invstd = cpu.local_moments(x, 1e-5, torch.empty_like(x))
    # Within two standard deviations of zero, the mean only needs to be as accurate as the standard deviation.
    half_a_place = max(offset, 4.0) * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(got_mean.double(), mean, rtol=0, atol=half_a_place)
    torch.testing.assert_close(got_invstd.double(), torch.rsqrt(var + 1e-5), rtol=3e-7, atol=0)


def test_only_channels_far_from_zero_are_corrected():
    x = torch.randn(64, 5, 20, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] += 1e5
    x[:, 3] -= 1e4
    x = x.float()
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    got_mean, got_invstd = cpu.local_moments(x, 1e-5, torch.empty_like(x))
    torch.testing.assert_close(got_mean.double(), mean, rtol=6e-8, atol=1e-7)
    torch.testing.assert_close(got_invstd.double(), torch.rsqrt(var + 1e-5), rtol=3e-7, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_channel_does_not_affect_the_others(bad):
    """A single reduction over all channels decides whether any of them is far from zero."""
    x = torch.randn(64, 5, 20, generator=torch.Generator().manual_seed(0)).double() * 3
    x[:, 1] += 1e7
    x[3, 2, 4] = bad
    x = x.float()
    var, mean = torch.var_mean(x.double(), (0, 2), correction=0)
    got_mean, got_invstd = cpu.local_moments(x, 1e-5, torch.empty_like(x))
    others = [0, 1, 3, 4]
    torch.testing.assert_close(got_mean.double()[others], mean[others], rtol=6e-8, atol=1e-6)
    torch.testing.assert_close(got_invstd.double()[others], torch.rsqrt(var + 1e-5)[others], rtol=3e-7, atol=0)
    assert not got_mean[2].isfinite()


def test_channels_that_are_all_nan_are_nan():
    mean, invstd = cpu.local_moments(torch.full((4, 3, 2), torch.nan), 1e-5, torch.empty(4, 3, 2))
    assert mean.isnan().all()
    assert invstd.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_has_statistics_in_fp32(dtype):
    x = torch.randn(4, 3, 5).to(dtype)
    mean, invstd = cpu.local_moments(x, 1e-5, torch.empty_like(x))
    assert mean.dtype == invstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_dense_copies_only_tensors_with_gaps_and_fixes_ambiguous_strides():
    x = torch.randn(4, 3, 5, 6)
    for fmt in FORMATS.values():
        same = x.contiguous(memory_format=fmt)
        assert kernels.dense(same, kernels.memory_format(same)).data_ptr() == same.data_ptr()
    odd = torch.randn(2, 1, 2, 1).transpose(0, 3)  # (1, 1, 2, 2), channels_last by its strides
    mended = kernels.dense(odd, kernels.memory_format(odd))
    assert torch.equal(mended, odd)
    assert mended.stride() == torch.empty(odd.shape).contiguous(memory_format=kernels.memory_format(odd)).stride()
    assert kernels.for_device(torch.device("cpu")) is cpu
    assert kernels.for_device(torch.device("cuda")) is not cpu


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3, 5), (9, 1), (6, 5, 7), (2, 5, 300, 401), (3, 700, 20, 13), (1, 2**19), (600, 500, 2, 1)], ids=str
)
def test_a_blockwise_gradient_is_the_fp32_gradient_rounded_once(shape, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    channels, format_ = shape[1], FORMATS[layout] if len(shape) == 4 else torch.contiguous_format
    x, dy = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=format_) for _ in range(2))
    mean, invstd, weight, *sums = (torch.rand(channels, generator=generator) + 0.5 for _ in range(5))
    rest = x, mean, invstd, weight, *sums, 77
    got = cpu.finish_grad(cpu.begin_grad(dy, invstd, weight), *rest)
    wide = [t.float() if t is x else t for t in rest]
    want = cpu.finish_grad(cpu.begin_grad(dy.float(), invstd, weight), *wide)
    assert got.dtype == dtype
    assert got.stride() == x.stride()
    # A value halfway between two neighbors may be rounded either way.
    torch.testing.assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)
