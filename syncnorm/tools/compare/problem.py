"""What the arms train: a model, data, a loss or a step, an optimizer and a metric."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.conversion.convert import convert
from syncnorm.errors import InputError
from syncnorm.tools.common.data import collate as stack
from syncnorm.tools.common.data import digits, seed_everything
from syncnorm.tools.common.loading import similar
from syncnorm.tools.common.nets import build_plain_net
from syncnorm.tools.compare.metrics import Metric, as_metric
from syncnorm.tools.compare.named_metrics import NAMED
from syncnorm.tools.compare.records import CompareSettings
from syncnorm.tools.compare.steps import Step, as_loss, trains_by_itself

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """Functions that every rank calls itself, so that only their names are sent to the ranks.

    Attributes:
        build_model: () -> the model with its batch norms, in its initial state.
        make_datasets: () -> (training data, test data), map-style.
        loss: (output, target) -> a scalar, the mean over the samples, as DDP takes the mean over ranks. Used without
            a step, for batches of (input, target).
        model_name: for the record, like the other names.
        step: see `tools.compare.steps`.
        collate: list of items -> batch.
        optimizer: (model) -> an optimizer, or several; SGD with momentum if there is none.
        metric: by which the arms are judged; `check_problem` fills it in if it is not given, like what follows.
        unused_parameters: whether a step leaves parameters without a gradient.
        has_test_loss: whether the model has a loss in eval mode.
    """

    build_model: Callable[[], nn.Module]
    make_datasets: Callable[[], Any]
    loss: Loss
    model_name: str
    data_name: str
    loss_name: str
    step: Step | None = None
    collate: Callable[[list[Any]], Any] = stack
    optimizer: Callable[[nn.Module], Any] | None = None
    metric: Metric | None = None
    unused_parameters: bool = False
    has_test_loss: bool = True

    @classmethod
    def of(
        cls,
        build_model: Callable[[], nn.Module] | None = None,
        datasets: Callable[[], Any] | None = None,
        loss: Loss | None = None,
        *,
        step: Step | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        metric: str | Metric | Callable[..., Any] | None = None,
        optimizer: Callable[[nn.Module], Any] | None = None,
    ) -> Problem:
        """The user's functions; the defaults are a small CNN, scikit-learn's digits and cross-entropy.

        Raises:
            InputError: no metric has this name, or it does not say its direction, or a step and a loss are given.
        """
        if step is not None and loss is not None:
            raise InputError(f"the step {name_of(step)} computes the loss itself: leave out the loss {name_of(loss)}")
        return cls(
            build_model or build_plain_net,
            datasets or digits,
            loss or F.cross_entropy,
            name_of(build_model) if build_model else "a small CNN",
            name_of(datasets) if datasets else "scikit-learn's digits",
            f"computed by {name_of(step)}" if step else name_of(loss) if loss else "cross-entropy",
            step=step,
            collate=collate or stack,
            optimizer=optimizer,
            metric=None if metric is None else _metric(metric),
        )

    @property
    def step_name(self) -> str:
        """Of the step; empty by default."""
        return name_of(self.step) if self.step else ""

    @property
    def collate_name(self) -> str:
        """Of the function that makes a batch; empty by default."""
        return "" if self.collate is stack else name_of(self.collate)

    @property
    def optimizer_name(self) -> str:
        """Of the function that builds the optimizer; empty by default."""
        return name_of(self.optimizer) if self.optimizer else ""

    @property
    def trains_by_itself(self) -> bool:
        """Whether the step calls the optimizers."""
        return self.step is not None and trains_by_itself(self.step, self.step_name)

    def build(self, seed: int) -> Any:
        """The return value of the user's function, with the weights of ``seed``, the same on every rank."""
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

    def optimizers(self, model: nn.Module, settings: CompareSettings) -> Any:
        """What the user's function returns for ``model``, or SGD with momentum."""
        if self.optimizer is None:
            return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
        return self.optimizer(model)

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Raises:
            InputError: the step returned something else.
        """
        if self.step is None:
            inputs, targets = batch
            return self.loss(model(inputs), targets)
        return as_loss(self.step(model, batch), f"the step {self.step_name}")

    def try_step(self, model: nn.Module, batch: Any, settings: CompareSettings) -> nn.Module:
        """One training step, up to the gradients, of a copy of ``model``, which is returned.

        A model may return something different in training, and its buffers change.
        """
        model = copy.deepcopy(model).train()
        if self.trains_by_itself:
            assert self.step is not None
            as_loss(self.step(model, batch, self.optimizers(model, settings)), f"the step {self.step_name}")
        else:
            self.loss_of(model, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return model


def name_of(function: Callable[..., Any]) -> str:
    """``package.module:function``, as on a command line."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _metric(metric: str | Metric | Callable[..., Any]) -> Metric:
    if isinstance(metric, str):
        if metric not in NAMED:
            raise InputError(
                f"no metric is called {metric!r}{similar(metric, list(NAMED))}: expected {', '.join(NAMED)}, or "
                f"module:function"
            )
        return NAMED[metric]
    return metric if isinstance(metric, Metric) else as_metric(metric, name_of(metric))
