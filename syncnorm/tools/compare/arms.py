"""The arms: what each does to the model's norms, how it spreads the batch, and what it can be compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from syncnorm.conversion.convert import convert

Norms = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: as ``--arms`` takes it.
        about: one line for the legend.
        spread: ``"whole"``: rank 0 alone sees the global batch. ``"dp"``: rank 0 alone, DataParallel.
            ``"ddp"``: every rank its slice, DistributedDataParallel.
        norms: (model, num_groups) -> the model with this arm's norm layers.
        synced: its norms communicate.
        torch_may_refuse: a ``ValueError`` while the arm is set up is torch saying that it cannot run here.
    """

    name: str
    about: str
    spread: Literal["whole", "dp", "ddp"]
    norms: Norms
    synced: bool = False
    torch_may_refuse: bool = False


def _batch(model: nn.Module, num_groups: int) -> nn.Module:
    return model


def _synced(model: nn.Module, num_groups: int) -> nn.Module:
    return convert(model)


def _group(model: nn.Module, num_groups: int) -> nn.Module:
    return convert(model, to="group", num_groups=num_groups)


def _layer(model: nn.Module, num_groups: int) -> nn.Module:
    return convert(model, to="layer")


def _instance(model: nn.Module, num_groups: int) -> nn.Module:
    return convert(model, to="instance")


def _torch_synced(model: nn.Module, num_groups: int) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


SINGLE = Arm("single", "one process, the whole batch: the reference", "whole", _batch)

ARMS = {
    arm.name: arm
    for arm in (
        SINGLE,
        Arm("dp", "DataParallel, statistics of each replica's slice", "dp", _batch),
        Arm("ddp", "DDP, statistics of each rank's slice", "ddp", _batch),
        Arm("ddp+syncbn", "DDP after syncnorm.convert(model)", "ddp", _synced, synced=True),
        Arm("ddp+group", 'DDP after convert(model, to="group")', "ddp", _group),
        Arm("ddp+layer", 'DDP after convert(model, to="layer")', "ddp", _layer),
        Arm("ddp+instance", 'DDP after convert(model, to="instance")', "ddp", _instance),
        Arm("ddp+torch-syncbn", "DDP with torch.nn.SyncBatchNorm", "ddp", _torch_synced, True, torch_may_refuse=True),
    )
}
