"""Synchronized batch normalization that runs wherever torch.distributed runs."""

from importlib import import_module
from types import ModuleType

from syncnorm import functional
from syncnorm.comm import set_debug
from syncnorm.comm.process_groups import no_sync_stats
from syncnorm.conversion.convert import convert, revert
from syncnorm.conversion.describe import describe
from syncnorm.conversion.fold import fold
from syncnorm.conversion.replacing import replacing_torch
from syncnorm.errors import SyncNormError
from syncnorm.modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__version__ = "0.1.0"

__all__ = [
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "SyncNormError",
    "convert",
    "describe",
    "fold",
    "functional",
    "integrations",
    "monitor",
    "no_sync_stats",
    "replacing_torch",
    "revert",
    "set_debug",
    "testing",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    # Loaded at first use: most training jobs need none of them.
    if name in ("compare", "integrations", "monitor", "testing", "training"):
        return import_module(f"syncnorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
