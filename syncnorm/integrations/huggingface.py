"""Hugging Face Transformers: a callback that synchronizes the batch norms of a model while the Trainer trains it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.conversion.convert import GroupSize, convert, revert
from syncnorm.integrations import missing

try:
    from transformers.trainer_callback import TrainerCallback
except ModuleNotFoundError as error:
    raise missing(error, "transformers", __name__) from None

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments

__all__ = ["SyncNorm"]


class SyncNorm(TrainerCallback):
    """Converts the model with ``syncnorm.convert`` when training begins; reverts it at the end of training.

    The Trainer has wrapped the model in DDP by then. Both changes are in place, so that DDP sees them. If training
    raises, the model stays converted: call ``syncnorm.revert``.

    Args:
        process_group: as in ``syncnorm.convert``.
        group_size: as in ``syncnorm.convert``.
        fuse: as in ``syncnorm.convert``.

    Collective: with ``group_size``, ``train`` on all ranks, as always.

    Example:
        ``Trainer(model, arguments, train_dataset=data, callbacks=[SyncNorm()])``
    """

    def __init__(
        self, process_group: ProcessGroupLike = None, group_size: GroupSize | None = None, fuse: bool = False
    ) -> None:
        self._convert = partial(convert, process_group=process_group, group_size=group_size, fuse=fuse)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Converts the model in place; called by the Trainer."""
        assert model is not None  # the Trainer always passes it
        self._convert(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Restores the original classes in place, for saving and exporting; called by the Trainer."""
        assert model is not None
        revert(model)
