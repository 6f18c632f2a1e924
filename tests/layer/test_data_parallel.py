"""nn.DataParallel cannot be synchronized: the layer warns once, at the first forward."""

import pytest
import torch
from torch import nn

import syncnorm


def model() -> nn.Sequential:
    return syncnorm.convert(nn.Sequential(nn.BatchNorm2d(3)))


def test_the_first_forward_warns_and_later_ones_do_not(recwarn):
    parallel = nn.DataParallel(model())
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=r"inside nn.DataParallel, whose replicas, .* cannot be synchronized"):
        parallel(x)
    recwarn.clear()
    parallel(x)
    assert not recwarn


def test_a_replica_is_local_and_warns():
    replica = model()[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.ones(3), torch.zeros(3)
    with pytest.warns(UserWarning, match="Use DistributedDataParallel"):
        replica(torch.randn(2, 3, 4, 4))


def test_no_warning_without_data_parallel(recwarn):
    model()(torch.randn(2, 3, 4, 4))
    assert not recwarn
