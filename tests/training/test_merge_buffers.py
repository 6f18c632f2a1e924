"""Running statistics of plain batch norms, merged over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.errors import SyncNormError
from syncnorm.testing import RankError, run_ranks
from syncnorm.training import merge_buffers


def model(rank: int, dtype: torch.dtype) -> nn.Module:
    """Two plain layers and a synced one, with statistics that differ by rank, and a layer without statistics."""
    layers = [nn.BatchNorm1d(3), nn.BatchNorm2d(5), syncnorm.SyncBatchNorm(2)]
    generator = torch.Generator().manual_seed(rank)
    for i, layer in enumerate(layers):
        layer.running_mean.normal_(10, 3, generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(10 * (rank + 1) % 25 + i)
    return nn.Sequential(*layers, nn.BatchNorm1d(3, track_running_stats=False)).to(dtype)


def _rank_merge(dtype: torch.dtype) -> dict[str, Tensor]:
    mine = model(dist.get_rank(), dtype)
    merge_buffers(mine)
    return dict(mine.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_variance_within_and_between_ranks(world, dtype):
    before = [dict(model(rank, dtype).named_buffers()) for rank in range(world)]
    ranks = run_ranks(_rank_merge, world, (dtype,))
    for layer, steps in (("0", 20), ("1", 21)):
        means = torch.stack([b[f"{layer}.running_mean"] for b in before]).double()
        variances = torch.stack([b[f"{layer}.running_var"] for b in before]).double()
        var = variances.mean(0) + means.var(0, unbiased=False)
        for got in ranks:
            assert torch.equal(got[f"{layer}.running_mean"], means.mean(0).to(dtype))
            torch.testing.assert_close(got[f"{layer}.running_var"], var.to(dtype))
            assert torch.equal(got[f"{layer}.running_var"], ranks[0][f"{layer}.running_var"])
            assert got[f"{layer}.num_batches_tracked"] == steps, "not the maximum"
    for rank, got in enumerate(ranks):  # the synced layer
        for name, value in before[rank].items():
            assert not name.startswith("2.") or torch.equal(got[name], value), name


def _rank_merge_in_group() -> Tensor:
    """Three ranks; the last one is not in the group."""
    pair = dist.new_group([0, 1])
    mine = model(dist.get_rank(), torch.float64)
    if dist.get_rank() < 2:
        merge_buffers(mine, pair)
    return mine[0].running_mean


def test_over_a_group_of_some_ranks():
    means = [model(rank, torch.float64)[0].running_mean for rank in range(3)]
    first, second, third = run_ranks(_rank_merge_in_group, 3)
    assert torch.equal(first, (means[0] + means[1]) / 2)
    assert torch.equal(second, first)
    assert torch.equal(third, means[2])


def _rank_different_widths() -> None:
    merge_buffers(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3 + dist.get_rank())))


def _rank_one_layer_more() -> tuple[str, Tensor]:
    mine = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(2 - dist.get_rank())))
    mine[0].running_mean.fill_(dist.get_rank())
    with pytest.raises(SyncNormError) as caught:
        merge_buffers(mine)
    return str(caught.value), mine[0].running_mean


def test_different_layers_raise_on_all_ranks():
    with pytest.raises(
        RankError, match="rank 0 of the group has '1' with 3 channels, rank 1 has '1' with 4 channels"
    ) as e:
        run_ranks(_rank_different_widths)
    assert sorted(e.value.exceptions) == [0, 1]
    for rank, (message, mean) in enumerate(run_ranks(_rank_one_layer_more)):
        assert "rank 0 of the group has '1' with 3 channels, rank 1 has no further one" in message
        assert mean.tolist() == [rank] * 3


def test_one_process_changes_nothing():
    mine = model(0, torch.float32)
    merge_buffers(mine)
    for got, want in zip(mine.buffers(), model(0, torch.float32).buffers(), strict=True):
        assert torch.equal(got, want)
