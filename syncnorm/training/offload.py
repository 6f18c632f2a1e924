"""Keeps what a backward needs in host memory until then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _OnHost(NamedTuple):
    copy: Tensor
    device: torch.device


class _InPlace(NamedTuple):
    """A tensor that stays where it is: detached, or an operation that saves its output would keep itself alive."""

    detached: Tensor
    version: int

    def unchanged(self) -> Tensor:
        """The tensor. Autograd itself does not see changes of tensors that have passed a hook."""
        if self.detached._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.detached.shape)} that is needed for gradient computation has been "
                f"modified by an inplace operation: it is at version {self.detached._version}, expected version "
                f"{self.version}. Run the backward before the optimizer's step, or compute the forward again after it"
            )
        return self.detached


class OffloadedTensors:
    """Hooks of saved tensors that move them from their device to host memory, and back when the backward needs them.

    Unlike ``torch.autograd.graph.save_on_cpu`` it leaves parameters and buffers where they are, and copies a tensor
    that several operations save once. Copies use pinned memory and the stream of the computation, so the host waits
    for none.

    Args:
        stays: tensors that stay on their device.
    """

    def __init__(self, stays: Iterable[Tensor]):
        self._stays = {tensor.untyped_storage()._cdata for tensor in stays}
        # By storage and view: a weak reference keeps the address from being used again, and the copy.
        self._copies: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """A context in whose thread tensors are moved."""
        return saved_tensors_hooks(self._pack, _unpack)

    def forget(self) -> None:
        """Drops the table of copies; the graph keeps those that it needs."""
        self._copies.clear()

    def _pack(self, tensor: Tensor) -> _InPlace | _OnHost:
        if _is_on_host(tensor) or tensor.layout != torch.strided:
            return _InPlace(tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        if storage._cdata in self._stays:
            return _InPlace(tensor.detach(), tensor._version)
        key = (
            storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(),
            tensor.is_neg(), tensor._version,
        )  # fmt: skip
        reference, copy = self._copies.get(key, (None, None))
        if reference is None or reference.expired() or copy is None:  # type: ignore[no-untyped-call]  # torch leaves it untyped
            copy = _to_host(tensor)
            self._copies[key] = StorageWeakRef(storage), copy  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _OnHost(copy, tensor.device)


def _unpack(packed: _InPlace | _OnHost) -> Tensor:
    if isinstance(packed, _InPlace):
        return packed.unchanged()
    return packed.copy.to(packed.device, non_blocking=True, copy=True)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _to_host(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
