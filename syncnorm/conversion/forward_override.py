"""Overrides the calls of ``F.batch_norm`` in layers that define their own forward.

A subclass of ``nn.BatchNorm`` may add an activation or dropout to its forward (timm's ``BatchNormAct2d``).
Rebuilding it as another class would lose that, so its forward runs unchanged under a ``TorchFunctionMode`` that
intercepts this one call.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from syncnorm import functional
from syncnorm._torch_versions import graph_break
from syncnorm.comm import process_groups
from syncnorm.conversion.baselines import check_instances
from syncnorm.layer import checkpointing, micro_batches
from syncnorm.layer.window import window_of
from syncnorm.modules import Synced, warn_under_data_parallel

NOT_CALLED = "did not call F.batch_norm in training"
UNKNOWN_STATISTICS = "calls F.batch_norm in training with statistics that belong to no synced layer"

Norm = Callable[..., Tensor]  # with the arguments of F.batch_norm


class OverrideBatchNorm(TorchFunctionMode):
    """While active, replaces calls of ``F.batch_norm`` and ``torch.batch_norm``.

    Args:
        layer: whose forward runs.
        norm: replaces the calls that pass buffers of ``layer``, or views of them, as running statistics, and those
            that pass none.
        fallback: replaces the calls that pass other running statistics.
    """

    def __init__(self, layer: nn.Module, norm: Norm, fallback: Norm = F.batch_norm):
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.fallback = fallback

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces calls of a batch norm function; all other calls run unchanged."""
        kwargs = kwargs or {}
        if func is torch.batch_norm:
            args, kwargs = _functional_arguments(*args, **kwargs), {}
        elif func is not F.batch_norm:
            return func(*args, **kwargs)
        running_mean = _argument(1, "running_mean", args, kwargs)
        if running_mean is None or running_mean is self.layer.running_mean or _owns(self.layer, running_mean):
            return self.norm(*args, **kwargs)
        return self.fallback(*args, **kwargs)


def _argument(position: int, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """An argument of ``F.batch_norm``."""
    return args[position] if len(args) > position else kwargs.get(name)


def _owns(layer: Any, tensor: Tensor) -> bool:
    """Whether ``tensor`` is a buffer of ``layer`` (not of a child) or a view of one, as in slimmable networks."""
    return any(buffer is not None and _is_view(tensor, buffer) for buffer in layer._buffers.values())


def _is_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether ``tensor`` is ``base`` or a view that lies within it."""
    if not torch.compiler.is_compiling():
        tensor, base = _unwrapped(tensor), _unwrapped(base)
    if tensor is base or tensor._base is base:
        return True
    # Only the storage identifies a view of a detached tensor, and a view of a buffer that is itself a view. Tensors
    # that torch.compile traces have no storage; fake tensors have one without an address.
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(tensor, base):  # type: ignore[attr-defined]  # torch's stubs lack it
        return False
    (first, last), (base_first, base_last) = _storage_range(tensor), _storage_range(base)
    return bool(base_first <= first and last <= base_last)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func``'s transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _storage_range(tensor: Tensor) -> tuple[Any, Any]:
    """Offsets of the first and the last value in the storage."""
    first = tensor.storage_offset()
    return first, first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _functional_arguments(
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
    """The arguments of ``torch.batch_norm`` in the order of ``F.batch_norm``."""
    return input, running_mean, running_var, weight, bias, training, momentum, eps


class SyncOverrideMixin(Synced):
    """Mixed in before a class whose forward calls ``F.batch_norm``: synchronizes those calls in training."""

    @graph_break
    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; see ``syncnorm.functional.sync_batch_norm`` for errors and collectives.

        The layer's own forward increments ``num_batches_tracked``, even for a batch that is empty on all ranks.

        Warns:
            UserWarning: once per layer, if a forward in training could not be synchronized.
        """
        if warn_under_data_parallel(self) or not self.training:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]  # the class after the mix-in has it
        group = process_groups.synced_group(self.process_group)
        name = self.sync_name(group)

        counts = _BatchCounters(
            [layer for layer in (self, *self._sync_inner) if layer.num_batches_tracked is not None]
        )
        calls: list[str | None] = []  # per call, the name of the synced layer; None if it was not synchronized

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            with counts.of_one_batch():
                return functional.sync_batch_norm(
                    *args, **kwargs, process_group=self.process_group, layer_name=name, window=window_of(self)
                )

        def fallback(*args: Any, **kwargs: Any) -> Tensor:
            with counts.of_one_batch():
                return _sync_inner_layer(self, calls, *args, **kwargs)

        try:
            with OverrideBatchNorm(self, norm, fallback), counts.with_records():
                output = super().forward(input, *args, **kwargs)  # type: ignore[misc]  # the class after the mix-in has it
        except BaseException as error:
            counts.finish(failed=True)
            functional.abort_peers_with(error, group, functional.device_of(self.running_mean, self.weight, input))
            raise
        counts.finish()
        if None in calls:
            self.note_unsynced(UNKNOWN_STATISTICS)
        elif not calls and not checkpointing.in_backward():
            self.note_unsynced(NOT_CALLED)
        return output


