"""torch's name for ``convert``, syncnorm's layers in the place of torch's, and converters that run afterwards."""

import threading
import warnings

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.modules import Synced
from syncnorm.testing import assert_matches_single_process, run_ranks

TORCHS = nn.SyncBatchNorm  # as code has it that imported it before


class Derived(syncnorm.SyncBatchNorm):
    """Inherits the method."""


@pytest.mark.parametrize("cls", [syncnorm.SyncBatchNorm, syncnorm.SyncBatchNorm2d, Derived])
def test_convert_sync_batchnorm_converts_in_place(cls):
    model = nn.Sequential(nn.BatchNorm2d(3), models.BatchNormAct(3))
    assert cls.convert_sync_batchnorm(model) is model
    assert type(model[0]) is syncnorm.SyncBatchNorm2d
    assert isinstance(model[1], Synced | models.BatchNormAct)
    layer = nn.BatchNorm1d(3)
    assert cls.convert_sync_batchnorm(layer) is layer
    assert isinstance(layer, syncnorm.SyncBatchNorm1d)


def _rank_convert_with_a_group() -> tuple[list[str], list[str]]:
    group = dist.new_group([0, 1])
    model = syncnorm.SyncBatchNorm.convert_sync_batchnorm(models.net(), process_group=group)
    before = [layer.group for layer in syncnorm.describe(model)]
    syncnorm.SyncBatchNorm.convert_sync_batchnorm(model)
    return before, [layer.group for layer in syncnorm.describe(model)]


def test_convert_sync_batchnorm_binds_a_group_and_keeps_it():
    for before, after in run_ranks(_rank_convert_with_a_group):
        assert set(before) == {"ranks [0, 1]"}
        assert after == before


def converted_by_torchs_name() -> nn.Module:
    with syncnorm.replacing_torch():
        return nn.SyncBatchNorm.convert_sync_batchnorm(models.net_with_activations())


def built_by_torchs_name() -> nn.Module:
    with syncnorm.replacing_torch():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU())


@pytest.mark.parametrize("build", [converted_by_torchs_name, built_by_torchs_name])
def test_layers_in_torchs_place_train_like_one_process_on_the_whole_batch(build):
    assert_matches_single_process(build, torch.randn(7, 3, 6, 6), steps=2, splits=(5, 2))


def test_every_name_of_torchs_class_converts():
    with syncnorm.replacing_torch():
        for cls in (TORCHS, nn.SyncBatchNorm, nn.modules.SyncBatchNorm, nn.modules.batchnorm.SyncBatchNorm):
            assert type(cls.convert_sync_batchnorm(nn.BatchNorm1d(3))) is syncnorm.SyncBatchNorm1d
        assert isinstance(syncnorm.convert(nn.BatchNorm2d(3)), nn.SyncBatchNorm)


def test_a_layer_of_torchs_class_converts_and_reverts_inside():
    with syncnorm.replacing_torch():
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(TORCHS(3))
        assert isinstance(layer, syncnorm.SyncBatchNorm)
        assert type(syncnorm.revert(layer)) is TORCHS
        assert type(syncnorm.convert(TORCHS(3), to="batch")(torch.randn(4, 3))) is Tensor


def is_replaced() -> bool:
    method = vars(TORCHS)["convert_sync_batchnorm"]
    names = (nn.SyncBatchNorm, nn.modules.batchnorm.SyncBatchNorm)
    assert all(cls is names[0] for cls in names)
    assert isinstance(method, classmethod) == (names[0] is TORCHS)
    return names[0] is syncnorm.SyncBatchNorm


def test_torchs_class_returns_after_an_error_and_after_the_outermost_context():
    hooks = len(nn.modules.module._global_module_registration_hooks)
    with pytest.raises(KeyError), syncnorm.replacing_torch():
        raise KeyError
    assert not is_replaced()
    with syncnorm.replacing_torch():
        with syncnorm.replacing_torch():
            assert is_replaced()
        assert is_replaced()
    assert not is_replaced()
    assert len(nn.modules.module._global_module_registration_hooks) == hooks


def test_torchs_class_returns_when_the_last_of_two_threads_leaves():
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with syncnorm.replacing_torch():
            entered.set()
            may_leave.wait(60)

    thread = threading.Thread(target=other)
    with syncnorm.replacing_torch():
        thread.start()
        assert entered.wait(60)
    assert is_replaced()
    may_leave.set()
    thread.join()
    assert not is_replaced()


def _rank_ddp_inside() -> tuple[Tensor, str]:
    with syncnorm.replacing_torch():
        model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))))
        model(torch.full((2, 3), float(dist.get_rank())))
        with pytest.raises(ValueError, match="only work with GPU modules") as refused:
            DistributedDataParallel(TORCHS(3))
    return model.module[0].running_mean, str(refused.value)


def test_ddp_inside_accepts_syncnorms_layers_on_cpu_and_still_refuses_torchs():
    for mean, _ in run_ranks(_rank_ddp_inside):
        torch.testing.assert_close(mean, torch.full((3,), 0.05))


def rebuilt(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """As apex's and mmcv's converters: a new layer with the running statistics of the old one and a copied weight."""
    new = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        new = cls(module.num_features)
        new.running_mean, new.running_var = module.running_mean, module.running_var
        new.weight.data = module.weight.data.clone()
    for name, child in module.named_children():
        new.add_module(name, rebuilt(child, cls))
    return new


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Stands for a synchronized layer of another library."""


CONVERTERS = {
    "torch": TORCHS.convert_sync_batchnorm,
    "constructs torch's": lambda model: rebuilt(model, TORCHS),
    "another library's": lambda model: rebuilt(model, NaiveSyncBatchNorm),
}


@pytest.mark.parametrize("converter", CONVERTERS.values(), ids=CONVERTERS)
def test_a_converter_that_runs_after_convert_leaves_synced_layers_alone_with_one_warning(converter):
    model = syncnorm.convert(models.net_with_activations())
    before = dict(model.named_modules())
    with pytest.warns(UserWarning, match="leaves the layers alone that syncnorm has synchronized") as caught:
        assert converter(model) is model
    assert len(caught) == 1
    assert dict(model.named_modules()) == before
    assert all(layer.synced for layer in syncnorm.describe(model))

    syncnorm.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converter(model)
    assert not any(isinstance(m, Synced) for m in model.modules())


@pytest.mark.parametrize("converter", CONVERTERS.values(), ids=CONVERTERS)
def test_a_converter_inside_that_constructs_torchs_layers_keeps_the_layer_and_converts_it(converter):
    model = models.net_with_activations()
    before = dict(model.named_modules())
    with syncnorm.replacing_torch():
        converter(model)
    ours = converter is not CONVERTERS["another library's"]
    assert all(layer.synced for layer in syncnorm.describe(model)) == ours
    assert (dict(model.named_modules()) == before) == ours


def test_a_layer_of_its_own_may_replace_a_synced_one():
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    fresh, plain = TORCHS(3), nn.BatchNorm2d(3)
    plain.weight = model[1].weight  # as a converter that reverts: what it builds synchronizes nothing
    model[0], model[1] = fresh, plain
    assert model[0] is fresh
    assert model[1] is plain
