"""Describes the machine for a bug report: versions, hardware, backends and environment variables."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

import syncnorm
from syncnorm import native
from syncnorm.comm.transports import default_transport
from syncnorm.comm.transports.discovery import create_file
from syncnorm.layer import device_step
from syncnorm.layer.kernels import launch
from syncnorm.tools.common.provenance import cpu_count, cpu_name
from syncnorm.tools.common.records import Record

PACKAGES = ("accelerate", "triton", "numpy", "click", "rich", "matplotlib", "scikit-learn")
# Of variables that configure torch.distributed; and the variables of launchers that say which rank this is.
PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "SYNCNORM_", "MASTER_", "CUDA_", "TORCH_DISTRIBUTED_", "TORCHINDUCTOR_")
NAMES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_LOCALID", "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
)  # fmt: skip
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Environment(Record):
    """Versions, hardware, backends and variables; None for what does not exist.

    Attributes:
        packages: name -> version of the packages that syncnorm can use.
        build: library -> version of those that torch was built with.
        gpus: name, memory in GiB and compute capability of each.
        backends: those of torch.distributed that this build has.
        transport: how ranks on CPUs are to exchange frames, of ``SYNCNORM_TRANSPORT``.
        shared_memory: what kind of file ranks of this host can share.
        launcher: the launcher that started this process, according to its variables.
        variables: environment variables that affect distributed training, without secrets, and with ``~`` for the
            home directory.
        native: whether the layer's code in C is used, for which instruction set, or why not; empty in records of
            versions without it.
        gpu_passes: whether layers use Triton's kernels or torch's on each GPU, and why; empty in records of versions
            that did not try.
    """

    schema: ClassVar[str] = "syncnorm.env"
    schema_version: ClassVar[int] = 1

    syncnorm: str
    torch: str
    python: str
    system: str
    cpu: str
    cpu_count: int
    threads: int
    packages: dict[str, str | None]
    build: dict[str, str | None]
    gpus: list[str]
    backends: list[str]
    transport: str
    shared_memory: str | None
    launcher: str | None
    variables: dict[str, str]
    native: str = ""
    gpu_passes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Lines of ``name: value``, to paste into a bug report."""
        return "\n".join(f"{name}: {value}" for name, value in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "syncnorm", self.syncnorm
        yield "native code", self.native
        yield "torch", self.torch
        for name, version in self.build.items():
            yield f"  {name}", version or "no"
        yield "  backends", ", ".join(self.backends) or "none"
        yield "Python", self.python
        for name, version in self.packages.items():
            yield f"  {name}", version or "not installed"
        yield "system", self.system
        yield "CPU", f"{self.cpu}, {self.cpu_count} cores, {self.threads} threads for torch"
        yield "GPUs", "" if self.gpus else "none"
        for index, gpu in enumerate(self.gpus):
            yield f"  {index}", gpu
            if index < len(self.gpu_passes):
                yield "    passes", self.gpu_passes[index]
        yield "transport", self.transport
        yield "  shared memory", self.shared_memory or "no"
        yield "launcher", self.launcher or "none"
        yield "variables", "" if self.variables else "none"
        for name, value in self.variables.items():
            yield f"  {name}", value


def environment() -> Environment:
    """Describes this process and its machine. Does not communicate.

    Example:
        >>> environment().torch == torch.__version__
        True
    """
    gpus, gpu_passes = _describe_gpus()
    return Environment(
        syncnorm=syncnorm.__version__,
        torch=torch.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=_system(),
        cpu=str(_described(cpu_name)),
        cpu_count=cpu_count(),
        threads=torch.get_num_threads(),
        packages={name: _described(_version, name) for name in PACKAGES},
        build={
            "CUDA": torch.version.cuda,
            "cuDNN": _described(_cudnn),
            "NCCL": _described(_nccl),
            "HIP": torch.version.hip,
        },
        gpus=gpus,
        backends=_backends(),
        transport=default_transport(),
        shared_memory=_described(_shared_memory),
        launcher=launcher(os.environ),
        variables=variables(os.environ),
        native=f"no: {native.absent}" if native.library is None else f"yes, {native.instruction_set}",
        gpu_passes=gpu_passes,
    )


def _described(describe: Callable[..., str | None], *args: object) -> str | None:
    """``describe(*args)``, or the error: a library that is broken is what a bug report is about."""
    try:
        return describe(*args)
    except Exception as error:
        return _unknown(error)


def _unknown(error: Exception) -> str:
    return f"not known: {type(error).__name__}: {error}"


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that affect distributed training, sorted; secrets and the home directory are replaced."""
    found = {name: value for name, value in environ.items() if name.startswith(PREFIXES) or name in NAMES}
    home = os.path.expanduser("~")  # which is "~" again for a user without an entry, as in some containers
    return {
        # Not if the home directory is "/", as in some containers.
        name: "(hidden)" if _SECRET.search(name) else value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(found.items())
    }


def launcher(environ: Mapping[str, str]) -> str | None:
    """The launcher that set the variables in ``environ``; None if there was none."""
    for name, variable in (
        ("accelerate launch", "ACCELERATE_MIXED_PRECISION"),
        ("torchrun", "TORCHELASTIC_RUN_ID"),
        ("srun", "SLURM_PROCID"),
        ("mpirun", "OMPI_COMM_WORLD_RANK"),
    ):
        if variable in environ:
            return name
    return "unknown: RANK and WORLD_SIZE are set" if {"RANK", "WORLD_SIZE"} <= environ.keys() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _system() -> str:
    name = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{name}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):  # not Linux, or a distribution without the file
        return name


def _cudnn() -> str | None:
    # Raises if the library that is loaded is older than the one torch was built with.
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return None if version is None else str(version)


def _nccl() -> str | None:
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _shared_memory() -> str | None:
    try:
        descriptor, path = create_file()
    except OSError:
        return None
    os.close(descriptor)
    if path.startswith("/proc"):
        return "an anonymous file (memfd)"
    os.unlink(path)
    return f"a file in {Path(path).parent}"


def _describe_gpus() -> tuple[list[str], list[str]]:
    """Name and passes of each GPU."""
    try:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        return [_unknown(error)], []
    return [str(_described(_gpu, each)) for each in devices], [str(_described(_passes, each)) for each in devices]


def _gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"


def _passes(device: torch.device) -> str:
    """Which passes layers use on a GPU. Triton's are tried: whether it can compile is known after a first launch."""
    if launch.passes_available(device):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reason is a part of what is returned
                device_step.works_on(device)
        except RuntimeError as error:  # no memory, or the GPU is in use exclusively
            return f"not known: {error}"
    reason = launch.unavailable(device)
    return "Triton's kernels" if reason is None else f"torch's CUDA kernels: {reason}"


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    return [name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if _has_backend(name)]


def _has_backend(name: str) -> bool:
    try:
        return bool(getattr(dist, f"is_{name}_available")())
    except Exception:  # a version or a build of torch without the function
        return False
