"""Layers whose own forward calls ``F.batch_norm``: the call is redirected, all around it stays theirs.

A subclass of ``nn.BatchNorm`` may add an activation or dropout to its forward (timm's ``BatchNormAct2d``).
Rebuilding it as another class would lose that, so its forward runs as it is, under a mode that catches the
one call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncnorm import functional
from syncnorm.comm import process_groups
from syncnorm.conversion.baselines import check_instances
from syncnorm.layer import checkpointing
from syncnorm.modules import Synced, warn_under_data_parallel

UNSEEN = "did not call F.batch_norm in training"
STRANGE = "calls F.batch_norm in training with statistics that belong to no synced layer"

Norm = Callable[..., Tensor]  # called like F.batch_norm


class RedirectBatchNorm(TorchFunctionMode):
    """While active, a layer's calls of ``F.batch_norm`` or ``torch.batch_norm`` are calls of ``norm``.

    A layer's calls are those with its own buffers, whole or in part, and those without running statistics. Calls with
    other statistics go to ``others``.
    """

    def __init__(self, layer: nn.Module, norm: Norm, others: Norm = F.batch_norm):
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.others = others

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sends a batch norm to whom it belongs; all other calls run as they are."""
        kwargs = kwargs or {}
        if func is torch.batch_norm:
            args, kwargs = _in_order_of_functional(*args, **kwargs), {}
        elif func is not F.batch_norm:
            return func(*args, **kwargs)
        running_mean = _argument(1, "running_mean", args, kwargs)
        if running_mean is None or running_mean is self.layer.running_mean or _holds(self.layer, running_mean):
            return self.norm(*args, **kwargs)
        return self.others(*args, **kwargs)


def _argument(position: int, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """An argument of ``F.batch_norm``."""
    return args[position] if len(args) > position else kwargs.get(name)


def _holds(layer: Any, tensor: Tensor) -> bool:
    """Whether ``tensor`` is a buffer of ``layer`` itself, or a part of one, as in slimmable networks."""
    return any(buffer is not None and _is_part(tensor, buffer) for buffer in layer._buffers.values())


def _is_part(tensor: Tensor, whole: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        tensor, whole = _unwrapped(tensor), _unwrapped(whole)
    if tensor is whole or tensor._base is whole:
        return True
    # A view of a detached tensor, or of a buffer that is a view itself, is known by its storage. A tracer has none; a
    # fake tensor has one, without an address.
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(tensor, whole):  # type: ignore[attr-defined]
        return False
    (first, last), (begin, end) = _extent(tensor), _extent(whole)
    return bool(begin <= first and last <= end)


def _unwrapped(tensor: Tensor) -> Tensor:
    """What ``torch.func``'s transforms have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _extent(tensor: Tensor) -> tuple[Any, Any]:
    """Where the first and the last value lie in the storage."""
    first = tensor.storage_offset()
    return first, first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


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

        Warns:
            UserWarning: once a layer, of a forward in training that could not be followed.
        """
        if warn_under_data_parallel(self) or not self.training:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]
        group = process_groups.synced_group(self.process_group)
        name = self.sync_name(group)

        calls: list[str | None] = []  # the layer that each call was synced as

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return functional.sync_batch_norm(*args, **kwargs, process_group=self.process_group, layer_name=name)

        def others(*args: Any, **kwargs: Any) -> Tensor:
            return _norm_of_others(self, calls, *args, **kwargs)

        tracked = [layer.num_batches_tracked for layer in (self, *self._sync_inner)]
        counts = _Counts([count for count in tracked if count is not None])
        try:
            with RedirectBatchNorm(self, norm, others), counts.with_records():
                output = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        except BaseException as error:
            counts.settle(failed=True)
            functional.abort_peers_with(error, group, functional.device_of(self.running_mean, self.weight, input))
            raise
        counts.settle()
        if None in calls:
            self.note_unsynced(STRANGE)
        elif not calls and not checkpointing.in_backward():
            self.note_unsynced(UNSEEN)
        return output


class _Counts:
    """The batches that layers counted in a forward of their own, which does not know when they have to stay."""

    def __init__(self, counts: list[Tensor]):
        self._counts = counts
        self._before = [count.clone() for count in counts]
        self.records: list[checkpointing.ForwardStatistics] = []  # of checkpointed runs

    def with_records(self) -> AbstractContextManager[None]:
        """For the forward."""
        return nullcontext() if torch.compiler.is_compiling() else checkpointing.recording(self.records)

    def settle(self, failed: bool = False) -> None:
        """At the end of the forward: keeps what was counted, or not."""
        if checkpointing.in_backward():  # where a second run may end by an exception, as soon as it has all it needs
            stay = all(record.counted for record in self.records)
        else:
            stay = failed or not process_groups.syncing()
        if stay:
            for count, before in zip(self._counts, self._before, strict=True):
                count.copy_(before)
        elif self.records:
            counted = any(bool(count != before) for count, before in zip(self._counts, self._before, strict=True))
            for record in self.records:
                record.counted = record.counted or counted


def _norm_of_others(layer: Any, calls: list[str | None], *args: Any, **kwargs: Any) -> Tensor:
    """A call in the forward of ``layer`` with other statistics: those of a synced layer inside it, or of none."""
    if not _argument(5, "training", args, kwargs):
        return F.batch_norm(*args, **kwargs)
    running_mean = _argument(1, "running_mean", args, kwargs)
    for inner in layer._sync_inner:
        if isinstance(inner, Synced) and _holds(inner, running_mean):  # it may have been reverted by itself
            group = inner.process_group
            name = inner.sync_name(process_groups.synced_group(group))
            calls.append(name)
            return functional.sync_batch_norm(*args, **kwargs, process_group=group, layer_name=name)
    if not checkpointing.in_backward():  # where a layer inside hands over copies, and there is nothing new to say
        calls.append(None)
    return F.batch_norm(*args, **kwargs)


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
