"""Segmentation with two images per rank: classes of pixels, an ignore label at the borders of objects, mean IoU.

What it shows: a loss with an ignore label and ``metric = "miou"``, which ignores the same pixels.
How to start:  syncnorm compare examples/jobs/segmentation.toml --html segmentation.html
Data: digits 0, 1 and 2 of scikit-learn, enlarged and placed on noise. Needs: scikit-learn.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

IGNORED = 255  # as in PASCAL VOC: pixels at the border of an object belong to no class
CLASSES = 4  # background, 0, 1, 2
SIZE = 32


def scenes(number: int) -> list[tuple[Tensor, Tensor]]:
    """Images (1, SIZE, SIZE) with two digits each, and their classes (SIZE, SIZE), int64."""
    digits, found = load_digits(n_class=CLASSES - 1), []
    for _ in range(number):
        image, classes = torch.rand(1, SIZE, SIZE) / 3, torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for left in (0, SIZE // 2):
            chosen, top, size = (int(torch.randint(*of, ())) for of in ((len(digits.images),), (0, 17), (12, 17)))
            digit = torch.tensor(digits.images[chosen])[None, None].float() / 16
            digit = F.interpolate(digit, (size, size), mode="bilinear")[0, 0]
            place = slice(top, top + size), slice(left, left + size)
            image[0][place] += digit
            inside = torch.where(digit > 0.5, int(digits.target[chosen]) + 1, torch.where(digit > 0.25, IGNORED, 0))
            classes[place] = torch.where(inside > 0, inside, classes[place])
        found.append((image, classes))
    return found


def data() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Training and test scenes; the generators are seeded before the call."""
    return scenes(800), scenes(200)


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Net(nn.Module):
    """(N, 1, H, W) -> (N, CLASSES, H, W), with a shortcut from the fine to the last features."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(1, 16), nn.Sequential(conv(16, 32, 2), conv(32, 32, 2), conv(32, 32))
        self.last, self.head = conv(48, 16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        fine = self.fine(x)
        return self.head(self.last(torch.cat([fine, F.interpolate(self.coarse(fine), scale_factor=4)], 1)))


def model() -> Net:
    """The network, with local batch norms."""
    return Net()


def loss(logits: Tensor, classes: Tensor) -> Tensor:
    """The mean over the images of each one's mean: ranks differ in their labeled pixels, and DDP averages ranks."""
    by_pixel = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none")
    return (by_pixel.sum((1, 2)) / (classes != IGNORED).sum((1, 2))).mean()
