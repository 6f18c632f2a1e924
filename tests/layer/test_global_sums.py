"""The moments of the global batch from a sum, compared with those from a gather, and both with fp64 on the union."""

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from syncnorm.layer import moments
from syncnorm.layer.global_sums import first_12_bits, from_sums, pack_sums_of_moments
from syncnorm.layer.moments import Running
from syncnorm.testing import run_ranks
from syncnorm.tools.bench.single_process import fake_world

EPS, TAG, NUMBER, CHANNELS = 1e-5, 321.0, 17, 24


def batches(sizes: Sequence[int], mean: float, std: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """An (n, C) batch for each rank; the means of the channels differ in sign and by up to a factor of 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), CHANNELS, generator=generator, dtype=torch.float64) * std
    scale = 1 + torch.rand(CHANNELS, generator=generator, dtype=torch.float64)
    return list((x + mean * scale * scale.sub(1.5).sign()).to(dtype).split(list(sizes)))


def local_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    if len(x) == 0:
        return torch.zeros(x.size(1)), torch.ones(x.size(1)), 0
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    return mean.float(), (var + EPS).rsqrt().float(), len(x)


def in_order(rows: list[Tensor]) -> Tensor:
    """The sum as along a ring, with the largest rounding error of all orders."""
    return functools.reduce(torch.add, rows)


def by_tree(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else by_tree(rows[: len(rows) // 2]) + by_tree(rows[len(rows) // 2 :])


def by_sum(
    parts: list[Tensor], running: Running | None = None, add: Callable[[list[Tensor]], Tensor] = in_order
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unpacked(add(rows_of(parts)), len(parts), running)


def rows_of(parts: list[Tensor]) -> list[Tensor]:
    return [pack_sums_of_moments(*local_moments(x), EPS, TAG) for x in parts]


def unpacked(
    summed: Tensor, world_size: int, running: Running | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mismatch = torch.tensor(0)
    found = from_sums(summed, EPS, TAG * world_size, mismatch, NUMBER, running)
    assert mismatch == 0
    return found


def by_gather(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance + eps, from the same rows, in fp64."""
    mean, invstd, counts = zip(*map(local_moments, parts), strict=True)
    rows = torch.cat([torch.stack(mean), torch.stack(invstd)], 1)
    return moments.merge(rows, counts, EPS)[:2]


def relative_errors(parts: list[Tensor], mean: Tensor, var_eps: Tensor) -> tuple[float, float]:
    """The largest errors of the mean, in standard deviations, and of (variance + eps), relative."""
    var, exact = torch.var_mean(torch.cat(parts).double(), 0, correction=0)
    std_eps = (var + EPS).sqrt()
    return float(((mean - exact) / std_eps).abs().max()), float((var_eps / std_eps.square() - 1).abs().max())


SIZES = {
    "even": [16] * 12,
    "uneven": [3, 0, 40, 1, 7, 0, 0, 25],
    "one rank": [0, 0, 30, 0],
    "1,024 ranks": [8] * 1024,
    "4,096 uneven ranks": [n % 7 for n in range(4096)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_sum_is_as_accurate_as_a_gather(sizes, mean, dtype):
    parts = batches(sizes, mean, dtype=dtype)
    rows = rows_of(parts)
    for add in (in_order, by_tree):
        sum_mean, _, sum_var, count = unpacked(add(rows), len(rows))
        assert count == sum(sizes)
        check_as_accurate_as_a_gather(parts, sum_mean, sum_var)


def check_as_accurate_as_a_gather(parts: list[Tensor], mean: Tensor, var: Tensor) -> None:
    error_mean, error_var = relative_errors(parts, mean, var.double() + EPS)
    gather_mean, gather_var = by_gather(parts)
    bound_mean, bound_var = relative_errors(parts, gather_mean.float(), gather_var.float().double())
    # The rounding of the ranks' means to fp32 determines the error of both.
    assert error_mean <= bound_mean + 1e-7
    assert error_var <= 1.05 * bound_var + 2e-7


@pytest.mark.parametrize("value", [1.0, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_constant_channel_has_no_variance(sizes, value):
    # Squares summed as one number would leave a variance of 40 eps at 1e5 on 1,024 ranks.
    values = torch.linspace(value, 2 * value, CHANNELS)
    mean, _, var, _ = by_sum([values.expand(n, -1) for n in sizes])
    assert torch.equal(mean, values)
    assert var.min() >= 0
    assert (var <= 2e-7 * EPS + 2**-60 * values.square()).all()


def test_the_sums_of_large_counts():
    generator = torch.Generator().manual_seed(0)
    mean = 1e5 * (1 + torch.rand(64, CHANNELS, generator=generator) * 1e-4)
    invstd = torch.rand(64, CHANNELS, generator=generator) + 0.1
    for per_rank in (2**22, 2**30):  # 2**28 and 2**36 in all; above 2**28 all sums are rounded
        counts = [per_rank + n for n in range(64)]
        rows = [pack_sums_of_moments(*row, EPS, TAG) for row in zip(mean, invstd, counts, strict=True)]
        found = unpacked(in_order(rows), 64)
        want_mean, want_var_eps, count = moments.merge(torch.cat([mean, invstd], 1), counts, EPS)
        assert found[3] == count
        assert torch.equal(found[0], want_mean.float())
        torch.testing.assert_close(found[2].double(), want_var_eps - EPS, rtol=1e-6, atol=0)


def test_all_empty_is_finite_and_moves_nothing():
    running = Running(torch.full((CHANNELS,), 3.0), torch.full((CHANNELS,), 4.0), torch.tensor(5), 0.1)
    mean, invstd, var, count = by_sum(batches([0, 0, 0], 1.0), running)
    assert count == 0
    assert mean.abs().max() == var.abs().max() == 0
    assert (invstd / EPS**-0.5 - 1).abs().max() < 2e-7
    assert (running.mean == 3).all()
    assert (running.var == 4).all()
    assert running.num_batches_tracked == 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_running_statistics_do_not_change_those_of_the_batch(bad):
    parts = batches([5, 6], 3.0)
    running = Running(torch.full((CHANNELS,), bad), torch.full((CHANNELS,), bad), torch.tensor(5), 0.1)
    for got, want in zip(by_sum(parts, running), by_sum(parts), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(bad):
    parts = batches([5, 6], 3.0)
    want = by_sum(parts)
    parts[1][2, 7] = bad
    others = torch.arange(CHANNELS) != 7
    for got, clean in zip(by_sum(parts)[:3], want[:3], strict=True):
        assert torch.equal(got[others], clean[others])
        assert not got[7].isfinite()


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_running_statistics_are_updated(momentum, dtype):
    parts = batches([5, 0, 9], 3.0)
    ours, theirs = (
        Running(torch.zeros(CHANNELS, dtype=dtype), torch.ones(CHANNELS, dtype=dtype), torch.tensor(2), momentum)
        for _ in range(2)
    )
    mean, _, var, count = by_sum(parts, ours)
    moments.update_running_(theirs, mean, var, count)
    for got, want in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(got, want)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("wrong", [TAG + 1, torch.nan])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_wrong_tag_changes_nothing_but_is_reported(wrong, momentum):
    parts = batches([5, 6], 3.0)
    running = Running(torch.full((CHANNELS,), 3.0), torch.full((CHANNELS,), 4.0), torch.tensor(5), momentum)
    rows = [pack_sums_of_moments(*local_moments(x), EPS, tag) for x, tag in zip(parts, (TAG, wrong), strict=True)]
    rows[1][1:-1] = torch.inf  # what another call sends there
    mismatch = torch.tensor(0)
    found = from_sums(in_order(rows), EPS, 2 * TAG, mismatch, NUMBER, running)
    assert all(v.isnan().all() for v in found)
    assert (running.mean == 3).all()
    assert (running.var == 4).all()
    assert running.num_batches_tracked == 5
    assert mismatch == NUMBER
    rows = rows_of(parts)
    from_sums(in_order(rows), EPS, 2 * TAG, mismatch, NUMBER + 1, running)
    assert mismatch == NUMBER  # until the host has read it


def test_the_host_reads_no_value_of_the_device():
    with FakeTensorMode():  # its tensors have no data
        vector = torch.randn(CHANNELS)
        row = pack_sums_of_moments(vector, vector, torch.tensor(3.0), EPS, TAG)
        running = Running(vector.clone(), vector.clone(), torch.tensor(5), None)
        found = from_sums(row, EPS, TAG, torch.tensor(0), NUMBER, running)
    assert [v.shape for v in found] == [(CHANNELS,)] * 3 + [()]


def test_the_first_12_bits():
    x = torch.tensor([1.0, -1.0, 1 + 2**-11, -1 - 2**-11 - 2**-12, math.pi, 1e30, 0.0])
    c = first_12_bits(x)
    assert c[:4].tolist() == [1, -1, 1 + 2**-11, -1 - 2**-11]
    assert ((x - c).abs() <= x.abs() * 2**-11).all()
    mantissa = torch.frexp(c).mantissa * 2**12
    assert torch.equal(mantissa, mantissa.round())


# --- real groups


def _rank_sum(sizes: list[int], mean: float) -> tuple[Tensor, ...]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    row = pack_sums_of_moments(*local_moments(batches(sizes, mean)[rank]), EPS, TAG)
    dist.all_reduce(row)
    running = Running(torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0), 0.1)
    mismatch = torch.tensor(0)
    found = from_sums(row, EPS, TAG * world_size, mismatch, NUMBER, running)
    return *found, *running[:3], mismatch


@pytest.mark.parametrize("mean", [1.0, 1e6])
@pytest.mark.parametrize("sizes", [[9, 4], [0, 6, 1], [5, 0, 8, 2]], ids=str)
def test_over_gloo_all_ranks_have_the_statistics_of_the_union(sizes, mean):
    found = run_ranks(_rank_sum, len(sizes), (sizes, mean))
    for of_rank in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(of_rank, found[0], strict=True))
    parts = batches(sizes, mean)
    sum_mean, _, sum_var, count, *_, mismatch = found[0]
    assert (count, mismatch) == (sum(sizes), 0)
    check_as_accurate_as_a_gather(parts, sum_mean, sum_var)


def _rank_wrong_call() -> tuple[bool, int]:
    mean, invstd, count = local_moments(batches([5, 5], 1.0)[0])
    row = pack_sums_of_moments(mean, invstd, count, EPS, TAG + dist.get_rank())
    dist.all_reduce(row)
    mismatch = torch.tensor(0)
    found = from_sums(row, EPS, 2 * (TAG + dist.get_rank()), mismatch, NUMBER, None)
    return bool(found[0].isnan().all()), int(mismatch)


def test_over_gloo_every_rank_learns_of_a_wrong_call():
    assert run_ranks(_rank_wrong_call, 2) == [(True, NUMBER)] * 2


def test_in_a_fake_world_of_1024_the_row_stays_small():
    (x,) = batches([50], 3.0)
    with fake_world(1024, torch.device("cpu")):
        row = pack_sums_of_moments(*local_moments(x), EPS, TAG)
        dist.all_reduce(row)  # the fake group leaves it as it is
    assert row.shape == (3 * CHANNELS + 2,)
    mean, _, var, count = from_sums(row, EPS, TAG, torch.tensor(0), NUMBER, None)
    error_mean, error_var = relative_errors([x], mean, var.double() + EPS)
    assert error_mean < 5e-7
    assert error_var < 2e-7
    assert count == 50
