"""Which replacements of a synced layer are another library's rebuild of it, and which are the user's own."""

import warnings

import pytest
import torch
from torch import nn

import syncnorm

TorchSyncBatchNorm = nn.SyncBatchNorm


def synced(**options) -> nn.Sequential:
    return syncnorm.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options)))


def registered(model: nn.Sequential, new: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[1] = new
    return model[1]


class SyncBNReLU(nn.Module):
    def __init__(self, bn: nn.Module):
        super().__init__()
        self.bn = bn

    def forward(self, x):
        return self.bn(x).relu()


class NoSyncBatchNorm2d(nn.BatchNorm2d):
    pass


class Gated(TorchSyncBatchNorm):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.gate = nn.Parameter(torch.ones(channels))


def taking_over(new: nn.Module, old: nn.Module) -> nn.Module:
    new.weight, new.bias, new.running_mean, new.running_var = old.weight, old.bias, old.running_mean, old.running_var
    return new


def test_a_layer_around_a_synced_one_replaces_it():
    model = synced()
    around = SyncBNReLU(model[1])
    assert registered(model, around) is around


@pytest.mark.parametrize("make", [NoSyncBatchNorm2d, Gated, nn.BatchNorm2d], ids=lambda make: make.__name__)
def test_a_class_of_the_users_own_replaces_it(make):
    model = synced()
    new = taking_over(make(4), model[1])
    assert registered(model, new) is new


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_torchs_converter_leaves_it_alone(options):
    model = synced(**options)
    with pytest.warns(UserWarning, match="leaves the layers alone"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is syncnorm.SyncBatchNorm2d


def test_layers_that_were_constructed_are_kept_with_one_warning():
    class NaiveSyncBatchNorm(nn.BatchNorm2d):
        pass

    synced()
    model = nn.Sequential(*(syncnorm.SyncBatchNorm2d(3) for _ in range(4)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(4):
            model[index] = taking_over(NaiveSyncBatchNorm(3), model[index])
    assert ["leaves the layers alone" in str(warning.message) for warning in caught] == [True]
    assert all(type(layer) is syncnorm.SyncBatchNorm2d for layer in model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # 2.14 calls it deprecated
def test_children_of_torchscript_modules_can_be_registered():
    synced()
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), nn.BatchNorm1d(2))
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1], TorchSyncBatchNorm)


def test_inside_replacing_torch_a_rebuilt_layer_gets_the_new_options():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with syncnorm.replacing_torch():
        model[0] = taking_over(TorchSyncBatchNorm(4, eps=1e-3, momentum=0.01), model[0])
    assert (type(model[0]), model[0].eps, model[0].momentum) == (syncnorm.SyncBatchNorm2d, 1e-3, 0.01)


def test_inside_replacing_torch_a_class_of_the_users_own_stays():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with syncnorm.replacing_torch():
        new = taking_over(Gated(4), model[0])
        model[0] = new
    assert model[0] is new
