"""The norms that the studies set side by side, by the names that tables show."""

from __future__ import annotations

from typing import Literal

from torch import nn

from syncnorm.conversion.convert import convert

Norm = Literal["batch", "sync", "group", "layer", "instance"]
NUM_GROUPS = 4
NAMES: dict[Norm, str] = {"batch": "BN", "sync": "SyncBN", "group": "GN", "layer": "LN", "instance": "IN"}


def with_norm(model: nn.Module, norm: Norm) -> nn.Module:
    """``model`` with ``norm``, a key of ``NAMES``, in place of its batch norms.

    Collective: none before the first forward.
    """
    return convert(model, to=norm, num_groups=NUM_GROUPS if norm == "group" else None)
