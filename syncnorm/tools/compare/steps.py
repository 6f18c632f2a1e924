"""One training step of the user's: how a batch becomes a loss, or a step that trains by itself.

A step ``fn(model, batch)`` returns the loss. The whole step is one forward for DDP: see `WholeStep`.

A step ``fn(model, batch, optimizers)`` calls ``backward`` and the optimizers itself, as GANs do, and returns a number
to record. DDP cannot be around it, so every network has a DDP of its own; see `tools.compare.wrapping`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from syncnorm.errors import InputError

Step = Callable[..., Any]

_EXPECTED = "expected a scalar tensor, a dict of them, or an output with .loss"


def trains_by_itself(step: Step, name: str) -> bool:
    """Whether ``step`` has the third parameter, ``optimizers``.

    Raises:
        InputError: it has neither two nor three parameters.
    """
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # a builtin has no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or required == 2:
        return False
    if required != 3:
        raise InputError(
            f"the step {name} has {required} parameter{'s' * (required != 1)}: expected (model, batch), which "
            f"returns the loss, or (model, batch, optimizers), which trains by itself"
        )
    return True


def as_loss(result: Any, what: str) -> Tensor:
    """The scalar in what a step returned: itself, its ``loss``, or the sum of a dict of losses.

    Args:
        result: of the step.
        what: the step in a message.

    Raises:
        InputError: there is no such scalar.
    """
    if isinstance(result, Tensor):
        if result.numel() != 1:
            kind = str(result.dtype).removeprefix("torch.")
            raise InputError(
                f"{what} returned {kind} of shape {tuple(result.shape)}: expected a scalar, the mean over the samples"
            )
        return result.reshape(())
    if isinstance(result, float | int):
        return torch.tensor(float(result))
    if hasattr(result, "loss") and not isinstance(result, nn.Module):
        if result.loss is None:
            raise InputError(
                f"{what} returned a {type(result).__name__} without a loss: pass the labels to the model"
            )
        return as_loss(result.loss, f"{what}: .loss")
    if isinstance(result, Mapping) and result:
        if "loss" in result:
            return as_loss(result["loss"], f"{what}: ['loss']")
        losses = [as_loss(value, f"{what}: [{key!r}]") for key, value in result.items()]
        return torch.stack(losses).sum()
    got = "None" if result is None else "an empty dict" if isinstance(result, Mapping) else type(result).__name__
    raise InputError(f"{what} returned {got}: {_EXPECTED}")


def list_of(optimizers: Any, name: str) -> list[Optimizer]:
    """The optimizers in what a factory returned: one, or a list, tuple or dict of several.

    Raises:
        InputError: it returned something else.
    """
    found = list(optimizers.values()) if isinstance(optimizers, Mapping) else optimizers
    found = list(found) if isinstance(found, list | tuple) else [found]
    wrong = [each for each in found if not isinstance(each, Optimizer)]
    if wrong or not found:
        got = type(wrong[0]).__name__ if wrong and wrong[0] is not None else "None" if wrong else "no optimizer"
        raise InputError(
            f"the optimizer function {name} returned {got}: expected a torch.optim.Optimizer, or a list, tuple or "
            f"dict of them"
        )
    return found


class WholeStep(nn.Module):
    """A step as a module, so that DDP sees one forward however often, and by which methods, the step calls the model.

    With DDP around the model alone, a second forward before the backward would fail, because DDP overwrites the
    buffers at the start of each, and a method other than ``forward`` would bypass DDP.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, batch: Any) -> Tensor:
        """The loss of ``batch``."""
        return self._loss_of(self.model, batch)


def has_forward(model: nn.Module) -> bool:
    """Whether the model can be called; a dict of networks, such as an ``nn.ModuleDict``, cannot."""
    return getattr(model.forward, "__name__", "") != "_forward_unimplemented"


def networks(model: nn.Module) -> list[nn.Module]:
    """The modules that a step calls: the model itself, or its children if it has no forward."""
    return [model] if has_forward(model) else list(model.children())
