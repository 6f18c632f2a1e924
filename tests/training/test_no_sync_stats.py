"""Running statistics under ``no_sync_stats``: they cannot be reset there, and ``recalibrate`` computes them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import syncnorm
from syncnorm.testing import run_ranks

RESET = r"(?s)reset_running_stats inside syncnorm.no_sync_stats.*update_bn on all ranks.*training.recalibrate"


@pytest.mark.parametrize("build", [lambda: syncnorm.convert(nn.BatchNorm1d(3)), lambda: syncnorm.SyncBatchNorm1d(3)])
@pytest.mark.parametrize("reset", ["reset_running_stats", "reset_parameters"])
def test_running_statistics_that_cannot_change_are_not_reset(build, reset):
    layer = build()
    nn.init.uniform_(layer.weight)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
        getattr(layer, reset)()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    getattr(layer, reset)()
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.num_batches_tracked == 0


def _rank_update_on_one_rank() -> list[Tensor]:
    model = syncnorm.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model(torch.randn(4, 3))
    before = copy.deepcopy(model.state_dict())
    if dist.get_rank() == 0:
        with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
            update_bn([torch.randn(4, 3)], model)
    assert model[1].momentum == 0.1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        model[0].load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    batches = [torch.full((4, 3), float(dist.get_rank()))]
    update_bn(batches, model)  # as the message suggests
    of_all = model[1].running_mean.clone()
    if dist.get_rank() == 0:
        with syncnorm.no_sync_stats():
            syncnorm.training.recalibrate(model, batches)
    return [of_all, model[1].running_mean]


def test_update_bn_on_one_rank_raises_and_its_suggestions_work():
    for rank, (of_all, mean) in enumerate(run_ranks(_rank_update_on_one_rank)):
        assert of_all.tolist() == [0.5] * 3
        assert mean.tolist() == [0.5 * rank] * 3


def test_layers_can_be_constructed():
    with syncnorm.no_sync_stats():
        for layer in (
            syncnorm.SyncBatchNorm(3),
            syncnorm.SyncBatchNorm1d(3),
            copy.deepcopy(syncnorm.SyncBatchNorm(3)),
        ):
            assert layer.running_var.tolist() == [1, 1, 1]
            assert not any("construction" in name for name in vars(layer))
        lazy = syncnorm.convert(nn.LazyBatchNorm1d())
        lazy(torch.randn(4, 3))
        assert lazy.running_mean.tolist() == [0, 0, 0]
    with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
        lazy.reset_running_stats()
