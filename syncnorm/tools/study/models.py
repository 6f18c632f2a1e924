"""The network of the image studies: a plain stack of convolutions, so that nothing but the norm keeps it in shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from syncnorm.tools.study.data import SIDE

Place = Literal["before", "after", "both", "none"]
Init = Literal["he", "small"]
# Of all weights of a "small" network, as Krizhevsky, Sutskever and Hinton (2012) drew theirs.
SMALL = 0.01
WIDTHS = (8, 16, 32)


def build_net(seed: int, widths: Sequence[int] = WIDTHS, place: Place = "before", init: Init = "he") -> nn.Sequential:
    """Convolutions 3x3 with ReLU and batch norm, linear classifier over all positions: (N, 1, 14, 14) -> (N, 10).

    No mean over space at the end: behind an instance norm it would find the same in every image. A
    convolution halves the image where the width grows, the first too: widths that grow three times end at 2x2. It
    has a bias wherever its norm stands, for a norm behind the ReLU does not replace it. For the same seed the weights
    are the same whatever ``place`` is.

    Args:
        seed: of the weights.
        widths: channels of each convolution.
        place: of the batch norm: before the ReLU, after it, on both sides, or none.
        init: ``"he"``: the convolutions' weights keep the variance of what passes them (He et al. 2015, equation 10);
            ``"small"``: they have a standard deviation of 0.01, and what passes them fades from layer to layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        width_in, side = 1, SIDE
        for width in widths:
            stride = 2 if width > width_in else 1
            side = -(-side // stride)
            conv = nn.Conv2d(width_in, width, 3, stride, padding=1)
            if init == "he":
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            else:
                nn.init.normal_(conv.weight, std=SMALL)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
            layers.append(conv)
            if place in ("before", "both"):
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            if place in ("after", "both"):
                layers.append(nn.BatchNorm2d(width))
            width_in = width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width_in * side * side, 10))
