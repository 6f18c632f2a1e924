"""How Triton's kernels are launched, and on which devices they can be.

``kernel[grid](*args)`` takes the host some 20 us before it reaches the GPU's driver: at each launch Triton finds anew
which compiled form of the kernel fits the arguments. :func:`launch` keeps these forms by a key that is cheap to
compute, and makes the device of the tensors the current one, as torch's operators do.

Triton compiles at the first launch, which needs a C compiler and a GPU that it supports. Where that fails, the
process goes on with torch's own kernels (:func:`unavailable` says why), and warns once.
"""

import functools
import importlib.util
import os
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncnorm.errors import SyncNormError

# Under its interpreter Triton runs kernels on the CPU, for tests; it is selected before Triton is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICE_TYPES = {"cuda", "cpu"} if _INTERPRETED else {"cuda"}
_OLDEST_VERSION = (3, 5)  # of torch 2.9; the kernels have not been run with older ones
# Their rules of what a compiled form depends on are known to be those of _key_function, and so is how to launch one.
_KNOWN_VERSIONS = {(3, 5), (3, 6), (3, 7), (3, 8)}

_failures: dict[int, str] = {}  # device -> what went wrong at a first launch
_forms: dict[tuple[int, tuple[type, ...]], "_Forms"] = {}  # id of the kernel, types of the arguments


class TritonFailed(SyncNormError):
    """Triton could not compile or launch a kernel. The process does not use its kernels on this device any more."""


def launch(kernel: Any, grid: tuple[int, int], *args: Any) -> None:
    """Runs ``kernel[grid](*args)`` on the device of the first tensor, on its current stream.

    Args:
        kernel: a function under ``triton.jit``.
        grid: number of programs along x and y.
        args: one for each parameter, in its order: tensors, numbers, bools and None.

    Raises:
        TritonFailed: Triton could not compile or launch the kernel for arguments of a new kind. Nothing has been
            launched, and from now on :func:`passes_available` is False for the device.
    """
    if _INTERPRETED:
        kernel[grid](*args)
        return
    types = tuple(map(type, args))
    forms = _forms.get((id(kernel), types))
    if forms is None:
        forms = _forms[id(kernel), types] = _Forms(kernel, types)
    device = args[forms.first_tensor].get_device()
    try:
        driver = forms.driver.active  # made when it is used first
    except Exception as error:
        raise _failed(device, error) from error
    current = driver.get_current_device()
    if device != current and device >= 0:
        with torch.cuda.device(device):
            launch(kernel, grid, *args)
        return
    key = forms.key and forms.key(*args)
    known = forms.on_device[current]
    form = known.get(key)
    if form is not None and not (forms.knobs.launch_enter_hook.calls or forms.knobs.launch_exit_hook.calls):
        run, function, metadata = form
        run(*grid, 1, driver.get_current_stream(current), function, metadata, None, None, None, *args)
        return
    try:
        compiled = kernel[grid](*args)  # which also calls these hooks, of profilers
    except Exception as error:
        if form is not None:
            raise  # it was launched before: an error of the GPU or of a hook
        raise _failed(device, error) from error
    if key is not None:
        known[key] = _Form(compiled.run, compiled.function, compiled.packed_metadata)


def passes_available(device: torch.device) -> bool:
    """Whether Triton's kernels are used for tensors on ``device``."""
    return unavailable(device) is None


def unavailable(device: torch.device) -> str | None:
    """Why Triton's kernels are not used on ``device``; None if they are, as far as is known before a first launch."""
    if device.type not in _DEVICE_TYPES:
        return f"they do not run on devices of type {device.type}"
    return _unusable() or _failures.get(-1 if device.index is None else device.index)


