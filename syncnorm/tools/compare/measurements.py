"""Measurements of an arm: the collectives and memory of a training step, and how much ranks' statistics differ.

Shapes: W = ranks, C = channels.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncnorm.comm.call import Call, observers
from syncnorm.monitor.divergence import rank_divergence, root_mean_square
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.records import CollectiveCount, LayerDivergence, PeakMemory

# Training steps over which the divergence between ranks is averaged.
DIVERGENCE_STEPS = 4

# Dispatcher operator -> the name to report, and which argument holds this rank's contribution.
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
# Modules in which norm layers issue their collectives: ours, and those of torch.nn.SyncBatchNorm.
_NORM_MODULES = ("syncnorm.comm", "torch.nn.modules._functions")
# Operators of the same namespaces that send nothing.
_LOCAL_OPERATORS = ("wait_tensor", "_wrap_tensor_autograd")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# proc(5): sets the peak to the current resident memory.
_RESET_PEAK = "5"


def median_step(step_seconds: Sequence[float]) -> float:
    """Median of the steps after warm-up, which is the first five steps, or the first third of a very short run."""
    warmup = min(5, len(step_seconds) // 3)
    return median(step_seconds[warmup:])


class CollectiveRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the collectives that this rank issues inside the block, and the bytes that it passes in.

    Every collective of ``torch.distributed`` goes through torch's dispatcher as an operator of the ``c10d`` (or
    ``_c10d_functional``) namespace. This includes DDP's reducer and buffer broadcast, which call them from C++ and
    would bypass patched Python functions. Unlike the events of a profiler, the operators come with their tensors,
    whose dtypes give the bytes.

    Each operator counts once, with the size of the tensors that this rank contributes: the input of an all_gather,
    the whole tensor of an all_reduce or broadcast. The traffic of the backend is not counted. The origin of a
    collective is ``"norm"`` if a frame of a norm layer's code is on the Python stack that issued it, in the forward
    or in the backward of an autograd function, else ``"ddp"``.

    An exchange of frames counts as one collective, ``"exchange"``, with the numbers that this rank sends, whether it
    goes through shared memory, over gloo or both.

    Collective: none.

    Example:
        >>> with CollectiveRecorder() as recorder:
        ...     _ = torch.ones(2) + 1
        >>> recorder.counts()
        ()
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> CollectiveRecorder:
        """Begins to count."""
        observers.append(self._count_exchange)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        observers.remove(self._count_exchange)

    def _count_exchange(self, call: Call, seconds: float) -> None:
        self._calls["exchange", "norm"] += 1
        self._bytes["exchange", "norm"] += call.payload_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records ``func`` if it is a collective, then runs it."""
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in _LOCAL_OPERATORS:
            # An operator that is not in the table is still reported, under torch's name and with zero bytes.
            op, payload = _PAYLOAD.get(f"{func.namespace}.{func._opname}", (func._opname, None))
            origin = _origin()
            if origin != "exchange":
                self._calls[op, origin] += 1
                self._bytes[op, origin] += 0 if payload is None else _num_bytes(args[payload])
        return func(*args, **(kwargs or {}))

    def counts(self) -> tuple[CollectiveCount, ...]:
        """The counts so far, sorted by origin and operator."""
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
        if module.startswith("syncnorm.comm.transports"):
            return "exchange"  # a part of one
        if module.startswith(_NORM_MODULES):
            return "norm"
    return "ddp"


class StepTimes(NamedTuple):
    """Duration of a training step in seconds, and the ``time.perf_counter()`` at which its backward ended."""

    seconds: float
    backward_done: float


def watch_memory(device: torch.device) -> Callable[[], PeakMemory | None]:
    """Starts to measure the memory of this process; the function that is returned gives the peak since then.

    On a GPU this is the memory allocated by torch. Elsewhere it is the growth of resident memory, which can be
    measured from a given moment only on Linux; ``None`` on other systems.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: PeakMemory(torch.cuda.max_memory_allocated(device), "cuda allocated")
    with suppress(OSError, AttributeError, TypeError):  # a C library other than GNU's; Windows
        # Memory freed by an earlier arm stays resident, and would hide the growth.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _kib("VmRSS")
    except OSError:
        return lambda: None
    return lambda: PeakMemory(max(0, _kib("VmHWM") - before) * 1024, "rss growth")


def _kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class _Moments(NamedTuple):
    mean_C: Tensor
    var_C: Tensor
    num_values: int


def measure_divergence(
    model: nn.Module, layers: Sequence[str], step: Callable[[], Any], ranks: Ranks
) -> tuple[LayerDivergence, ...]:
    """Compares the inputs of the norm layers of ``model`` between ranks in a few training steps, which change it.

    Collective: all ranks; those of the steps, and one object gather.
    """
    moments: dict[str, list[_Moments]] = {name: [] for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: moments[name].append(_moments(args[0].detach()))
        )
        for name in layers
    ]
    try:
        for _ in range(DIVERGENCE_STEPS):
            step()
    finally:
        for hook in hooks:
            hook.remove()
    by_rank = ranks.collect(moments)
    return tuple(_layer_divergence(name, [rank[name] for rank in by_rank]) for name in layers)


def _moments(x: Tensor) -> _Moments:
    dims = [d for d in range(x.dim()) if d != 1]
    var_C, mean_C = torch.var_mean(x.double(), dims, correction=0)
    return _Moments(mean_C.cpu(), var_C.cpu(), x.numel() // max(1, x.shape[1]))


def _layer_divergence(name: str, by_rank: list[list[_Moments]]) -> LayerDivergence:
    by_call = [
        rank_divergence(
            torch.stack([m.mean_C for m in call]),
            torch.stack([m.var_C for m in call]),
            torch.tensor([m.num_values for m in call]),
        )
        for call in zip(*by_rank, strict=True)
    ]
    means, variances = [s.mean for s in by_call], [s.var for s in by_call]
    return LayerDivergence(name, root_mean_square(means), root_mean_square(variances))
