"""``describe``: which norm layers of a model are synchronized, over which group, and why others are not."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm import comm
from syncnorm.conversion import fuse_relu
from syncnorm.conversion.batch_norm_calls import bypassed_layers
from syncnorm.conversion.convert import plan_sync
from syncnorm.conversion.forward_override import GroupNormOverrideMixin
from syncnorm.modules import INSTEAD, Synced


@dataclass(frozen=True)
class LayerInfo:
    """One norm layer of a model, as listed by :func:`describe`."""

    name: str
    type: str
    synced: bool
    group: str
    note: str
    transport: str = ""  # how the ranks of its group exchange numbers; empty before there is a group


class Description(list[LayerInfo]):
    """The norm layers of a model; prints as a table."""

    def __str__(self) -> str:
        """A plain-text table with one line per layer, and one line per group below it."""
        if not self:
            return "no normalization layers"
        head = ("layer", "class", "synced", "group", "note")
        rows = [head, *((i.name, i.type, "yes" if i.synced else "no", i.group, i.note) for i in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)
        groups = dict.fromkeys(f"group {i.group}: transport {i.transport}" for i in self if i.transport)
        return "\n".join([*lines, *groups])


def describe(model: nn.Module) -> Description:
    """Lists every norm layer of ``model``: name, class, whether it is synced and over which group, or why it is not.

    A converted layer counts as not synced while the code of its parent module seems to bypass it by calling
    ``F.batch_norm`` itself, until the layer's own forward has run in training; and after a forward in training that
    could not be synchronized. Below the layers it says for each group how its ranks exchange numbers: the transport
    that was chosen (see :func:`syncnorm.convert`) and, once they have connected, what that means for them.

    Example:
        >>> print(describe(nn.Sequential(nn.BatchNorm2d(8))))
        layer  class        synced  group  note
        0      BatchNorm2d  no      -      convert() syncs it
    """
    layers = Description()
    fused, bypassed = fuse_relu.fused_layers(model), bypassed_layers(model)
    for name, module in model.named_modules():
        obstacle = _unsynced_forward(module) or bypassed.get(module)
        note = obstacle or _note(module)
        if module in fused and not obstacle:
            note = f"fused with its ReLU; {note}" if note else "fused with its ReLU"
        if note is not None:
            synced = isinstance(module, Synced) and obstacle is None
            group, transport = "-", ""
            if isinstance(module, Synced) and synced:
                group, transport = module._sync_group.describe(), comm.transport_of(module._sync_group.peek())
            layers.append(LayerInfo(name or "(model)", type(module).__name__, synced, group, note, transport))
    return layers


def _unsynced_forward(module: nn.Module) -> str | None:
    """Why a forward in training was not synced; None if all were."""
    if not isinstance(module, Synced) or not module._sync_seen:
        return None
    return f"its forward {module._sync_seen}: {INSTEAD}"


def _note(module: nn.Module) -> str | None:
    """The note for a norm layer; None if ``module`` is not one."""
    if isinstance(module, Synced):
        window = module._sync_window
        return "" if window is None else f"statistics of up to {window.size} micro-batches"
    if isinstance(module, GroupNormOverrideMixin):
        return f"group norm ({module._num_groups}) in place of its batch norm"
    if isinstance(module, _BatchNorm | torch.jit.ScriptModule):
        planned, skipped = plan_sync(module)
        if module in planned:
            return "convert() syncs it"
        return f"left alone: {skipped['']}" if "" in skipped else None
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | _InstanceNorm):
        return "no batch statistics to sync"
    if "BatchNorm" in type(module).__name__ and not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return "left alone: not an nn.BatchNorm"
    return None  # a module that is named after the batch norm that it wraps: the layer has its own line
