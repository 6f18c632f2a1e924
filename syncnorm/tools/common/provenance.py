"""Where and when a record was made: hardware, versions, date."""

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
    """What a command ran on."""

    device: str
    device_name: str
    backend: str
    cpu_count: int
    threads_per_rank: int


def hardware_of(device: torch.device, backend: str) -> Hardware:
    """What this process runs on."""
    return Hardware(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        backend=backend,
        cpu_count=cpu_count(),
        threads_per_rank=torch.get_num_threads(),
    )


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Provenance(TypedDict):
    """Where and when a record was made, by which versions; `provenance` fills it."""

    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str


def provenance(hardware: Hardware) -> Provenance:
    """The versions of this process and the time now (UTC)."""
    return Provenance(
        hardware=hardware,
        syncnorm_version=syncnorm.__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def command_line() -> str:
    """The command that this process runs, as users type it."""
    return " ".join(["syncnorm", *sys.argv[1:]])
