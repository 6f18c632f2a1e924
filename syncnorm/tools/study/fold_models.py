"""The networks that are folded: a plain one, one with shortcuts, one of depthwise separable convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from syncnorm.tools.common.nets import ResidualNet
from syncnorm.tools.study.models import build_net

PLAIN_WIDTHS = (64, 64, 128, 128)
# ResNet-18's depth and widths: two blocks a width, behind a stem for small images.
RESIDUAL_WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)
SEPARABLE_WIDTHS = (64, 128, 128, 256, 256, 512)


def plain(seed: int) -> nn.Module:
    """Convolutions 3x3, each with batch norm and ReLU: (N, 1, 14, 14) -> (N, 10)."""
    return build_net(seed, PLAIN_WIDTHS)


def residual(seed: int) -> nn.Module:
    """A network of residual blocks like ResNet-18, of its widths: (N, 1, H, W) -> (N, 10)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNet(RESIDUAL_WIDTHS)


def separable(seed: int) -> nn.Module:
    """A stem, then for each width a depthwise 3x3 and a pointwise 1x1 convolution: (N, 1, H, W) -> (N, 10).

    Source: Howard et al., "MobileNets" (2017), figure 3: batch norm and ReLU after each of the two.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width_in = SEPARABLE_WIDTHS[0] // 2
        layers = _normed(nn.Conv2d(1, width_in, 3, padding=1, bias=False))
        for before, width in zip((0, *SEPARABLE_WIDTHS), SEPARABLE_WIDTHS, strict=False):
            stride = 2 if 0 < before < width else 1
            depthwise = nn.Conv2d(width_in, width_in, 3, stride, padding=1, groups=width_in, bias=False)
            layers += _normed(depthwise) + _normed(nn.Conv2d(width_in, width, 1, bias=False))
            width_in = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 10))


def _normed(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


RESIDUAL = "ResNet-18-like"
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "plain": plain,
    RESIDUAL: residual,
    "depthwise separable": separable,
}
