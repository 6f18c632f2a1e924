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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncnorm import functional, groups, recomputation
from syncnorm.baselines import check_instances
from syncnorm.modules import Synced, warn_under_data_parallel

Norm = Callable[..., Tensor]  # called like F.batch_norm


class RedirectBatchNorm(TorchFunctionMode):
    """While active, a layer's calls of ``F.batch_norm`` or ``torch.batch_norm`` are calls of ``norm``.

    A call with the running statistics of another module, a child's, is let through.
    """

    def __init__(self, layer: nn.Module, norm: Norm):
        super().__init__()
        self.layer = layer
        self.norm = norm

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sends the layer's own call to ``norm``; all others run as they are."""
        kwargs = kwargs or {}
        if func is torch.batch_norm:
            args, kwargs = _in_order_of_functional(*args, **kwargs), {}
        elif func is not F.batch_norm:
            return func(*args, **kwargs)
        running_mean = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        if running_mean is not None and running_mean is not self.layer.running_mean:
            return F.batch_norm(*args, **kwargs)
        return self.norm(*args, **kwargs)


def _in_order_of_functional(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Any, ...]:
    """The arguments of ``torch.batch_norm`` as ``F.batch_norm`` takes them."""
    return input, running_mean, running_var, weight, bias, training, momentum, eps


class SyncCallsMixin(Synced):
    """Syncs what the forward of the class after it passes to ``F.batch_norm`` in training."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; see ``syncnorm.functional.sync_batch_norm`` for errors and collectives.

        ``num_batches_tracked`` is counted by the layer's own forward, so also for a batch that is empty on all ranks.
        """
        if warn_under_data_parallel(self) or not self.training:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]
        group = groups.synced_group(self.process_group)
        name = self.sync_name(group)

        calls = []

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return functional.sync_batch_norm(*args, **kwargs, process_group=self.process_group, layer=name)

        tracked = None if self.num_batches_tracked is None else self.num_batches_tracked.clone()
        version = None if self.running_mean is None else self.running_mean._version
        try:
            with RedirectBatchNorm(self, norm):
                output = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        except BaseException as error:
            if tracked is not None:  # counted before the input was judged
                self.num_batches_tracked.copy_(tracked)
            functional.pass_on(error, group, functional.device_of(self.running_mean, self.weight, input))
            raise
        if tracked is not None and not self._counts(version):
            self.num_batches_tracked.copy_(tracked)  # as the running statistics, it stays
        if not calls:
            warnings.warn(
                f"{type(self).__name__} did not call F.batch_norm in training, so syncnorm could not synchronise "
                f"it: its statistics are its own",
                stacklevel=2,
            )
        return output

    def _counts(self: Any, version: int | None) -> bool:
        """Whether this forward's batch counts: not a second time where it is computed again."""
        if recomputation.in_backward():
            return version is not None and version != self.running_mean._version  # the first run had nothing to move
        return groups.syncing()


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
            check_instances(x, self._num_groups)
            return F.group_norm(x, self._num_groups, weight, bias, eps)

        with RedirectBatchNorm(self, norm):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
