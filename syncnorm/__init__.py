"""Synchronized batch normalisation that runs wherever torch.distributed runs."""

from syncnorm.errors import SyncNormError

__version__ = "0.1.0"

__all__ = ["SyncNormError"]
