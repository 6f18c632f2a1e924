"""Lightning: a plugin that synchronizes the batch norms of a LightningModule while it is trained."""

import sys
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.conversion.convert import GroupSize, convert, revert
from syncnorm.integrations import missing

try:
    # Lightning is published under two names, and the Trainer of each accepts only plugins of its own LayerSync.
    if TYPE_CHECKING or "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
        from lightning.pytorch.plugins.layer_sync import LayerSync
    else:
        from pytorch_lightning.plugins.layer_sync import LayerSync
except ModuleNotFoundError as error:
    raise missing(error, "lightning", __name__) from None

__all__ = ["SyncNorm"]


class SyncNorm(LayerSync):
    """Converts the model with ``syncnorm.convert`` before ``fit`` wraps it in DDP or FSDP; reverts it afterwards.

    It replaces ``Trainer(sync_batchnorm=True)``, which does not support CPUs and creates new layers; the
    LightningModule does not change.

    Args:
        process_group: as in ``syncnorm.convert``. Lightning creates the default group in ``fit``: usually
            ``group_size`` is what you need.
        group_size: as in ``syncnorm.convert``.
        fuse: as in ``syncnorm.convert``.

    Collective: with ``group_size``, ``fit`` on all ranks, which Lightning does anyway.

    Example:
        ``Trainer(strategy="ddp", devices=8, plugins=[SyncNorm()])``
    """

    def __init__(
        self, process_group: ProcessGroupLike = None, group_size: GroupSize | None = None, fuse: bool = False
    ) -> None:
        self._convert = partial(convert, process_group=process_group, group_size=group_size, fuse=fuse)

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the model in place; called by the Trainer."""
        return self._convert(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Restores the original classes in place; called by the Trainer."""
        return revert(model)
