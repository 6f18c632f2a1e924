"""A rank that a launcher started, but that has no process group, warns once."""

import warnings

import models
import pytest
import torch
from torch import nn

import syncnorm
from syncnorm._torch_versions import ONE_GRAPH
from syncnorm.comm import process_groups
from syncnorm.testing import run_ranks


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process_groups._warn_under_a_launcher.cache_clear()
    yield
    process_groups._warn_under_a_launcher.cache_clear()


ALONE = r"WORLD_SIZE=2, but there is no process group: .* alone.*torch.distributed.init_process_group before"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), models.BatchNormAct(3)])
def test_a_launched_rank_without_a_process_group_warns_once(layer, launched, recwarn):
    model = syncnorm.convert(nn.Sequential(layer))
    assert syncnorm.describe(model)[0].group == "no process group yet"
    x = torch.randn(2, 3, 4, 4)
    model.eval()(x)
    with syncnorm.no_sync_stats():
        model.train()(x)
    if ONE_GRAPH:  # otherwise the layer runs eagerly in compiled code as well
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not [w for w in recwarn if "syncnorm" in w.filename or "WORLD_SIZE" in str(w.message)]
    with pytest.warns(UserWarning, match=ALONE):
        model(x)
    recwarn.clear()
    model(x)
    syncnorm.functional.sync_batch_norm(x, None, None, training=True)
    assert not recwarn


@pytest.mark.parametrize("world_size", ["", "1", "two"])
def test_one_rank_or_no_launcher_does_not_warn(world_size, launched, monkeypatch, recwarn):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    syncnorm.SyncBatchNorm(3)(torch.randn(2, 3))
    assert not recwarn


def _rank_with_a_group() -> tuple[str, int]:
    process_groups._warn_under_a_launcher.cache_clear()  # run_ranks sets WORLD_SIZE
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.randn(2, 3))
    return syncnorm.describe(model)[0].group, len(said)


def test_a_rank_with_a_process_group_does_not_warn():
    assert run_ranks(_rank_with_a_group) == [("default", 0)] * 2
