"""Layers whose own forward calls ``F.batch_norm``: the call is redirected, all around it stays theirs.

A subclass of ``nn.BatchNorm`` may add an activation or dropout to its forward (timm's ``BatchNormAct2d``).
Rebuilding it as another class would lose that, so its forward runs as it is, under a mode that catches the
one call.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from syncnorm import functional
from syncnorm.modules import Synced, warn_under_data_parallel

Norm = Callable[..., Tensor]  # called like F.batch_norm


class RedirectBatchNorm(TorchFunctionMode):
    """While active, ``F.batch_norm`` and ``torch.batch_norm`` are ``norm``, which takes F.batch_norm's arguments."""

    def __init__(self, norm: Norm):
        super().__init__()
        self.norm = norm
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sends the two functions to ``norm``; all others run as they are."""
        if func is F.batch_norm:
            self.calls += 1
            return self.norm(*args, **(kwargs or {}))
        if func is torch.batch_norm:
            self.calls += 1
            x, weight, bias, mean, var, training, momentum, eps, _cudnn = args
            return self.norm(x, mean, var, weight, bias, training, momentum, eps)
        return func(*args, **(kwargs or {}))


class SyncCallsMixin(Synced):
    """Syncs what the forward of the class after it passes to ``F.batch_norm`` in training."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; see ``syncnorm.functional.sync_batch_norm`` for errors and collectives."""
        if warn_under_data_parallel(self) or not self.training:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        group = self.process_group

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            return functional.sync_batch_norm(*args, **kwargs, process_group=group)

        with RedirectBatchNorm(norm) as mode:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if mode.calls == 0:
            warnings.warn(
                f"{type(self)._plain_class.__name__} did not call F.batch_norm in training, so syncnorm could "
                f"not synchronise it: its statistics are its own",
                stacklevel=2,
            )
        return output


class GroupCallsMixin:
    """Group norm, in training and evaluation, where the forward of the class after it calls ``F.batch_norm``."""

    _num_groups: int

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""

        def norm(
            x: Tensor,
            mean: Tensor | None,
            var: Tensor | None,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Tensor:
            return F.group_norm(x, self._num_groups, weight, bias, eps)

        with RedirectBatchNorm(norm):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
