"""``describe``: one row per norm layer, with the reason if it is not synchronized."""

import warnings

import models
import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.conversion import classes


def test_layers_that_cannot_be_converted_are_left_alone_and_named():
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of torch.jit: up to 2.13, and from 2.14 on
            warnings.simplefilter("ignore", category)
        scripted = torch.jit.script(nn.BatchNorm2d(4))
    model = nn.Sequential(nn.BatchNorm2d(4), models.OwnArithmetic(4), scripted, nn.GroupNorm(2, 4))
    before = [type(m) for m in model]
    with pytest.warns(UserWarning, match=r"left 2 layer\(s\) .*: 1: .*F.batch_norm; 2: TorchScript") as said:
        syncnorm.convert(model)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert [type(m) for m in model][1:] == before[1:]
    assert str(syncnorm.describe(model)).splitlines() == [
        "layer  class                  synced  group                 note",
        "0      SyncBatchNorm2d        yes     no process group yet",
        f"1      OwnArithmetic          no      -                     left alone: {classes.NO_CALL}",
        "2      RecursiveScriptModule  no      -                     left alone: TorchScript, which cannot be "
        "converted",
        "3      GroupNorm              no      -                     no batch statistics to sync",
    ]


def test_before_conversion_and_without_norms():
    assert syncnorm.describe(nn.BatchNorm1d(3))[0].note == "convert() syncs it"
    assert str(syncnorm.describe(nn.Linear(2, 2))) == "no normalization layers"


class WrapperBatchNorm(nn.Module):
    """Like PatchTSTBatchNorm of transformers: a batch norm between two transpositions."""

    def __init__(self):
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(4)


def test_the_layer_is_listed_and_its_wrapper_is_not():
    assert [layer.name for layer in syncnorm.describe(WrapperBatchNorm())] == ["batchnorm"]
