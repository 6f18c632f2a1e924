"""Precise BN, compared with fp64 statistics of all values that reach a layer."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import BatchNormAct
from torch import Tensor, nn

import syncnorm
from syncnorm.errors import InputError, SyncNormError
from syncnorm.testing import assert_close, run_ranks
from syncnorm.training import recalibrate

# by rank, the rows of each batch: uneven batches, fewer on one rank, none on one rank, three ranks
ROWS = [((4, 2), (3, 5)), ((4,), (3, 5, 2)), ((), (4, 3)), ((2, 6), (), (3,))]


def batches(rows: tuple[tuple[int, ...], ...], rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + 50 + rank for n in rows[rank]]


class Net(nn.Module):
    """Two norms in sequence, the second with its own forward; a dropout; a norm in evaluation mode."""

    def __init__(self, synced: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm2 = BatchNormAct(4)
        self.dropout = nn.Dropout(0.9)
        self.norm3 = nn.BatchNorm2d(4, momentum=None)
        self.double().eval()
        self.norm1.train()
        for p in self.parameters():
            nn.init.uniform_(p, -1, 1)
        if synced:
            syncnorm.convert(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm3(self.dropout(self.norm2(self.conv(self.norm1(x)))))


def reference(by_step: list[list[Tensor]]) -> list[Tensor]:
    """Mean and variance at each norm; the tensors in each inner list are normalized together."""
    net, reaching = Net(synced=False), ([], [], [])
    for parts in by_step:
        x = torch.cat(parts)
        for i, norm in enumerate((net.norm1, net.norm2, net.norm3)):
            x = net.conv(x) if i == 1 else x
            reaching[i].append(x.detach())
            x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
            x = F.leaky_relu(x, 0.1) if i == 1 else x
    rows = [torch.cat(values).movedim(1, -1).flatten(0, -2) for values in reaching]
    return [s for r in rows for s in (r.mean(0), r.var(0, unbiased=True))]


def _rank_recalibrate(rows: tuple[tuple[int, ...], ...], synced: bool, kind: str) -> dict[str, Tensor]:
    net = Net(synced)
    mine = batches(rows, dist.get_rank())
    items = {"tensor": mine, "tuple": [(x, "label") for x in mine], "dict": [{"x": x} for x in mine]}[kind]
    modes = [m.training for m in net.modules()]
    # DDP broadcasts buffers in each forward
    recalibrate(nn.parallel.DistributedDataParallel(net) if synced else net, iter(items))
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    return dict(net.named_buffers())


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("synced", [True, False])
def test_statistics_are_those_of_all_values_on_all_ranks(rows, synced):
    of_ranks = [batches(rows, rank) for rank in range(len(rows))]
    if synced:  # the batches of all ranks in one step are normalized together
        steps = [[b[i] for b in of_ranks if i < len(b)] for i in range(max(map(len, rows)))]
    else:
        steps = [[x] for b in of_ranks for x in b]
    want = reference(steps)
    kind = ("tensor", "tuple", "dict")[sum(map(sum, rows)) % 3]
    ranks = run_ranks(_rank_recalibrate, len(rows), (rows, synced, kind))
    names = [f"norm{i}.running_{s}" for i in (1, 2, 3) for s in ("mean", "var")]
    for got in ranks:
        for name, value in zip(names, want, strict=True):
            assert_close(got[name], value, torch.float64)
            assert torch.equal(got[name], ranks[0][name])
        assert [int(got[f"norm{i}.num_batches_tracked"]) for i in (1, 2, 3)] == [0, 0, 0]


def _rank_recalibrate_in_groups() -> dict[str, Tensor]:
    """Ranks 0 and 1 share statistics; rank 2 has its own group."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    layer = syncnorm.SyncBatchNorm(3, process_group=groups[dist.get_rank() // 2], dtype=torch.float64)
    recalibrate(layer, batches(ROWS[3], dist.get_rank()))
    return dict(layer.named_buffers())


