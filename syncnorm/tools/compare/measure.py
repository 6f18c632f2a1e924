"""Measuring: what a step sends, how long it takes, how much memory it needs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from syncnorm.tools.compare.evidence import CollectiveCount


def median_step(step_seconds: Sequence[float]) -> float:
    """Median of the steps after warm-up: the first five, or the first third of a very short run."""
    warmup = min(5, len(step_seconds) // 3)
    return median(step_seconds[warmup:])


# Dispatcher operator -> the name to report and which argument holds what this rank contributes.
_PAYLOAD = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.allreduce_coalesced_": ("all_reduce", 0),
    "c10d.allgather_": ("all_gather", 1),
    "c10d._allgather_base_": ("all_gather", 1),
    "c10d.allgather_coalesced_": ("all_gather", 1),
    "c10d.allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d.alltoall_base_": ("all_to_all", 1),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.reduce_scatter_": ("reduce_scatter", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.reduce_": ("reduce", 0),
    "c10d.gather_": ("gather", 1),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional.broadcast": ("broadcast", 0),
    "_c10d_functional.broadcast_": ("broadcast", 0),
}
# Where norm layers issue their collectives: ours have one file for it, torch's SyncBatchNorm another.
_NORM_MODULES = ("syncnorm.comm", "torch.nn.modules._functions")
# Bookkeeping in the same namespaces that sends nothing.
_SILENT = ("wait_tensor", "_wrap_tensor_autograd")


class CollectiveRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the collectives that this rank issues while the block runs, and the bytes it hands in.

    Every collective of ``torch.distributed`` passes torch's dispatcher as an operator of the ``c10d`` (or
    ``_c10d_functional``) namespace. That holds for DDP's reducer and buffer broadcast as well, which call
    them from C++ where patched Python functions would miss them; and unlike a profiler's events the
    operators arrive with their tensors, whose types give the bytes.

    Counted: each operator once, with the size of the tensors that this rank contributes: the input of an
    all_gather, the whole tensor of an all_reduce or broadcast. What the backend then puts on the wire is not.
    A collective belongs to ``"norm"`` when a frame of a norm layer's code is on the Python stack that issued
    it, in the forward or in an autograd function's backward, and to ``"ddp"`` otherwise.

    Collective: none of its own.

    Example:
        >>> with CollectiveRecorder() as recorder:
        ...     _ = torch.ones(2) + 1
        >>> recorder.counts()
        ()
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records ``func`` where it is a collective, then runs it."""
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in _SILENT:
            # An operator that the table does not know still shows up, under its own name and with no bytes.
            op, payload = _PAYLOAD.get(f"{func.namespace}.{func._opname}", (func._opname, None))
            key = (op, _origin())
            self._calls[key] += 1
            self._bytes[key] += 0 if payload is None else _num_bytes(args[payload])
        return func(*args, **(kwargs or {}))

    def counts(self) -> tuple[CollectiveCount, ...]:
        """What was seen so far, sorted by origin and operator."""
        return tuple(
            CollectiveCount(op, origin, calls, self._bytes[op, origin])
            for (op, origin), calls in sorted(self._calls.items(), key=lambda item: item[0][::-1])
        )


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(part) for part in value)


def _origin() -> str:
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]  # f_back is None at the bottom, which ends the loop
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_NORM_MODULES):
            return "norm"
    return "ddp"
