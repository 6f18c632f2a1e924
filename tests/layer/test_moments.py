"""Merging moments, compared with fp64 moments of the union."""

import pytest
import torch

from syncnorm.layer.moments import Running, merge, statistics_dtype, update_running_


def parts(sizes, offset=0.0, channels=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, channels, generator=generator, dtype=torch.float64) + offset for n in sizes]


def moments_of(batches, eps, dtype):
    mean = torch.stack([b.mean(0) if len(b) else torch.zeros(b.size(1)) for b in batches])
    var = torch.stack([b.var(0, correction=0) if len(b) else torch.ones(b.size(1)) for b in batches])
    invstd = torch.rsqrt(var + eps)
    return torch.cat([mean, invstd], 1).to(dtype).double(), [len(b) for b in batches]


def merged(moments, counts, eps):
    """Merges with counts on the host and checks that counts on the device give the same."""
    mean, var_eps, count = merge(moments.clone(), counts, eps)
    of_device = merge(moments.clone(), torch.tensor(counts, dtype=torch.float64).unsqueeze(1), eps)
    torch.testing.assert_close(of_device[:2], (mean, var_eps), rtol=1e-14, atol=1e-14)
    assert int(of_device[2]) == count
    return mean, var_eps - eps, count


@pytest.mark.parametrize("sizes", [(4, 4), (9, 2, 1), (0, 5), (0, 0, 3), (7,), (2, 0, 0, 6)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.0])
def test_merge_is_the_moments_of_the_union(sizes, eps):
    batches = parts(sizes, offset=10.0)
    mean, var, count = merged(*moments_of([b + 0 for b in batches if len(b) != 1], eps, torch.float64), eps)
    union = torch.cat([b for b in batches if len(b) != 1])
    torch.testing.assert_close(mean, union.mean(0))
    torch.testing.assert_close(var, union.var(0, correction=0))
    assert int(count) == len(union)


def test_all_empty_is_finite_and_zero():
    mean, var, count = merged(*moments_of(parts((0, 0)), 1e-5, torch.float32), 1e-5)
    assert int(count) == 0
    assert torch.equal(mean, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(var, torch.zeros(5, dtype=torch.float64))


def test_means_far_from_zero_merge_to_half_a_unit_in_the_last_place():
    batches = parts((500, 300), offset=1e5)
    moments = moments_of(batches, 1e-5, torch.float32)
    mean, var, _ = merged(*moments, 1e-5)
    counts = torch.tensor([500.0, 300.0], dtype=torch.float64).unsqueeze(1)
    exact = (moments[0][:, :5] * counts).sum(0) / 800
    torch.testing.assert_close(mean, exact, rtol=1e-15, atol=0)
    torch.testing.assert_close(var, torch.cat(batches).var(0, correction=0), rtol=1e-3, atol=0)


def test_a_constant_channel_has_no_negative_variance():
    constant = torch.full((3, 2), 7.0, dtype=torch.float64)
    for eps in (1e-5, 1e-3, 1.1e-5, 3.7e-4):
        _, var, _ = merged(*moments_of([constant, constant], eps, torch.float32), eps)
        assert (var >= 0).all()
        assert (var <= 1e-6 * eps).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_follow_torch(dtype):
    x = parts((6,))[0].float()
    mean, var = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    want_mean, want_var = torch.zeros(5), torch.ones(5)
    tracked = torch.tensor(0)
    for _ in range(3):
        torch.nn.functional.batch_norm(x, want_mean, want_var, training=True, momentum=0.3)
        batch = x.double()
        running = Running(mean, var, tracked, 0.3)
        update_running_(running, batch.mean(0), batch.var(0, correction=0), torch.tensor(6.0).double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(mean.float(), want_mean, **tolerance)
    torch.testing.assert_close(var.float(), want_var, **tolerance)
    assert tracked == 3


def test_an_empty_batch_moves_nothing():
    mean, var, tracked = torch.full((2,), 3.0), torch.full((2,), 4.0), torch.tensor(5)
    zero = torch.zeros(2, dtype=torch.float64)
    for momentum in (0.1, 1.0, None):
        update_running_(Running(mean, var, tracked, momentum), zero, zero, torch.tensor(0.0, dtype=torch.float64))
    assert mean.tolist() == [3, 3]
    assert var.tolist() == [4, 4]
    assert tracked == 5


def test_statistics_dtype():
    assert statistics_dtype(torch.float64) == torch.float64
    assert {statistics_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