def test_each_group_has_its_own_statistics():
    for rank, got in enumerate(run_ranks(_rank_recalibrate_in_groups, 3)):
        values = torch.cat([x for r in ((2,) if rank == 2 else (0, 1)) for x in batches(ROWS[3], r)])
        assert_close(got["running_mean"], values.mean((0, 2, 3)), torch.float64)
        assert_close(got["running_var"], values.var((0, 2, 3), unbiased=True), torch.float64)


def masked(rank: int) -> dict[str, Tensor]:
    mask = torch.arange(4) < torch.tensor([[3], [1 + rank]])
    return {"input": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(rank)) + 5, "mask": mask}


def _rank_recalibrate_masked() -> dict[str, Tensor]:
    layer = syncnorm.SyncBatchNorm(3)
    recalibrate(layer, [masked(dist.get_rank())] if dist.get_rank() else [masked(0), masked(2)])
    return dict(layer.named_buffers())


def test_masked_positions_are_ignored():
    values = torch.cat([d["input"].movedim(1, -1)[d["mask"]] for d in map(masked, range(3))]).double()
    for got in run_ranks(_rank_recalibrate_masked):
        assert_close(got["running_mean"], values.mean(0), torch.float32)
        assert_close(got["running_var"], values.var(0, unbiased=True), torch.float32)


def test_one_process_pools_the_first_batches_in_fp64():
    layer = nn.BatchNorm1d(2)  # fp32; the mean of the data is far above their standard deviation
    data = torch.randn(50, 8, 2) + 4096
    recalibrate(layer, data, num_batches=40)
    used = data[:40].double().flatten(0, 1)
    assert torch.equal(layer.running_mean, used.mean(0).float())
    assert_close(layer.running_var, used.var(0, unbiased=True), torch.float32)


class Unused(nn.Module):
    """Its forward does not call one of its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_layer_without_input_keeps_its_statistics():
    model = Unused()
    recalibrate(model, [torch.randn(4, 2) + 9])
    assert model.norm.running_mean.min() > 5
    assert model.unused.running_mean.tolist() == [0, 0]
    assert model.unused.running_var.tolist() == [1, 1]
    recalibrate(nn.ReLU(), [])  # no norm: nothing to do


def failing(rank: int) -> Iterator[Tensor]:
    yield torch.randn(4, 3)
    if rank == 1:
        raise OSError("the disk is gone")
    yield torch.randn(4, 3)


def _rank_one_loader_fails() -> tuple[str, list[float], bool, int]:
    layer = syncnorm.SyncBatchNorm(3).eval()
    with pytest.raises((OSError, SyncNormError)) as caught:
        recalibrate(layer, failing(dist.get_rank()))
    return repr(caught.value), layer.running_mean.tolist(), layer.training, len(layer._forward_hooks)


def test_an_error_of_one_loader_raises_on_all_ranks_and_changes_nothing():
    (other, *zero), (own, *one) = run_ranks(_rank_one_loader_fails)
    assert "the batches of rank 1 raised OSError: the disk is gone" in other
    assert own == "OSError('the disk is gone')"
    assert zero == one == [[0, 0, 0], False, 0]


def test_a_model_that_raises_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2)).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recalibrate(model, [torch.randn(4, 3)])
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert model[0].num_batches_tracked == 0
    assert not model[0].training
    assert not model[0]._forward_hooks


def _rank_different_layers() -> str:
    with pytest.raises(SyncNormError) as caught:
        recalibrate(nn.Sequential(nn.BatchNorm1d(3 + dist.get_rank())), [torch.randn(4, 3 + dist.get_rank())])
    return str(caught.value)


def _rank_no_batches() -> str:
    with pytest.raises(InputError) as caught:
        recalibrate(syncnorm.SyncBatchNorm(3), [])
    return str(caught.value)


def test_errors():
    for message in run_ranks(_rank_different_layers):
        assert "rank 0 of the group has '0' with 3 channels, rank 1 has '0' with 4 channels" in message
    for message in (*run_ranks(_rank_no_batches), _rank_no_batches()):
        assert "no rank has one" in message
    with pytest.raises(InputError, match="tensors or dicts of them as inputs, got int"):
        recalibrate(nn.BatchNorm1d(3), [(3, "label")])
