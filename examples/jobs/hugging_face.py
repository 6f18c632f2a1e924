"""A Hugging Face model, built from a config: the step returns its ``ModelOutput``, which has the loss.

What it shows: dict batches as keyword arguments of the model, AdamW, a metric per sample.
How to start:  syncnorm compare examples/jobs/hugging_face.toml --html hugging_face.html
Data: scikit-learn's digits. Nothing is downloaded. Needs: scikit-learn and transformers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

Items = list[dict[str, Any]]


def data() -> tuple[Items, Items]:
    """Training and test items: pixel_values (1, 16, 16) and labels."""
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 8 - 1, scale_factor=2)
    items = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]
    return items[:1300], items[1300:]


def model() -> ResNetForImageClassification:
    """A small ResNet with batch norm in every block."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, as in the Trainer."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)


def step(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A ModelOutput, whose loss is used."""
    return model(**batch)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """1 for each image that is classified correctly."""
    return (model(**batch).logits.argmax(1) == batch["labels"]).float()


accuracy.higher_is_better = accuracy.share = True
