"""Detection with the interface of torchvision: lists of images of different sizes, dicts of boxes, dicts of losses.

How to start:  syncnorm compare examples/jobs/detection.toml --html detection.html
Data: a digit of scikit-learn on noise. Needs: scikit-learn. torchvision_detection.toml is the same with torchvision.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

STRIDE, SIZE = 4, 48  # of a cell, and of the largest image, in pixels
Items = list[tuple[Tensor, dict[str, Tensor]]]
Batch = tuple[tuple[Tensor, ...], tuple[dict[str, Tensor], ...]]


def data() -> tuple[Items, Items]:
    """Images (1, H, W) of 32 to 48 pixels, each with a box (1, 4) and a label (1,)."""
    digits, items = torch.tensor(load_digits().images).float().unsqueeze(1) / 16, []
    for _ in range(1000):
        height, width, size = (int(torch.randint(*ends, ())) for ends in ((32, SIZE + 1), (32, SIZE + 1), (10, 25)))
        y, x = int(torch.randint(height - size, ())), int(torch.randint(width - size, ()))
        image, box = torch.rand(1, height, width) / 2, torch.tensor([[x, y, x + size, y + size]])
        image[:, y : y + size, x : x + size] += F.interpolate(digits[torch.randint(len(digits), (1,))], size)[0]
        items.append((image, {"boxes": box.float(), "labels": torch.ones(1, dtype=torch.int64)}))
    return items[:800], items[800:]


def collate(items: Items) -> Batch:
    """Images and targets, not stacked."""
    return tuple(zip(*items, strict=True))


class Detector(nn.Module):
    """For each cell, a logit for "the center of the object is here", and its distances from the sides of the box."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = backbone(), nn.Conv2d(32, 5, 3, padding=1)

    def forward(self, images, targets=None):
        """In training a dict of losses, in eval mode a dict of boxes, scores and labels for each image."""
        padded = torch.stack([F.pad(x, (0, SIZE - x.size(2), 0, SIZE - x.size(1))) for x in images])
        out, side = self.head(self.backbone(padded)).flatten(2), SIZE // STRIDE
        cells, sides = torch.arange(side * side), (8 + 8 * out[:, 1:].mT).clamp(min=-SIZE if self.training else 1)
        centers = torch.stack([cells % side, cells // side], 1) * STRIDE + STRIDE / 2
        boxes = torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], 2)
        if not self.training:
            found = zip(boxes, out[:, 0].softmax(1), strict=True)
            return [{"boxes": box, "scores": score, "labels": torch.ones_like(cells)} for box, score in found]
        true = torch.cat([target["boxes"] for target in targets])
        cell = ((true[:, :2] + true[:, 2:]) / 2 // STRIDE @ true.new_tensor([1, side])).long()
        error = (boxes[torch.arange(len(true)), cell] - true).abs().mean()
        return {"classification": F.cross_entropy(out[:, 0], cell), "regression": error / 12}


def backbone() -> nn.Sequential:
    """(N, 1, H, W) -> (N, 32, H / STRIDE, W / STRIDE), with batch norms."""
    widths = ((1, 16, 2), (16, 32, 2), (32, 32, 1), (32, 32, 1))
    layers = [(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in widths]
    return nn.Sequential(*sum(layers, ()))


def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The losses, which are added up."""
    return model(*batch)


def overlap(model: nn.Module, batch: Batch) -> Tensor:
    """Intersection over union of the true box and the one with the highest score, for each image."""
    a = torch.stack(
        [f["boxes"][f["scores"].argmax()] if len(f["boxes"]) else torch.zeros(4) for f in model(batch[0])]
    )
    b = torch.cat([target["boxes"] for target in batch[1]])
    both = (torch.minimum(a, b)[:, 2:] - torch.maximum(a, b)[:, :2]).clamp(min=0).prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


overlap.higher_is_better = overlap.share = True
