"""Synchronized batch normalisation that runs wherever torch.distributed runs."""

from importlib import import_module
from types import ModuleType

from syncnorm import functional
from syncnorm.collectives import set_debug
from syncnorm.conversion import convert, describe, revert
from syncnorm.errors import SyncNormError
from syncnorm.folding import fold
from syncnorm.groups import no_sync_stats
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
    "diagnostics",
    "fold",
    "functional",
    "no_sync_stats",
    "revert",
    "set_debug",
    "testing",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    # Loaded at first use, because training jobs have no need of it.
    if name in ("diagnostics", "testing", "training"):
        return import_module(f"syncnorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
