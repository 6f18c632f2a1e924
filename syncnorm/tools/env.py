"""What a report of a bug needs to say about where it happened."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

import syncnorm
from syncnorm.tools.common.provenance import cpu_count, cpu_name
from syncnorm.tools.common.records import Record

PACKAGES = ("accelerate", "triton", "numpy", "click", "rich", "matplotlib", "scikit-learn")
# torch's own spelling, and the launchers' variables that say who is who.
PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "SYNCNORM_", "MASTER_", "CUDA_", "TORCH_DISTRIBUTED_", "TORCHINDUCTOR_")
NAMES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_LOCALID", "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
)  # fmt: skip
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Environment(Record):
    """Versions, machine, backends and variables; ``None`` where something is not there.

    Attributes:
        packages: by name, the versions of what syncnorm uses.
        build: what torch was built with: CUDA, cuDNN, NCCL.
        gpus: name, memory in GiB and compute capability of each.
        backends: of torch.distributed, those that this build has.
        launcher: that started this process, as far as its variables tell.
        variables: that bear on distributed training; nothing secret, and the home directory as ``~``.
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
    launcher: str | None
    variables: dict[str, str]


def environment() -> Environment:
    """Looks around. Communicates nothing.

    Example:
        >>> environment().torch == torch.__version__
        True
    """
    return Environment(
        syncnorm=syncnorm.__version__,
        torch=torch.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=_system(),
        cpu=cpu_name(),
        cpu_count=cpu_count(),
        threads=torch.get_num_threads(),
        packages={name: _version(name) for name in PACKAGES},
        build={"CUDA": torch.version.cuda, "cuDNN": _cudnn(), "NCCL": _nccl(), "HIP": torch.version.hip},
        gpus=[_gpu(index) for index in range(torch.cuda.device_count())],
        backends=_backends(),
        launcher=launcher(os.environ),
        variables=variables(os.environ),
    )


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of ``environ`` that bear on distributed training, sorted; without secrets, and without the home path."""
    found = {name: value for name, value in environ.items() if name.startswith(PREFIXES) or name in NAMES}
    home = str(Path.home())
    return {
        # A home of "/", as containers have it, hides nothing.
        name: "(hidden)" if _SECRET.search(name) else value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(found.items())
    }


def launcher(environ: Mapping[str, str]) -> str | None:
    """The launcher that set the variables in ``environ``; None without one."""
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
    except (OSError, KeyError):  # not a Linux, or one that does not say
        return name


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if version is None else str(version)


def _nccl() -> str | None:
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    known = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
        "xccl": dist.is_xccl_available(),
    }
    return [name for name, there in known.items() if there]
