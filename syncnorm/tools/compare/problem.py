"""What the arms learn: a model, data and a loss, each from a function of the user's or of the demo's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.conversion.convert import convert
from syncnorm.tools.common.data import digits, seed_everything
from syncnorm.tools.common.nets import build_residual_net

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """Functions that every rank calls for itself, so that nothing but their names has to travel.

    Attributes:
        build_model: () -> the model with its batch norms, in the state in which training begins.
        make_datasets: () -> (training data, test data), map-style, of (input, target).
        loss: (output, target) -> a scalar; the mean over the samples, as DDP takes the mean over ranks.
        model_name: for the record; the other names likewise.
    """

    build_model: Callable[[], nn.Module]
    make_datasets: Callable[[], Any]
    loss: Loss
    model_name: str
    data_name: str
    loss_name: str

    def build(self, seed: int) -> Any:
        """What the user's function returns, with the weights of ``seed``, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            seed_everything(seed)
            return self.build_model()

    def model(self, seed: int) -> nn.Module:
        """The model with plain batch norms."""
        model: nn.Module = convert(self.build(seed), to="batch")
        return model

    def datasets(self) -> Any:
        """Training and test data, the same on every rank and for every seed."""
        with torch.random.fork_rng(devices=[]):
            seed_everything(0)
            return self.make_datasets()


def problem(
    build_model: Callable[[], nn.Module] | None, datasets: Callable[[], Any] | None, loss: Loss | None
) -> Problem:
    """The user's problem; where a part is not given, the demo's: a residual network, the digits, cross-entropy."""
    return Problem(
        build_model or build_residual_net,
        datasets or digits,
        loss or F.cross_entropy,
        name_of(build_model) if build_model else "a residual CNN",
        name_of(datasets) if datasets else "scikit-learn's digits",
        name_of(loss) if loss else "cross-entropy",
    )


def name_of(function: Callable[..., Any]) -> str:
    """As a command line would name it."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
