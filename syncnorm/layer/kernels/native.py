"""The passes in C (``syncnorm/native/passes.c``), by one thread: fp32 and bf16 on the CPU.

They need memory that C can read and write: ``kernels.passes_for`` has checked all tensors but the vectors of the
parameters. Results differ from those of ``cpu`` by rounding; statistics are closer to fp64.
"""

from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from syncnorm.layer import moments
from syncnorm.layer.kernels import cpu
from syncnorm.layer.moments import Count, Running
from syncnorm.native import instruction_set, library

_CPU = torch.device("cpu")
_PLAIN = Tensor, torch.nn.Parameter
_BLENDED = torch.float32, torch.float64
_EXTENTS = c_int64, c_int64, c_int64  # A, C, B of passes.c


def _function(name: str, *arguments: Any) -> Callable[..., None]:
    """A function of the library; without a library it is not called."""
    if library is None:
        return lambda *_: None
    function: Any = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return function  # type: ignore[no-any-return]  # ctypes is untyped


def _pass(name: str, *arguments: Any) -> Callable[..., None]:
    return _function(f"{name}_{instruction_set}", *arguments)


_moments = _pass("moments", c_void_p, c_int, *_EXTENTS, c_double, c_void_p, c_void_p)
_normalize = _pass("normalize", c_void_p, c_void_p, c_int, *_EXTENTS, *(c_void_p,) * 4)
_reduce = _pass("reduce", c_void_p, c_void_p, c_int, *_EXTENTS, *(c_void_p,) * 3)
_finish = _pass("finish", *(c_void_p,) * 3, c_int, *_EXTENTS, *(c_void_p,) * 5, c_double)
_merge = _function("merge", c_void_p, c_int64, c_void_p, c_int64, c_int64, c_double, *(c_void_p,) * 4)
_sum_rows = _function("sum_rows", c_void_p, c_int64, c_int64, c_int64, c_void_p)


def supports(*tensors: Tensor | None) -> bool:
    """Whether C can read and write these tensors: no subclasses, wrappers or lazy negations, and not under a mode."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for t in tensors:  # noqa: SIM110  # a generator takes longer than its tests
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.is_neg()):
            return False
    return True


def local_moments(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C) in fp32, of one rank's values: two passes' accuracy, nearly all of x read once."""
    mean, invstd = torch.empty((2, x.size(1)), dtype=torch.float32, device=_CPU).unbind(0)
    moments_into(mean.data_ptr(), invstd.data_ptr(), x, eps)
    return mean, invstd


def moments_into(mean: int, invstd: int, x: Tensor, eps: float) -> None:
    """:func:`local_moments` with results at addresses."""
    _moments(x.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), eps, mean, invstd)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in one pass."""
    weight, bias = _vector(weight), _vector(bias)
    _normalize(
        x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean.data_ptr(), invstd.data_ptr(),
        None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr(),
    )  # fmt: skip
    return y


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, each (C) in fp32, in one pass."""
    sum_dy, sum_dy_xmu = torch.empty((2, mean.size(0)), dtype=torch.float32, device=_CPU).unbind(0)
    reduce_into(sum_dy.data_ptr(), sum_dy_xmu.data_ptr(), dy, x, mean)
    return sum_dy, sum_dy_xmu


def reduce_into(sum_dy: int, sum_dy_xmu: int, dy: Tensor, x: Tensor, mean: Tensor) -> None:
    """:func:`reduce_grad` with results at addresses."""
    _reduce(dy.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean.data_ptr(), sum_dy, sum_dy_xmu)


def begin_grad(dy: Tensor, invstd: Tensor, weight: Tensor | None) -> Tensor:
    """``dy``: there is one pass, at the end."""
    return dy