def _unusable() -> str | None:
    """Why Triton's kernels are used on no device."""
    if os.environ.get("SYNCNORM_TRITON") == "0":
        return "SYNCNORM_TRITON is 0"
    if not _installed():
        return "Triton is not installed"
    if _version() < _OLDEST_VERSION:
        return f"Triton {_text(_version())} is older than {_text(_OLDEST_VERSION)}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _version() -> tuple[int, ...]:
    """Major and minor version of Triton."""
    import triton  # not at the top: it imports a compiler

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


class _Form(NamedTuple):
    """A kernel that was compiled for arguments of one kind and loaded on one device."""

    run: Callable[..., object]
    function: object
    metadata: object


class _Forms:
    """Those of one kernel for arguments of one tuple of types, by device and then by :func:`_key_function`."""

    def __init__(self, kernel: Any, types: tuple[type, ...]):
        import triton  # not at the top: it imports a compiler

        self.kernel = kernel
        self.driver = triton.runtime.driver
        self.knobs = triton.knobs.runtime
        self.first_tensor = next(i for i, each in enumerate(types) if issubclass(each, Tensor))
        self.key = _key_function(kernel, types)
        self.on_device: defaultdict[int, dict[object, _Form]] = defaultdict(dict)


def _key_function(kernel: Any, types: tuple[type, ...]) -> Callable[..., object] | None:
    """A function of the arguments that is equal only for those that Triton compiles alike.

    Triton compiles anew for other dtypes of pointers, for pointers that are divisible by 16 and others, for integers
    that need 64 bits, for the integer 1 and for those divisible by 16 (not if ``do_not_specialize`` names them), and
    for each value of a constexpr. None if this is not certain for the version of Triton.

    Source: python/triton/runtime/jit.py and python/src/specialize.cc of Triton.
    """
    if not _known() or len(types) != len(kernel.params):
        return None
    names, parts, pointers = [f"a{i}" for i in range(len(types))], [], []
    for name, each, parameter in zip(names, types, kernel.params, strict=True):
        if parameter.is_constexpr:
            parts.append(name)
        elif issubclass(each, Tensor):
            parts.append(f"{name}.dtype")
            pointers.append(f"{name}.data_ptr()")
        elif each is int and parameter.do_not_specialize:
            parts.append(f"{name} >> 31")
        elif each is int:
            # Bits 0 to 3 say whether 16 divides it, those from 31 on whether it needs 64 bits; 1 is a case apart.
            parts.append(f"1 if {name} == 1 else {name} & ~0x7FFFFFF0 | 16")
        elif each not in (float, bool, NoneType):  # of these the type says all
            return None
    aligned = f"({' | '.join(pointers)}) % 16 and ({', '.join(f'{pointer} % 16' for pointer in pointers)},)"
    # Written out, because a loop over the arguments takes twice as long.
    return eval(f"lambda {', '.join(names)}: ({', '.join([*parts, aligned])})")  # type: ignore[no-any-return]


def _known() -> bool:
    """Whether :func:`_key_function` knows this version of Triton, and the rules of its GPUs (AMD's have more)."""
    return torch.version.hip is None and _version() in _KNOWN_VERSIONS


def _failed(device: int, error: Exception) -> TritonFailed:
    """Records that Triton does not work on a device, and warns if it is the first one of the process."""
    where = "the current device" if device < 0 else f"cuda:{device}"
    what = f"{type(error).__name__}: {error}"
    text = f"Triton could not compile or launch a kernel of a synced layer on {where}: {what}"
    if not _failures:
        warnings.warn(
            f"{text}\nThis process goes on with torch's own CUDA kernels there: results are the same up to rounding, "
            "and a step launches more kernels. Triton needs a C compiler (gcc or clang on the PATH, or the one that "
            "CC names) with Python's headers, and a GPU and a driver that it supports. `syncnorm env` tries again, "
            "and SYNCNORM_TRITON=0 does without Triton.",
            stacklevel=2,
        )
    _failures[device] = textwrap.shorten(what, 300)
    return TritonFailed(f"{text}. With SYNCNORM_TRITON=0 in the environment layers do without Triton")
