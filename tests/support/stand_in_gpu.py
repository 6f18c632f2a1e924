"""A GPU for Triton that compiles kernels and records launches, on a machine without one.

Host code that launches kernels runs as it is, on tensors of the ``meta`` device, which have shapes and no data. Each
kernel is compiled for the GPU named, down to its machine code, and its launch is kept instead of being made::

    with stand_in_gpu(sm=90) as gpu:
        normalize(torch.empty(8, 64, 56, 56, device="meta"), ...)
    (launch,) = gpu.launches
    assert not spills(launch.kernel)
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncnorm.layer import device_step
from syncnorm.layer.kernels import launch

# Triton keeps compiled kernels by device: devices of their own for each stand-in, which no GPU has.
_devices = itertools.count(100, 2)
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ACCESS = re.compile(r"\b(ld|st)\.(?:\w+(?:::\w+)*\.)*?global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[busf](\d+)\b")


class OnDevice(torch.Tensor):
    """A tensor without data that says which device it is on, and where in memory; made by :func:`on_device`."""

    index: int
    address: int

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.address


def on_device(index: int, *shape: int, dtype: torch.dtype = torch.float32, address: int = 0) -> OnDevice:
    """A tensor of device ``index`` at ``address``, for a stand-in GPU."""
    tensor = torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnDevice)
    tensor.index, tensor.address = index, address
    return tensor


class Launch(NamedTuple):
    """A launch that was recorded.

    Attributes:
        name: of the kernel's function.
        grid: number of programs along x, y and z.
        kernel: what Triton compiled; ``kernel.asm`` has its forms by name, among them "ptx" and "cubin".
        device: current when it was launched.
        stream: on which it was launched.
        args: of the kernel's function, in its order.
    """

    name: str
    grid: tuple[int, int, int]
    kernel: Any
    device: int
    stream: int
    args: tuple[Any, ...]


class Resources(NamedTuple):
    """What a kernel takes: registers and bytes of local memory per thread, bytes of shared memory per block."""

    registers: int
    stack: int
    shared: int
    local: int


class StandInGpu:
    """The part of Triton's driver that compiling and launching need.

    Attributes:
        device: the current device at first; ``other`` is a second one of the same kind.
        launches: those recorded, oldest first.
        loaded: the devices on which compiled kernels were loaded, in turn.
        selected: the devices that were made current, in turn, by ``torch.cuda.device`` and others.
        load_error: raised instead of loading a kernel, if set, as the driver of a GPU does; launch_error likewise.
    """

    def __init__(self, sm: int):
        self.target = GPUTarget("cuda", sm, 32)
        self.device = next(_devices)
        self.other = self.device + 1
        self.current = self.device
        self.launches: list[Launch] = []
        self.loaded: list[int] = []
        self.selected: list[int] = []
        self.load_error: Exception | None = None
        self.launch_error: Exception | None = None
        self.utils = self  # Triton's drivers have these functions in an object of their own

    def select(self, device: int) -> int:
        """Makes ``device`` current and returns the one that was; a negative one changes nothing."""
        before = self.current
        if device >= 0 and device != before:
            self.selected.append(device)
            self.current = device
        return before

    def names(self) -> list[str]:
        """The names of the kernels that were launched, in turn."""
        return [launch.name for launch in self.launches]

    # What Triton calls:

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int | None = None) -> int:
        return 1000 + (self.current if device is None else device)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads in a block: the last is what Triton checks."""
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append(device)
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """The function that launches what ``src`` was compiled to."""
        name, compiled_on = src.fn.fn.__name__, self.current

        def record(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            if self.launch_error is not None:
                raise self.launch_error
            if not (1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16):
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {x}, {y}, {z}")
            kernels = src.fn.device_caches[compiled_on][0].values()
            kernel = next(each for each in kernels if each.hash == metadata.hash)
            _, _, launch_metadata, enter_hook, exit_hook, *args = rest
            if enter_hook is not None:
                enter_hook(launch_metadata)
            self.launches.append(Launch(name, (x, y, z), kernel, self.current, stream, tuple(args)))
            if exit_hook is not None:
                exit_hook(launch_metadata)

        return record


@contextmanager
def stand_in_gpu(sm: int = 90) -> Iterator[StandInGpu]:
    """Triton compiles for a GPU of compute capability ``sm`` (90 is 9.0), and launches are recorded.

    Tensors of the ``meta`` device count as being on the current device, and the layer uses Triton's kernels for them.
    """
    gpu = StandInGpu(sm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", gpu)
        patch.setattr(launch, "_DEVICE_TYPES", {"cuda", "meta"})
        patch.setattr(launch, "_failures", {})
        device_step.works_on.cache_clear()
        # What `torch.cuda.device` calls, on entry and on exit.
        patch.setattr(torch.cuda, "_exchange_device", gpu.select)
        patch.setattr(torch.cuda, "_maybe_exchange_device", gpu.select)
        yield gpu
    device_step.works_on.cache_clear()


def resources(kernel: Any) -> Resources:
    """Of the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [_BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    return Resources(found["REG"], found["STACK"], found["SHARED"], found["LOCAL"])


def spills(kernel: Any) -> bool:
    """Whether values that should be in registers are in memory."""
    used = resources(kernel)
    return used.stack > 0 or used.local > 0


def access_bytes(kernel: Any, instruction: str = "ld") -> list[int]:
    """How many bytes each load ("ld") or store ("st") of global memory moves per thread, in the order of the PTX."""
    return [
        int(count or 1) * int(bits) // 8
        for kind, count, bits in _ACCESS.findall(kernel.asm["ptx"])
        if kind == instruction
    ]


def computes_in_fp64(kernel: Any) -> bool:
    """Whether the PTX has fp64 arithmetic; parameters may be fp64 and be converted."""
    return re.search(r"\b(add|sub|mul|fma|div|rcp|sqrt|max|min)\.(\w+\.)*f64\b", kernel.asm["ptx"]) is not None
