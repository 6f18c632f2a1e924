"""The model whose training step is timed: a residual network of ResNet-18's depth and widths, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.compare.models import ResidualBlock

NAME = "a ResNet-18-like network"
WIDTHS = (64, 128, 256, 512)
STRIDES = (1, 2, 2, 2)
NUM_CLASSES = 10


class ResNet18(nn.Module):
    """A 3x3 stem, four stages of two residual blocks, mean over space, linear: (N, 3, H, W) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ResidualBlock(width_in, width, stride), ResidualBlock(width, width, 1))
                for width_in, width, stride in zip((WIDTHS[0], *WIDTHS[:-1]), WIDTHS, STRIDES, strict=True)
            )
        )
        self.classifier = nn.Linear(WIDTHS[-1], NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, NUM_CLASSES)."""
        places_NCHW = self.stages(torch.relu(self.stem(x)))
        logits: Tensor = self.classifier(places_NCHW.mean((2, 3)))
        return logits


def build_model(seed: int = 0) -> ResNet18:
    """The network with ``nn.BatchNorm2d`` layers, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18()
