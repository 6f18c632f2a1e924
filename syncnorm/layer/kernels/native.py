"""The passes in C (``syncnorm/native/passes.c``), by one thread: fp32 and bf16 on the CPU.

They need memory that C can read and write: ``kernels.passes_for`` has checked all tensors but the vectors of the
parameters. Results differ from those of ``cpu`` by rounding; statistics are closer to fp64.
"""

from collections.abc import Callable, Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from syncnorm.layer import moments
from syncnorm.layer.kernels import cpu
from syncnorm.layer.moments import Count, Running
from syncnorm.native import instruction_set, library

_CPU = torch.device("cpu")
_PLAIN = Tensor, torch.nn.Parameter
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
_merge = _function("merge", c_void_p, c_void_p, c_int64, c_int64, c_double, *(c_void_p,) * 3)
_update_running = _function(
    "update_running", c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_double, c_double
)


def supports(*tensors: Tensor | None) -> bool:
    """Whether C can read and write these tensors: no subclasses, wrappers or lazy negations, and not under a mode."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for t in tensors:  # noqa: SIM110  # all() is slower, and this runs several times a step
        if t is not None and not (type(t) in _PLAIN and t.is_cpu and not t.is_neg()):
            return False
    return True


def local_moments(x: Tensor, eps: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd, each (C) in fp32, of one rank's values: two passes' accuracy, nearly all of x read once."""
    samples, channels, places = _extents(x)
    mean = torch.empty(channels, dtype=torch.float32, device=_CPU)  # whatever the defaults are
    invstd = torch.empty_like(mean)
    _moments(
        x.data_ptr(), x.dtype == torch.bfloat16, samples, channels, places, eps, mean.data_ptr(), invstd.data_ptr()
    )
    return mean, invstd


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
    samples, channels, places = _extents(x)
    sum_dy = torch.empty_like(mean)
    sum_dy_xmu = torch.empty_like(mean)
    _reduce(
        dy.data_ptr(), x.data_ptr(), x.dtype == torch.bfloat16, samples, channels, places, mean.data_ptr(),
        sum_dy.data_ptr(), sum_dy_xmu.data_ptr(),
    )  # fmt: skip
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
    weight = _vector(weight)
    dx = torch.empty_like(x)
    _finish(
        begun.data_ptr(), x.data_ptr(), dx.data_ptr(), x.dtype == torch.bfloat16, *_extents(x), mean.data_ptr(),
        invstd.data_ptr(), None if weight is None else weight.data_ptr(), sum_dy.data_ptr(),
        sum_dy_xmu.data_ptr(), max(float(count), 1.0),
    )  # fmt: skip
    return dx


def merge(
    moments_W2C: Tensor, counts: Sequence[int] | Tensor, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor, Count]:
    """``cpu.merge`` in one call, and one for the running statistics.

    Mean, invstd and variance have the bits of ``cpu.merge``, on every CPU, but for sums of more than two ranks, whose
    order may differ: they differ by a unit in the last place. So do running statistics, which are rounded once.
    """
    if isinstance(counts, Tensor) or moments_W2C.dtype != torch.float32:
        return cpu.merge(moments_W2C, counts, eps, running)
    ranks, channels = len(counts), moments_W2C.size(1) // 2
    moments_W2C = moments_W2C.contiguous()
    mean = torch.empty(channels, dtype=torch.float32, device=_CPU)
    invstd = torch.empty_like(mean)
    var = torch.empty_like(mean)
    _merge(
        moments_W2C.data_ptr(), (c_int64 * ranks)(*counts), ranks, channels, eps,
        mean.data_ptr(), invstd.data_ptr(), var.data_ptr(),
    )  # fmt: skip
    count = sum(counts)
    if running is not None:
        update_running_(running, mean, var, count)
    return mean, invstd, var, count


def update_running_(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """``moments.update_running_``, in C if it can write to the running statistics."""
    running_mean, running_var, num_batches_tracked, factor = running
    dtype = running_mean.dtype
    if not (
        (dtype == torch.float32 or dtype == torch.float64)
        and dtype == running_var.dtype
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and supports(running_mean, running_var, num_batches_tracked)
    ):
        moments.update_running_(running, mean, var, count)
        return
    if count == 0:
        return
    changed = [running_mean, running_var]
    if num_batches_tracked is not None:
        batches = c_int64.from_address(num_batches_tracked.data_ptr())
        batches.value += 1
        changed.append(num_batches_tracked)
        factor = 1 / max(batches.value, 1) if factor is None else factor
    assert factor is not None  # functional checks it
    _update_running(
        running_mean.data_ptr(), running_var.data_ptr(), dtype == torch.float64, mean.data_ptr(), var.data_ptr(),
        mean.size(0), count / max(count - 1, 1), factor,
    )  # fmt: skip
    # Autograd then knows, as after any change in place, that these are not the values it may have saved.
    torch.autograd.graph.increment_version(changed)


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
