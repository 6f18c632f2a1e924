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
_parameter_gradients = _function("parameter_gradients", c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
_sum_rows = _function("sum_rows", c_void_p, c_int64, c_int64, c_int64, c_void_p)


def supports(*tensors: Tensor | None) -> bool:
    """Whether C can read and write these tensors: no subclasses, wrappers or lazy negations, and not under a mode."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for t in tensors:  # a generator takes longer than its tests
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.is_neg() or t._is_zerotensor()):
            return False
    return True


def local_moments(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C) in fp32, of one rank's values: two passes' accuracy, nearly all of x read once."""
    mean, invstd = _vectors(2, x.size(1))
    moments_at(mean.data_ptr(), invstd.data_ptr(), x, eps)
    return mean, invstd


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in one pass."""
    normalize_at(mean.data_ptr(), invstd.data_ptr(), x, weight, bias, y)
    return y


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy)`` and ``sum(dy * (x - mean))``, each (C) in fp32, in one pass."""
    sum_dy, sum_dy_xmu = _vectors(2, x.size(1))
    reduce_at(sum_dy.data_ptr(), sum_dy_xmu.data_ptr(), dy, x, mean.data_ptr())
    return sum_dy, sum_dy_xmu


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
    sum_dy, sum_dy_xmu = sum_dy.contiguous(), sum_dy_xmu.contiguous()
    sums = sum_dy.data_ptr(), sum_dy_xmu.data_ptr()
    return finish_at(mean.data_ptr(), invstd.data_ptr(), begun, x, weight, *sums, count)


def merge(
    moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Count]:
    """``cpu.merge`` in one call.

    Mean, invstd and variance have the bits of ``cpu.merge``, on every CPU, but for sums of more than two ranks, whose
    order may differ: they differ by a unit in the last place. So do running statistics, which are rounded once.
    """
    if isinstance(counts, Tensor) or moments_W2C.dtype != torch.float32:
        return cpu.merge(moments_W2C, counts, eps, running)
    mean, invstd, var = _vectors(3, moments_W2C.size(1) // 2)
    tracked = running if running is not None and can_track(running) else None
    merge_at(mean.data_ptr(), invstd.data_ptr(), var.data_ptr(), moments_W2C, counts, eps, tracked)
    if running is not None and tracked is None:
        moments.update_running_(running, mean, var, sum(counts))
    return mean, invstd, var, sum(counts)


# The same with vectors (C) in fp32 that are given by their addresses: tensors for them would take longer to make than
# a pass over some ten thousand values takes.


def moments_at(mean: int, invstd: int, x: Tensor, eps: float) -> None:
    """:func:`local_moments`."""
    _moments(x.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), eps, mean, invstd)


def normalize_at(mean: int, invstd: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """:func:`normalize`."""
    weight, bias = _vector(weight), _vector(bias)
    _normalize(
        x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean, invstd,
        None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr(),
    )  # fmt: skip


def reduce_at(sum_dy: int, sum_dy_xmu: int, dy: Tensor, x: Tensor, mean: int) -> None:
    """:func:`reduce_grad`."""
    _reduce(dy.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean, sum_dy, sum_dy_xmu)


def finish_at(
    mean: int, invstd: int, dy: Tensor, x: Tensor, weight: Tensor | None, sum_dy: int, sum_dy_xmu: int, count: Count
) -> Tensor:
    """:func:`finish_grad`."""
    weight = _vector(weight)
    dx = torch.empty_like(x)
    _finish(
        dy.data_ptr(), x.data_ptr(), dx.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean, invstd,
        None if weight is None else weight.data_ptr(), sum_dy, sum_dy_xmu, max(float(count), 1.0),
    )  # fmt: skip
    return dx


def merge_at(
    mean: int,
    invstd: int,
    var: int | None,
    moments_W2C: Tensor,
    counts: Sequence[int],
    eps: float,
    running: Running | None,
) -> None:
    """:func:`merge`, for running statistics that :func:`can_track`."""
    ranks = len(counts)
    known = None if running is None else byref(_running_statistics(running))
    _merge(
        moments_W2C.data_ptr(), moments_W2C.stride(0), (c_int64 * ranks)(*counts), ranks, moments_W2C.size(1) // 2,
        eps, mean, invstd, var, known,
    )  # fmt: skip
    if running is not None and any(counts):
        # Autograd then knows, as after any change in place, that these are not the values it may have saved.
        torch.autograd.graph.increment_version([v for v in running[:3] if v is not None and not v.is_inference()])


def parameter_gradients(sums: int, invstd: int, channels: int) -> tuple[Tensor, Tensor]:
    """Of weight and bias, each (C), from this rank's ``sum_dy`` and ``sum_dy_xmu``, (2, C) at an address."""
    d_bias, d_weight = _vectors(2, channels)
    _parameter_gradients(sums, invstd, channels, d_bias.data_ptr(), d_weight.data_ptr())
    return d_weight, d_bias


def sum_rows_at(sums: int, rows_Wn: Tensor) -> None:
    """The sum of the rows in rank order."""
    _sum_rows(rows_Wn.data_ptr(), rows_Wn.stride(0), rows_Wn.size(0), rows_Wn.size(1), sums)


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
    if tracked is not None and tracked.dtype != torch.int64:
        return False
    for v in (mean, var):
        if v.dtype not in _BLENDED or not v.is_contiguous():
            return False
    return supports(mean, var, tracked)


def _vectors(number: int, channels: int) -> tuple[Tensor, ...]:
    """New vectors, whatever the defaults for dtype and device are."""
    return tuple([torch.empty(channels, dtype=torch.float32, device=_CPU) for _ in range(number)])


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
