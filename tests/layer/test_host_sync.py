"""The GPU path never reads a value from the device, because the host would wait for all kernels launched before.

No GPU is needed: fake tensors have no data, and torch raises if an operation depends on it. The process group is
torch's fake one.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from versions import fake_collectives

import syncnorm
from syncnorm.comm.communicator import Communicator
from syncnorm.layer import kernels
from syncnorm.layer.kernels import cpu


@pytest.fixture
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The CPU kernels check the values for channels far from zero; the CUDA kernels are not available here.
    passes = SimpleNamespace(**{**vars(cpu), "local_moments": lambda x, eps, scratch: cpu.corrected_moments(x, eps)})
    monkeypatch.setattr(kernels, "for_device", lambda device: passes)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@fake_collectives
@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize("rows", [4, 0, 1], ids=["full", "empty", "one value"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_reads_no_value(rows, momentum, masked):
    with FakeTensorMode():
        layer = syncnorm.SyncBatchNorm2d(3, momentum=momentum)
        x = torch.randn(rows, 3, 1, 1, requires_grad=True)
        mask = torch.ones(rows, 1, 1, dtype=torch.bool) if masked else None
        y = layer(x, mask=mask)
        y.backward(torch.randn(y.shape))
        assert x.grad is not None
        with pytest.raises(DataDependentOutputException):
            y.sum().item()


@pytest.mark.usefixtures("eight_ranks")
def test_a_disagreement_is_still_detected(monkeypatch):
    layer, x = syncnorm.SyncBatchNorm2d(3), torch.randn(4, 3, 2, 2)
    layer(x)  # the fake group returns what this rank sent
    monkeypatch.setattr(Communicator, "gather", lambda self, rows, row: rows.fill_(7.0))
    assert layer(x).isnan().all()
    with pytest.raises(syncnorm.SyncNormError, match="another rank did not run"):
        layer(x)
