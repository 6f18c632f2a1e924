"""The per-sample results of a test as a short text in a JSON file: ``0110`` for right and wrong, else numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Digits of a value: rounding at the seventh changes no decision.
_FORMAT = ".7g"


def encode(values: Sequence[float] | Tensor) -> str:
    """One digit per value if all are 0 or 1; otherwise the values with a space after each.

    Example:
        >>> encode([0.0, 1.0, 1.0]), encode([0.25, 1.0])
        ('011', '0.25 1 ')
    """
    numbers = torch.as_tensor(values, dtype=torch.float64).tolist()
    if all(number in (0.0, 1.0) for number in numbers):
        return "".join(str(int(number)) for number in numbers)
    return "".join(f"{number:{_FORMAT}} " for number in numbers)


def decode(text: str) -> Tensor:
    """The inverse of `encode`: fp64, (U,).

    Example:
        >>> decode("011").tolist()
        [0.0, 1.0, 1.0]
    """
    numbers = map(float, text.split()) if " " in text else (digit - ord("0") for digit in text.encode())
    return torch.tensor(list(numbers), dtype=torch.float64)
