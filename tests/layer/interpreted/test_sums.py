"""The sum's row and its merge in Triton, compared with plain tensor math and with fp64 on the union.

``tests/layer/test_triton.py`` selects the interpreter.
"""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from syncnorm.layer import kernels, moments
from syncnorm.layer.global_sums import first_12_bits, from_sums, pack_sums_of_moments
from syncnorm.layer.kernels.triton_forward import pack_moments
from syncnorm.layer.kernels.triton_sums import merge_sums

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPS, TAG, NUMBER = 1e-5, 77.0, 9


def batch(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, mean: float) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x += mean * torch.linspace(-2, 1, shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(DEVICE, dtype).contiguous(memory_format=layout)
    return kernels.dense(x, kernels.memory_format(x))


def no_mismatch() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=DEVICE)


def check_row(row: Tensor, values_CN: Tensor, rtol: float = 2e-6) -> None:
    """The sums are those of a mean and a variance that are fp64's, rounded to fp32."""
    n = values_CN.size(1)
    assert (row.shape, row.dtype) == ((3 * len(values_CN) + 2,), torch.float64)
    assert row[[0, -1]].tolist() == [n, TAG]
    sum_m, sum_c2, sum_rest = row[1:-1].view(3, -1)
    if n == 0:
        assert not row[:-1].any()
        return
    mean = (sum_m / n).float()
    m, c = mean.double(), first_12_bits(mean).double()
    assert torch.equal(sum_m, n * m)
    assert torch.equal(sum_c2, n * (c * c))
    want_var, want_mean = torch.var_mean(values_CN.double(), 1, correction=0)
    torch.testing.assert_close(m, want_mean, rtol=2e-7, atol=2e-6)
    torch.testing.assert_close(sum_rest / n - (m * m - c * c), want_var, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize(
    ("shape", "dtype", "channels_last"),
    [
        ((6, 5, 7, 3), torch.float32, False),
        ((6, 5, 7, 3), torch.float32, True),
        ((2, 5, 40, 37), torch.float32, False),
        ((70, 200), torch.float32, False),
        ((5, 8, 7, 7), torch.bfloat16, False),
        ((0, 5, 3, 3), torch.float32, False),
    ],
    ids=str,
)
def test_the_row_has_the_moments_of_the_batch(shape, dtype, channels_last, mean):
    x = batch(shape, dtype, channels_last, mean)
    # The interpreter truncates to bf16, where GPUs round, the value from which differences are summed.
    rtol = 5e-6 if dtype == torch.bfloat16 else 2e-6
    check_row(pack_moments(x, EPS, TAG, None, to_sum=True), x.transpose(0, 1).flatten(1), rtol)


def test_masked_values_do_not_count():
    x = batch((4, 5, 3, 3), torch.float32, False, 3.0)
    mask = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)).lt(0.5).to(DEVICE)
    check_row(pack_moments(x, EPS, TAG, mask, to_sum=True), x.transpose(0, 1)[:, mask])


def running_statistics(dtype: torch.dtype, channels: int, momentum: float | None) -> moments.Running:
    generator = torch.Generator().manual_seed(3)
    mean, var = torch.rand(2, channels, generator=generator).to(DEVICE, dtype)
    return moments.Running(mean, var, torch.tensor(7, device=DEVICE), momentum)


@pytest.mark.parametrize(
    ("counts", "channels", "momentum", "running_dtype"),
    [
        ((4, 4, 4), 5, 0.1, torch.float32),
        ((9, 0, 2), 200, 0.7, torch.bfloat16),
        ((0, 5), 1, 1.0, torch.float32),
        ((0, 0), 5, 0.1, torch.float32),
        ((0, 0), 5, None, torch.float32),
        ((3,), 5, 0.1, None),
        ((2**22, 2**30 + 1), 200, None, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("mean", [1.0, 1e6])
def test_the_merge_is_that_of_plain_tensor_math(counts, channels, momentum, running_dtype, mean):
    generator = torch.Generator().manual_seed(len(counts))
    rows = [
        pack_sums_of_moments(
            mean + torch.randn(channels, generator=generator),
            torch.rand(channels, generator=generator) + 0.1,
            n, EPS, TAG,
        )
        for n in counts
    ]  # fmt: skip
    summed = torch.stack(rows).sum(0).to(DEVICE)
    runnings = [
        None if running_dtype is None else running_statistics(running_dtype, channels, momentum) for _ in range(2)
    ]
    mismatch = no_mismatch()
    ours, theirs = (
        f(summed, EPS, TAG * len(counts), mismatch, NUMBER, running)
        for f, running in zip((merge_sums, from_sums), runnings, strict=True)
    )
    assert mismatch == 0
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-12)
    if running_dtype is not None:
        tolerance = 1e-2 if running_dtype == torch.bfloat16 else 1e-6
        for got, want in zip(runnings[0][:3], runnings[1][:3], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=0)


def test_the_merge_keeps_the_digits_of_a_constant_channel():
    values = torch.linspace(1e4, 2e4, 50)
    row = pack_sums_of_moments(values, torch.full_like(values, EPS).rsqrt(), 8, EPS, TAG)
    summed = torch.zeros_like(row)
    for _ in range(1024):  # as along a ring
        summed += row
    mean, _, var, count = merge_sums(summed.to(DEVICE), EPS, TAG * 1024, no_mismatch(), NUMBER, None)
    assert torch.equal(mean.cpu(), values)
    assert count == 8192
    assert (var.abs() < 1e-5 * EPS).all()  # 0.4 of eps, if squares were summed as one number


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_wrong_tag_changes_nothing_but_is_reported(momentum):
    row = pack_moments(batch((4, 200), torch.float32, False, 1.0), EPS, TAG, None, to_sum=True)
    running, mismatch = running_statistics(torch.float32, 200, momentum), no_mismatch()
    before = [t.clone() for t in running[:3]]
    found = merge_sums(row, EPS, TAG + 1, mismatch, NUMBER, running)
    assert all(v.isnan().all() for v in found)
    assert all(torch.equal(a, b) for a, b in zip(running[:3], before, strict=True))
    assert mismatch == NUMBER
    merge_sums(row, EPS, TAG, mismatch, NUMBER + 1, running)
    assert mismatch == NUMBER  # until the host has read it
    assert running.num_batches_tracked == 8


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_channel(bad):
    def step() -> tuple[Tensor, ...]:
        return merge_sums(pack_moments(x, EPS, TAG, None, to_sum=True), EPS, TAG, no_mismatch(), NUMBER, None)

    x = batch((40, 5), torch.float32, False, 1.0)
    want = step()
    x[3, 2] = bad
    got = step()
    others = torch.tensor([0, 1, 3, 4])
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=1e-6, atol=1e-6)
        assert not a[2].isfinite()
