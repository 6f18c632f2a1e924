"""The metrics that have a name: accuracy, loss, mean IoU, and the mean average precision of boxes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.tools.compare.metrics import LOSS, Metric


def logits_of(outputs: Any) -> Tensor:
    """The logits (N, C, ...): ``outputs`` itself, or its ``logits`` (transformers) or ``out`` (torchvision)."""
    for name in ("logits", "out"):
        if isinstance(outputs, Mapping) and name in outputs:
            outputs = outputs[name]
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"expected logits (N, C, ...) or an output with logits, got {got}")
    return outputs


def _classes(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Predicted and true classes, both (N, ...), which of them are labeled, and C.

    Other labels than 0 to C - 1 are ignored: -100 as in cross-entropy, or 255 for an unlabeled pixel.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"expected batches of (inputs, targets), got {type(batch).__name__}")
    logits, targets = logits_of(model(batch[0])), batch[1]
    if not isinstance(targets, Tensor) or targets.shape != (logits.shape[0], *logits.shape[2:]):
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"logits of shape {tuple(logits.shape)} do not fit targets of shape {got}")
    return logits.argmax(1), targets, (targets >= 0) & (targets < logits.shape[1]), logits.shape[1]


class Accuracy:
    """The share of labels that are right; by sample, the share of each sample's labels."""

    def __init__(self) -> None:
        self._right: list[Tensor] = []
        self._labeled: list[Tensor] = []

    def update(self, model: Any, batch: Any) -> None:
        """Adds a batch of (inputs, targets)."""
        predicted, targets, labeled, _ = _classes(model, batch)
        self._right.append(((predicted == targets) & labeled).reshape(len(targets), -1).sum(1).cpu())
        self._labeled.append(labeled.reshape(len(targets), -1).sum(1).cpu())

    def compute(self) -> float:
        """Right labels / labels."""
        return float(torch.cat(self._right).sum()) / float(torch.cat(self._labeled).sum())

    def units(self) -> list[float]:
        """The share of each sample that has labels."""
        right, labeled = torch.cat(self._right), torch.cat(self._labeled)
        return (right[labeled > 0] / labeled[labeled > 0]).tolist()


class MeanIoU:
    """Intersection over union of predicted and true pixels of each class, averaged over the classes that occur."""

    def __init__(self) -> None:
        self._confusion_CC: Tensor | None = None

    def update(self, model: Any, batch: Any) -> None:
        """Adds a batch of (inputs, targets)."""
        predicted, targets, labeled, C = _classes(model, batch)
        pairs = targets[labeled] * C + predicted[labeled]
        confusion = torch.bincount(pairs, minlength=C * C).view(C, C).cpu()
        self._confusion_CC = confusion if self._confusion_CC is None else self._confusion_CC + confusion

    def compute(self) -> float:
        """Mean over the classes that are labeled or predicted somewhere."""
        if self._confusion_CC is None:
            return float("nan")
        both = self._confusion_CC.diagonal().double()
        either = self._confusion_CC.sum(0) + self._confusion_CC.sum(1) - both
        return float((both[either > 0] / either[either > 0]).mean())


class MeanAveragePrecision:
    """COCO's mean average precision over classes and IoU from 0.5 to 0.95, by torchmetrics.

    A batch is (images, targets), and ``model(images)`` a list of dicts, as in torchvision: boxes (K, 4), x1, y1, x2,
    y2; scores (K,); labels (K,). A target has boxes and labels.
    """

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision as Implementation

        backend = "faster_coco_eval" if find_spec("faster_coco_eval") else "pycocotools"
        self._metric = Implementation(backend=backend)

    def update(self, model: Any, batch: Any) -> None:
        """Adds a batch of (images, targets)."""
        images, targets = batch
        found = model(images)
        self._metric.update([_on_cpu(each) for each in found], [_on_cpu(each) for each in targets])

    def compute(self) -> float:
        """Between 0 and 1; not a number if there is no box at all."""
        value = float(self._metric.compute()["map"])
        return value if value >= 0 else float("nan")


def _on_cpu(boxes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: boxes[key].cpu() for key in ("boxes", "scores", "labels") if key in boxes}


ACCURACY = Metric(Accuracy, "accuracy", share=True)
NAMED = {
    "accuracy": ACCURACY,
    "loss": LOSS,
    "miou": Metric(MeanIoU, "mIoU", share=True),
    "map": Metric(MeanAveragePrecision, "mAP", share=True),
}
