"""The hardware, the versions and the date that a record was made with."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import torch

import syncnorm


@dataclass(frozen=True)
class Hardware:
    """The hardware that a command ran on, as one rank sees it."""

    device: str
    device_name: str
    backend: str
    cpu_count: int
    threads_per_rank: int


def hardware_of(device: torch.device, backend: str) -> Hardware:
    """The hardware that this process runs on."""
    return Hardware(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        backend=backend,
        cpu_count=cpu_count(),
        threads_per_rank=torch.get_num_threads(),
    )


def cpu_count() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The name that the operating system gives the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Provenance(TypedDict):
    """The fields of a record that say how it was made; `provenance` returns them."""

    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str


def provenance(hardware: Hardware) -> Provenance:
    """``hardware``, the versions in this process, and the current time (UTC)."""
    return Provenance(
        hardware=hardware,
        syncnorm_version=syncnorm.__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def command_line() -> str:
    """The command line of this process as a user types it."""
    return " ".join(["syncnorm", *sys.argv[1:]])
