"""What whole_batch keeps on the device, and moves to host memory: on a CPU, with a device that is simulated."""

import gc
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from residual import assert_same_step, one_step, resnet
from simulated_device import simulated_device
from torch import Tensor, nn

import syncnorm
from syncnorm.training import offload, run_in_step, whole_batch

MICRO_BATCHES = 8


@pytest.mark.parametrize("checkpointed", [None, False])
def test_the_step_is_that_of_the_whole_batch(checkpointed):
    synced = syncnorm.convert(resnet(checkpointed).double())
    with simulated_device():
        in_parts = one_step(synced, whole_batch(synced, 3))
    assert_same_step(in_parts, one_step(resnet().double(), nullcontext()))


def deep_net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12)]
    return syncnorm.convert(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)))


def device_memory(offloads: bool | None) -> tuple[int, int]:
    """Of a step: the bytes between its forward and its backward, and the peak; undivided if ``offloads`` is None."""
    model = deep_net()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(2 * MICRO_BATCHES, 8, 32, 32)
    with simulated_device() as device:
        with whole_batch(model, 1 if offloads is None else MICRO_BATCHES, offload=bool(offloads)):
            loss = model(x).square().mean()
        kept = device.used
        loss.backward()
        del loss
        gc.collect()
        assert device.used < 1000
        return kept, device.peak


def test_the_device_holds_a_part_and_what_waits_at_one_layer():
    activation = 2 * MICRO_BATCHES * 8 * 32 * 32 * 4  # of the whole batch, in bytes; the net has 12 times 3
    kept, whole_peak = device_memory(None)
    assert 23 * activation < kept < 25 * activation  # a ReLU saves its output, which the convolution saves as well
    kept, peak = device_memory(False)
    assert peak > 0.9 * whole_peak
    kept, peak = device_memory(True)
    assert kept < activation / 50
    # The inputs of a layer and of the net, of all parts, and what one part computes.
    assert peak < 4 * activation


def test_a_tensor_is_moved_once_and_parameters_and_buffers_never():
    model, moved = syncnorm.convert(resnet()), []

    def to_host(tensor: Tensor) -> Tensor:
        moved.append(tensor.detach())  # which keeps it, so that no address is used twice
        return tensor.detach().clone()

    with simulated_device(), mock.patch.object(offload, "_to_host", to_host), whole_batch(model, 2):
        model(torch.randn(4, 3, 12, 12))
    addresses = [tensor.data_ptr() for tensor in moved]
    assert len(addresses) > 40
    assert len(set(addresses)) == len(addresses)
    assert {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}.isdisjoint(addresses)


def test_views_that_conjugate_are_moved_by_themselves():
    def function(x: Tensor) -> Tensor:
        z = torch.complex(x, x.sin())
        return layer((z * z.conj() * z.conj().exp()).real)

    layer = syncnorm.convert(nn.BatchNorm1d(4)).double()
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    dy = torch.randn(6, 4, dtype=torch.double)
    [expected] = torch.autograd.grad(function(x), x, dy)
    with simulated_device():
        torch.cat(run_in_step(function, x.split(2), model=layer)).backward(dy)
    torch.testing.assert_close(x.grad, expected)


def test_a_tensor_that_has_changed_is_moved_again():
    def function(x: Tensor) -> Tensor:
        y = x * 1
        z = y.exp() * y  # saves y
        y.add_(1)
        return layer(z * y)  # saves what y is now

    layer = syncnorm.convert(nn.BatchNorm1d(4)).double()
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    dy = torch.randn(6, 4, dtype=torch.double)
    with simulated_device():
        torch.cat(run_in_step(function, x.split(2), model=layer)).backward(dy)
    [expected] = torch.autograd.grad(layer(x.exp() * x * (x + 1)), x, dy)
    torch.testing.assert_close(x.grad, expected)