def finish_grad(
    begun: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Count,
) -> Tensor:
    """``weight * invstd * (dy - sum_dy / N - (x - mean) * invstd^2 * sum_dy_xmu / N)`` in one pass."""
    weight = _vector(weight)
    dx = torch.empty_like(x)
    _finish(
        begun.data_ptr(), x.data_ptr(), dx.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean.data_ptr(),
        invstd.data_ptr(), None if weight is None else weight.data_ptr(), sum_dy.data_ptr(),
        sum_dy_xmu.data_ptr(), max(float(count), 1.0),
    )  # fmt: skip
    return dx


class _RunningStatistics(Structure):
    """``running_statistics`` of merge.c."""

    _fields_ = (
        ("mean", c_void_p),
        ("var", c_void_p),
        ("wide_mean", c_int64),
        ("wide_var", c_int64),
        ("tracked", c_void_p),
        ("momentum", c_double),
    )


def merge(
    moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Count]:
    """``cpu.merge`` in one call.

    Mean, invstd and variance have the bits of ``cpu.merge``, on every CPU, but for sums of more than two ranks, whose
    order may differ: they differ by a unit in the last place. So do running statistics, which are rounded once.
    """
    if isinstance(counts, Tensor) or moments_W2C.dtype != torch.float32:
        return cpu.merge(moments_W2C, counts, eps, running)
    mean, invstd, var = torch.empty((3, moments_W2C.size(1) // 2), dtype=torch.float32, device=_CPU).unbind(0)
    tracked = running if running is not None and can_track(running) else None
    merge_into((mean, invstd, var), moments_W2C, counts, eps, tracked)
    if running is not tracked and running is not None:
        moments.update_running_(running, mean, var, sum(counts))
    return mean, invstd, var, sum(counts)


def merge_into(
    results: tuple[Tensor, Tensor, Tensor | None],
    moments_W2C: Tensor,
    counts: Sequence[int],
    eps: float,
    running: Running | None,
) -> None:
    """:func:`merge` into mean, invstd and, unless it is None, var; for running statistics that C can write to."""
    mean, invstd, var = results
    ranks, channels = len(counts), mean.size(0)
    known = None if running is None else byref(_running_statistics(running))
    _merge(
        moments_W2C.data_ptr(), moments_W2C.stride(0), (c_int64 * ranks)(*counts), ranks, channels, eps,
        mean.data_ptr(), invstd.data_ptr(), None if var is None else var.data_ptr(),
        known,
    )  # fmt: skip
    if running is not None:
        # Autograd then knows, as after any change in place, that these are not the values it may have saved.
        torch.autograd.graph.increment_version([v for v in running[:3] if v is not None])


def _running_statistics(running: Running) -> _RunningStatistics:
    mean, var, tracked, momentum = running
    return _RunningStatistics(
        mean.data_ptr(),
        var.data_ptr(),
        mean.dtype == torch.float64,
        var.dtype == torch.float64,
        None if tracked is None else tracked.data_ptr(),
        -1.0 if momentum is None else momentum,
    )


def can_track(running: Running) -> bool:
    """Whether C can write to the running statistics."""
    mean, var, tracked, momentum = running
    if momentum is not None and momentum < 0:
        return False
    if tracked is not None and (tracked.dtype != torch.int64 or tracked.is_inference()):
        return False
    for v in (mean, var):
        if v.dtype not in _BLENDED or not v.is_contiguous() or v.is_inference():
            return False
    return supports(mean, var, tracked)


def sum_rows_into(sums: int, rows_Wn: Tensor) -> None:
    """The sum of the rows, in rank order, at an address."""
    _sum_rows(rows_Wn.data_ptr(), rows_Wn.stride(0), rows_Wn.size(0), rows_Wn.size(1), sums)


def _extents(x: Tensor) -> tuple[int, int, int]:
    """(A, C, B) of passes.c for a dense x."""
    values, channels = x.numel(), x.size(1)
    if channels == 1:
        return 1, 1, values
    if x.stride(1) == 1:  # the channel is the fastest axis
        return values // channels, channels, 1
    samples = x.size(0)
    return samples, channels, values // (samples * channels)


def _vector(vector: Tensor | None) -> Tensor | None:
    """In fp32 at consecutive addresses."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.detach().to(torch.float32).contiguous()