class _BatchCounters:
    """The ``num_batches_tracked`` of layers whose own forward increments them even when they must not change."""

    def __init__(self, layers: list[Any]):
        self._counts = [layer.num_batches_tracked for layer in layers]
        self._before = [count.clone() for count in self._counts]
        self._later = False  # whether this is not the first of micro-batches that run in step
        self._again: list[tuple[Tensor, Tensor]] = []  # those that earlier micro-batches of a window have incremented
        if process_groups.syncing() and not checkpointing.in_backward() and micro_batches.current() is None:
            for layer, count, before in zip(layers, self._counts, self._before, strict=True):
                window = window_of(layer)
                if window is not None and window.continues:
                    count.sub_(1)
                    self._again.append((count, before))
        self.records: list[checkpointing.ForwardStatistics] = []  # of checkpointed forwards

    def with_records(self) -> AbstractContextManager[None]:
        """Collects the records of checkpointed forwards while the layer's forward runs."""
        return nullcontext() if torch.compiler.is_compiling() else checkpointing.recording(self.records)

    @contextmanager
    def of_one_batch(self) -> Iterator[None]:
        """Around a call in which micro-batches may wait for each other: of them only the first counts."""
        micro_batch = micro_batches.current()
        self._later = micro_batch is not None and micro_batch.index > 0
        if self._later:
            self._restore()
        yield
        if self._later:
            self._before = [count.clone() for count in self._counts]

    def finish(self, failed: bool = False) -> None:
        """Restores the counters after a forward that must not increment them."""
        for count, before in self._again:
            count.clamp_(min=before)
        # In a backward the forward is recomputed, and an exception may end it as soon as it has saved all tensors.
        if checkpointing.in_backward():
            restore = all(record.counted for record in self.records)
        else:
            restore = failed or self._later or not process_groups.syncing()
        if restore:
            self._restore()
        elif self.records:
            counted = bool(self._again) or any(
                bool(count != before) for count, before in zip(self._counts, self._before, strict=True)
            )
            for record in self.records:
                record.counted = record.counted or counted

    def _restore(self) -> None:
        for count, before in zip(self._counts, self._before, strict=True):
            count.copy_(before)


def _sync_inner_layer(layer: Any, calls: list[str | None], *args: Any, **kwargs: Any) -> Tensor:
    """``F.batch_norm``, synchronized if its running statistics are those of a synced layer inside ``layer``."""
    if not _argument(5, "training", args, kwargs):
        return F.batch_norm(*args, **kwargs)
    running_mean = _argument(1, "running_mean", args, kwargs)
    for inner in layer._sync_inner:
        if isinstance(inner, Synced) and _owns(inner, running_mean):  # it may have been reverted by itself
            group = inner.process_group
            name = inner.sync_name(process_groups.synced_group(group))
            calls.append(name)
            return functional.sync_batch_norm(
                *args, **kwargs, process_group=group, layer_name=name, window=window_of(inner)
            )
    if not checkpointing.in_backward():  # a recomputation may pass copies; its first run was noted
        calls.append(None)
    return F.batch_norm(*args, **kwargs)


class GroupNormOverrideMixin:
    """Mixed in before a class whose forward calls ``F.batch_norm``: runs group norm instead, in evaluation too."""

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

        with OverrideBatchNorm(self, norm):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the class after the mix-in has it
