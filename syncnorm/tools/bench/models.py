"""The model whose training step is timed: a residual network of ResNet-18's depth and widths, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.tools.common.nets import ResidualBlock

NAME = "a ResNet-18-like network"
# Of the first stage; each later one is twice as wide as the one before.
WIDTH = 64
STRIDES = (1, 2, 2, 2)
NUM_CLASSES = 10


class ResNet18(nn.Module):
    """A 3x3 stem, four stages of two residual blocks, mean over space, linear: (N, 3, H, W) -> (N, 10)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(STRIDES))]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ResidualBlock(width_in, width_out, stride), ResidualBlock(width_out, width_out, 1))
                for width_in, width_out, stride in zip((width, *widths[:-1]), widths, STRIDES, strict=True)
            )
        )
        self.classifier = nn.Linear(widths[-1], NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, NUM_CLASSES)."""
        places_NCHW = self.stages(torch.relu(self.stem(x)))
        logits: Tensor = self.classifier(places_NCHW.mean((2, 3)))
        return logits


def build_model(width: int = WIDTH, seed: int = 0) -> ResNet18:
    """The network with ``nn.BatchNorm2d`` layers, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18(width)
