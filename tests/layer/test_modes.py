"""A first call under a torch mode has no lasting effect; tensor subclasses behave as with ``nn.BatchNorm``."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

ROWS = (3, 2, 0)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(sum(ROWS), 6, 4, 4, generator=generator) for _ in range(2))
    return x, dy


@contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "no mode": nullcontext,
}


def _rank_steps(mode: str) -> list[Tensor]:
    """A forward under the mode, then an ordinary training step."""
    rank = dist.get_rank()
    layer = syncnorm.SyncBatchNorm2d(6)
    x, _ = (whole.split(ROWS)[rank] for whole in batch(0))
    context: AbstractContextManager[Any] = MODES[mode]()
    with context:
        layer(x)
    x, dy = (whole.split(ROWS)[rank] for whole in batch(1))
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked]


@pytest.mark.parametrize("mode", MODES)
def test_training_after_a_first_forward_under_a_mode(mode):
    first, second = batch(0), batch(1)
    want = batch_norm_oracle([first[0]], running_mean=torch.zeros(6), running_var=torch.ones(6))
    want = batch_norm_oracle([second[0]], [second[1]], running_mean=want.running_mean, running_var=want.running_var)
    ranks = run_ranks(_rank_steps, len(ROWS), (mode,), timeout=30)
    for rank, (y, dx, mean, var, count) in enumerate(ranks):
        assert_close(y, want.outputs[0].split(ROWS)[rank], torch.float32)
        assert_close(dx, want.grad_inputs[0].split(ROWS)[rank], torch.float32)
        assert_close(mean, want.running_mean, torch.float32)
        assert_close(var, want.running_var, torch.float32)
        assert count == 2


def _rank_fake_first() -> tuple[str, Tensor]:
    """Fake tensors have no values to exchange: an error on all ranks, after which the layer still works."""
    layer = syncnorm.SyncBatchNorm2d(6)
    x, _ = (whole.split(ROWS)[dist.get_rank()] for whole in batch(0))
    message = ""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(x))
    except Exception as error:
        message = str(error)
    return message, layer(x)


def test_a_first_forward_with_fake_tensors():
    want = batch_norm_oracle([batch(0)[0]]).outputs[0]
    for rank, (message, y) in enumerate(run_ranks(_rank_fake_first, len(ROWS), timeout=30)):
        assert message
        assert_close(y.detach(), want.split(ROWS)[rank], torch.float32)


class Image(torch.Tensor):
    """Carries metadata through every operation, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Image):
            for argument in args:
                if isinstance(argument, Image) and hasattr(argument, "spacing"):
                    result.spacing = argument.spacing
        return result


class Bare(torch.Tensor):
    """Adds nothing."""


def image(x: Tensor, kind: type[Tensor]) -> Tensor:
    x = x.clone().as_subclass(kind)
    x.spacing = 3
    return x


def net(inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.SiLU(inplace))


def _rank_images(kind: type[Tensor], inplace: bool, ddp: bool, second: bool) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = syncnorm.convert(net(inplace))
    call = DistributedDataParallel(model) if ddp else model
    x, dy = (whole.split(ROWS)[rank] for whole in batch(0))
    x = image(x, kind).requires_grad_()
    y = call(x)
    if second:
        (dx,) = torch.autograd.grad(y, x, image(dy, kind), create_graph=True)
        dx.square().sum().backward()
    else:
        y.backward(dy * world_size if ddp else dy)
    gradient = model[0].weight.grad.as_subclass(Tensor)
    if not ddp:
        dist.all_reduce(gradient)
    return {
        "class": (type(y).__name__, getattr(y, "spacing", None)),
        "y": y.detach().as_subclass(Tensor),
        "dx": x.grad.as_subclass(Tensor) / (world_size if ddp else 1),
        "dw": gradient,
        "running_var": model[0].running_var,
        "buffers": [type(b).__name__ for b in model.buffers()],
    }


@pytest.mark.parametrize("kind", [Image, Bare])
@pytest.mark.parametrize(
    ("inplace", "ddp", "second"),
    [(True, False, False), (False, False, False), (True, True, False), (False, False, True)],
)
def test_a_tensor_subclass(kind, inplace, ddp, second):
    plain = net(inplace)
    of_plain = plain(image(batch(0)[0], kind).requires_grad_())
    reference = net(False).double()
    x, dy = (whole.double() for whole in batch(0))
    x.requires_grad_()
    y = reference(x)
    if second:
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        dx.square().sum().backward()
    else:
        y.backward(dy)
    for rank, got in enumerate(run_ranks(_rank_images, len(ROWS), (kind, inplace, ddp, second), timeout=30)):
        assert got["class"] == (type(of_plain).__name__, getattr(of_plain, "spacing", None))
        assert set(got["buffers"]) == {"Tensor"}
        assert_close(got["y"], y.split(ROWS)[rank].detach(), torch.float32)
        torch.testing.assert_close(got["dx"].double(), x.grad.split(ROWS)[rank], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["dw"].double(), reference[0].weight.grad, rtol=1e-4, atol=1e-3)
        assert_close(got["running_var"], reference[0].running_var, torch.float32)
