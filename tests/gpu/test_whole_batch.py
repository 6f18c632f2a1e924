"""Micro-batches in step on a GPU: the whole batch's step, with what the backward needs in host memory."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.testing import assert_close
from syncnorm.tools.common.nets import build_resnet18
from syncnorm.training import whole_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Of the first backward in a process, whose thread has no context yet.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


def one_step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, parts: int, offload: bool) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    if parts:
        with whole_batch(model, parts, offload=offload):
            y = model(x)
    else:
        y = model(x)
    y.backward(dy)
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("offload", [False, True])
def test_a_residual_network_computes_the_step_of_the_whole_batch(offload):
    plain = build_resnet18(8).double().cuda()
    model = syncnorm.convert(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 16, 16, generator=generator, dtype=torch.double).cuda()
    dy = torch.randn(7, 10, generator=generator, dtype=torch.double).cuda()
    for have, want in zip(one_step(model, x, dy, 3, offload), one_step(plain, x, dy, 0, False), strict=True):
        assert_close(have.double(), want.double(), torch.double)


def peak(model: nn.Module, x: torch.Tensor, parts: int, offload: bool) -> int:
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(model, x, torch.randn(x.size(0), 10, device="cuda"), parts, offload)
    return torch.cuda.max_memory_allocated() - before


def test_offloading_takes_less_memory_on_the_device():
    x = torch.randn(32, 3, 64, 64, device="cuda")
    whole = peak(syncnorm.convert(build_resnet18(32).cuda()), x, 0, False)
    assert peak(syncnorm.convert(build_resnet18(32).cuda()), x, 8, True) < whole / 2


def test_a_checkpoint_finds_the_random_numbers_of_the_device_again():
    class Noisy(nn.Module):
        def __init__(self, checkpointed: bool):
            super().__init__()
            self.first, self.second, self.checkpointed = nn.BatchNorm1d(4), nn.BatchNorm1d(4), checkpointed

        def block(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(nn.functional.dropout(self.first(x)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)

    x, dy = torch.randn(12, 4, device="cuda"), torch.randn(12, 4, device="cuda")
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(6)
        found.append(one_step(syncnorm.convert(Noisy(checkpointed).cuda()), x, dy, 3, False)[:2])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)
