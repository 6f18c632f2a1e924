"""The arms of a comparison: how each converts the model's norms, and how it distributes the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from syncnorm.conversion.convert import convert


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: as in ``--arms``.
        about: one line of description.
        parallelism: ``"single"``: rank 0 alone, with the global batch. ``"dp"``: rank 0 alone, DataParallel.
            ``"ddp"``: all ranks, each with its slice of the batch, DistributedDataParallel.
        convert_norms: (model, num_groups) -> the model with this arm's norm layers.
        synced: its norm layers communicate.
        torch_may_refuse: a ``ValueError`` during the setup of the arm means that torch does not support it here.
    """

    name: str
    about: str
    parallelism: Literal["single", "dp", "ddp"]
    convert_norms: Callable[[nn.Module, int], nn.Module]
    synced: bool = False
    torch_may_refuse: bool = False


def _unchanged(model: nn.Module, num_groups: int) -> nn.Module:
    return model


def _torch_synced(model: nn.Module, num_groups: int) -> nn.Module:
    convert_sync_batchnorm: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert_sync_batchnorm(model)


SINGLE = Arm("single", "one process with the global batch: the reference", "single", _unchanged)

ARMS = {
    arm.name: arm
    for arm in (
        SINGLE,
        Arm("dp", "DataParallel with the statistics of each replica's slice", "dp", _unchanged),
        Arm("ddp", "DDP with the statistics of each rank's slice", "ddp", _unchanged),
        Arm("ddp+syncbn", "DDP after syncnorm.convert(model)", "ddp", lambda model, _: convert(model), synced=True),
        Arm(
            "ddp+group",
            'DDP after convert(model, to="group")',
            "ddp",
            lambda model, num_groups: convert(model, to="group", num_groups=num_groups),
        ),
        Arm(
            "ddp+layer",
            'DDP after convert(model, to="layer")',
            "ddp",
            lambda model, _: convert(model, to="layer"),
        ),
        Arm(
            "ddp+instance",
            'DDP after convert(model, to="instance")',
            "ddp",
            lambda model, _: convert(model, to="instance"),
        ),
        Arm("ddp+torch-syncbn", "DDP with torch.nn.SyncBatchNorm", "ddp", _torch_synced, True, torch_may_refuse=True),
    )
}

# Enough to decide whether SyncBN is needed.
DEFAULT_ARMS = ("single", "dp", "ddp", "ddp+syncbn")


def arm_named(name: str) -> Arm:
    """The arm called ``name``, which has been checked."""
    return ARMS[name]
