"""Peak memory of this process while something runs."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from syncnorm.tools.compare.evidence import Memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# proc(5): sets the peak back to what is resident now.
_RESET_PEAK = "5"


def watch_memory(device: torch.device) -> Callable[[], Memory | None]:
    """Begins to watch; what is returned says how much was needed at most since.

    On a GPU what torch's allocator handed out. Otherwise how far resident memory grew, which Linux alone can
    tell for a part of a process's life; ``None`` elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: Memory(torch.cuda.max_memory_allocated(device), "cuda allocated")
    with suppress(OSError, AttributeError):
        # Memory that an earlier arm freed stays resident, and would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
        before = _kib("VmRSS")
    except OSError:
        return lambda: None
    return lambda: Memory(max(0, _kib("VmHWM") - before) * 1024, "rss growth")


def _kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
