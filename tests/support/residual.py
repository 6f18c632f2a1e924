"""A small residual network, and one step of it in a way to compare with another."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm.testing import assert_close


class Block(nn.Module):
    """A residual block whose shortcut has a batch norm too, parallel to the other two."""

    def __init__(self, inputs: int, outputs: int, stride: int, checkpointed: bool | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.checkpointed)

    def block(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(checkpointed: bool | None = None, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(inplace=True),
        Block(6, 6, 1, checkpointed), Block(6, 8, 2, checkpointed), Block(8, 8, 1, checkpointed),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # weights of 1 and biases of 0 hide faults
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return net


def data(samples: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 12, 12, generator=generator, dtype=torch.double) * 2 + 3
    return x.to(dtype), torch.randn(samples, 5, generator=generator, dtype=torch.double).to(dtype)


def state(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    return {
        "y": y.detach(),
        "dx": x.grad,
        "grads": [p.grad for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
    }


def one_step(model: nn.Module, context: Any, samples: int = 7, autocast: bool = False) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    x, dy = data(samples, dtype)
    x.requires_grad_()
    with context, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(x)
    y.float().backward(dy.float()) if autocast else y.backward(dy)
    return state(model, x, y)


def assert_same_step(have: dict[str, Any], want: dict[str, Any], dtype: torch.dtype = torch.double) -> None:
    for key in ("y", "dx"):
        assert_close(have[key], want[key].double(), dtype)
    for a, b in zip(have["grads"], want["grads"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b.double(), dtype)
    for name, buffer in want["buffers"].items():
        assert_close(have["buffers"][name].double(), buffer.double(), dtype)
