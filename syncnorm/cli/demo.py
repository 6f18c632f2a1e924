"""What a command trains where the user names nothing: ``compare``'s residual network and digits."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import TensorDataset

from syncnorm.compare.data import load_digits
from syncnorm.compare.models import build_model


def demo_model() -> nn.Module:
    """The residual network, with plain batch norms."""
    return build_model(seed=0)


def demo_datasets() -> tuple[Any, Any]:
    """Training and test digits."""
    digits = load_digits()
    return TensorDataset(digits.train_x, digits.train_y), TensorDataset(digits.test_x, digits.test_y)
