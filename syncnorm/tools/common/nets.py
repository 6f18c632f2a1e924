"""Networks: two small ones for 8x8 images and two CPU cores, and a residual one of the size of ResNet-18."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, H, W) -> (N, width, H / stride, W / stride)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Sequential):
    """A stem, one block per width, average pooling, a linear classifier: (N, 1, 8, 8) -> (N, num_classes)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10) -> None:
        blocks = [
            ResidualBlock(width_in, width, stride=1 if width == width_in else 2)
            for width_in, width in zip((widths[0], *widths[:-1]), widths, strict=True)
        ]
        super().__init__(
            nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], num_classes),
        )


def build_residual_net() -> ResidualNet:
    """The residual network with ``nn.BatchNorm2d`` layers.

    The weights and biases of the norms are random too: with torch's ones and zeros, code that swaps or ignores them
    would still give the right result of the first step.
    """
    model = ResidualNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def build_plain_net(widths: tuple[int, ...] = (16, 16, 32, 32), num_classes: int = 10) -> nn.Sequential:
    """3x3 convolutions with ``nn.BatchNorm2d`` and ReLU, max-pooling between their halves: no shortcuts.

    (N, 1, 8, 8) -> (N, num_classes). Without shortcuts around them, its norms decide how well it trains.
    """
    layers: list[nn.Module] = []
    for index, (width_in, width) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
        if index == len(widths) // 2:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
    return nn.Sequential(*layers, *head)


RESNET_NAME = "a ResNet-18-like network"
# Of the first stage; each later stage is twice as wide as the one before.
RESNET_WIDTH = 64
RESNET_CLASSES = 10
_STRIDES = (1, 2, 2, 2)


class ResNet18(nn.Module):
    """ResNet-18's depth and widths for small images: a 3x3 stem, four stages of two residual blocks, mean, linear."""

    def __init__(self, width: int = RESNET_WIDTH) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(_STRIDES))]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ResidualBlock(width_in, width_out, stride), ResidualBlock(width_out, width_out, 1))
                for width_in, width_out, stride in zip((width, *widths[:-1]), widths, _STRIDES, strict=True)
            )
        )
        self.classifier = nn.Linear(widths[-1], RESNET_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, RESNET_CLASSES)."""
        features_NCHW = self.stages(torch.relu(self.stem(x)))
        logits: Tensor = self.classifier(features_NCHW.mean((2, 3)))
        return logits


def build_resnet18(width: int = RESNET_WIDTH, seed: int = 0) -> ResNet18:
    """The network with ``nn.BatchNorm2d`` layers; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18(width)
