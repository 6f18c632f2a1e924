"""A device whose memory is counted, simulated on a CPU: what offloading keeps on it, and what it moves away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from syncnorm.training import offload


class SimulatedDevice(TorchDispatchMode):
    """Counts the bytes of tensors that are made in the mode and still in use. What a kernel needs itself is not seen.

    Attributes:
        peak: the largest number of bytes so far, or since :meth:`begin_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # By storage. A reference of Python's would not do: before torch 2.10 other weak references keep it valid.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def used(self) -> int:
        """Bytes of tensors on the device at present."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self._made.values())

    def begin_peak(self) -> None:
        """The peak is that of what follows."""
        self.peak = self.used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata in self._made or storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.used)
        return result


def _storages(tree: Any) -> list[UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """In the context all tensors are on the device, except the copies that offloading makes in host memory."""

    def is_on_host(tensor: Tensor) -> bool:  # a Mock would keep what it was called with
        return False

    def to_host(tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            return tensor.detach().clone()

    with (
        mock.patch.object(offload, "_is_on_host", is_on_host),
        mock.patch.object(offload, "_to_host", to_host),
        SimulatedDevice() as device,
    ):
        yield device
