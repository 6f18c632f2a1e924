"""Detection with the interface of torchvision: lists of images of different sizes, dicts of boxes, dicts of losses.

What it shows: losses that are added up, a collate function that keeps lists, a model without a loss in eval mode. It
               is torchvision's FCOS if torchvision is installed, otherwise a small one that finds one box per image.
How to start:  syncnorm compare examples/jobs/detection.toml --html detection.html
Data: a digit of scikit-learn on noise. Needs: scikit-learn. ``--metric map`` needs torchmetrics and torchvision.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

STRIDE, SIZE = 4, 48  # of a cell, and of the largest image, in pixels
Items = list[tuple[Tensor, dict[str, Tensor]]]


def data() -> tuple[Items, Items]:
    """Images (1, H, W) of 32 to 48 pixels, each with a box (1, 4) and a label (1,)."""
    digits, items = torch.tensor(load_digits().images).float().unsqueeze(1) / 16, []
    for _ in range(1000):
        (height, width), size = torch.randint(32, SIZE + 1, (2,)).tolist(), int(torch.randint(10, 25, ()))
        y, x = (int(torch.randint(side - size, ())) for side in (height, width))
        image, box = torch.rand(1, height, width) / 2, torch.tensor([[x, y, x + size, y + size]])
        image[:, y : y + size, x : x + size] += F.interpolate(digits[torch.randint(len(digits), (1,))], size)[0]
        items.append((image, {"boxes": box.float(), "labels": torch.ones(1, dtype=torch.int64)}))
    return items[:800], items[800:]


def collate(items: Items) -> tuple[tuple[Tensor, ...], tuple[dict[str, Tensor], ...]]:
    """Images and targets, not stacked."""
    return tuple(zip(*items, strict=True))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (N, 4)."""
    both = (torch.minimum(a, b)[:, 2:] - torch.maximum(a, b)[:, :2]).clamp(min=0).prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


class Small(nn.Module):
    """Logits for "the center is in this cell", and the distances from the cell to the sides of the box."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(32, 5, 3, padding=1)

    def forward(self, images: Any, targets: Any = None) -> Any:
        """In training a dict of losses, in eval mode a dict of boxes, scores and labels for each image."""
        padded = torch.stack([F.pad(x, (0, SIZE - x.size(2), 0, SIZE - x.size(1))) for x in images])
        out, side = self.head(self.backbone(padded)).flatten(2), SIZE // STRIDE
        n, cells = torch.arange(len(out), device=out.device), torch.arange(side * side, device=out.device)
        centers = torch.stack([cells % side, cells // side], 1) * STRIDE + STRIDE / 2
        near, far = (8 * F.softplus(each).mT for each in (out[:, 1:3], out[:, 3:]))
        boxes = torch.cat([centers - near, centers + far], 2)
        if not self.training:
            scores, best = out[:, 0].softmax(1).max(1, keepdim=True)
            found = zip(boxes[n, best[:, 0]].unsqueeze(1), scores, torch.ones_like(best), strict=True)
            return [{"boxes": box, "scores": score, "labels": label} for box, score, label in found]
        true = torch.cat([target["boxes"] for target in targets])
        x, y = ((true[:, :2] + true[:, 2:]) / 2 // STRIDE).long().T
        regression = 1 - iou(boxes[n, y * side + x], true).mean()
        return {"classification": F.cross_entropy(out[:, 0], y * side + x), "regression": regression}


def model() -> nn.Module:
    """The detector around a backbone with batch norm."""
    widths, backbone = ((1, 16, 2), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 32, 1)), nn.Sequential()
    for a, b, stride in widths:
        backbone.extend([nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()])
    if find_spec("torchvision") is None:
        return Small(backbone)
    from torchvision.models.detection import FCOS, anchor_utils

    backbone.out_channels = 32
    sizes = {"min_size": SIZE, "max_size": SIZE, "fixed_size": (SIZE, SIZE), "image_mean": [0.5], "image_std": [0.5]}
    return FCOS(backbone, 2, anchor_utils.AnchorGenerator(((STRIDE,),), ((1.0,),)), **sizes)


def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The losses, which are added up."""
    return model(*batch)


def overlap(model: nn.Module, batch: Any) -> Tensor:
    """IoU of the true box and the one with the highest score, for each image."""
    nothing = torch.zeros(4, device=batch[0][0].device)
    best = [f["boxes"][f["scores"].argmax()] if len(f["boxes"]) else nothing for f in model(batch[0])]
    return iou(torch.stack(best), torch.cat([target["boxes"] for target in batch[1]]))


overlap.higher_is_better = overlap.share = True
