"""convert, revert, describe: batch norms of a model to synced ones and back, without rebuilding anything."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncnorm import comm
from syncnorm.comm import layer_names, process_groups
from syncnorm.conversion import baselines, classes, fuse_relu
from syncnorm.conversion.calls import names_batch_norm
from syncnorm.conversion.forward_override import GroupCallsMixin
from syncnorm.errors import InputError
from syncnorm.modules import INSTEAD, BatchNorm, Synced

M = TypeVar("M", bound=nn.Module)
Target = Literal["sync", "batch", "group", "layer", "instance"]
_KEEPS_SYNCING = "its class was made from a synced one (by FSDP's fully_shard, or as a subclass): revert before that"
_REPLACED_FORWARD = "its forward was replaced on the instance (a hook of accelerate, a patch): remove that first"


def convert(
    model: M,
    *,
    to: Target = "sync",
    process_group: Any = None,
    group_size: int | Literal["node"] | None = None,
    num_groups: int | None = None,
    fuse: bool = False,
) -> M:
    """Changes every batch norm of ``model`` to another norm, in place.

    To ``"sync"`` a layer changes its class and nothing else: parameters, buffers, hooks, attributes,
    parametrizations, shared references, an optimiser's view of it and ``isinstance(m, nn.BatchNorm2d)`` stay.
    Layers that are synced already take the new group, if one is given. ``"batch"`` is plain batch norm, the way
    back. For ``"group"``, ``"layer"`` and ``"instance"`` new modules are built around the same parameters;
    running statistics, hooks and attributes of the old ones are dropped. Works before and after wrapping in
    DistributedDataParallel; before ``torch.jit.script`` and after ``torch.fx.symbolic_trace``.

    Args:
        model: any module, also a single batch norm.
        to: the norm to change to.
        process_group: ranks that share statistics, a ProcessGroup or 1-D DeviceMesh; None is the default group.
        group_size: instead, groups of that many consecutive ranks, or of the ranks of each ``"node"``.
        num_groups: of channels, for ``to="group"``; 32 if not given.
        fuse: also make one call of a synced layer and the ReLU after it, with or without an addition between them,
            wherever a graph of ``torch.fx`` holds all that the block does; :func:`describe` says where. Attributes
            that the block reads are taken as they are now. On a GPU with
            Triton it is one pass over the tensor and has no second derivative. Copies and pickles are not fused.

    Returns:
        ``model``; or the new layer, where ``model`` itself is a batch norm and ``to`` a baseline.

    Raises:
        InputError: wrong options, ``num_groups`` that does not divide a layer's channels, or a class that was made
            from that of a fused block; nothing was changed.

    Warns:
        UserWarning: once, with the names of the layers that cannot be converted, which stay as they are; and once,
            with those that the module around them seems to bypass, by calling ``F.batch_norm`` itself.

    Collective: with ``group_size``, all ranks of the default group must call. Otherwise none. After an error that
        ended the synchronization over a group (an interrupt, a rank that failed), it goes on once all of its ranks
        have called again.

    Example:
        >>> model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> model[1]
        SyncBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    _check_options(model, to, process_group, group_size, num_groups, fuse)
    fuse_relu.unfuse(model)
    if to == "batch":
        return _to_batch(model)
    if to != "sync":
        return _to_baseline(model, to, 32 if num_groups is None else num_groups)

    planned, skipped = _plan(model)
    group = process_groups.resolve(process_group)
    if group_size is not None:
        group = process_groups.subgroup(group_size)
    for module, cls in planned.items():
        _set_synced(module, cls, group)
    synced = {n: m for n, m in model.named_modules() if m in planned and isinstance(m, Synced)}
    for used in {layer._sync_group.peek() for layer in synced.values()}:
        comm.reopen(used)
    _name_layers(synced)
    for layer in synced.values():
        inner = tuple(m for m in layer.modules() if m in planned and m is not layer)  # type: ignore[attr-defined]
        if inner:
            layer._sync_inner = inner
    if fuse:
        fuse_relu.fuse(model)
    _warn_of(skipped)
    _warn_of_bypassed(model)
    return model


def _name_layers(layers: dict[str, Synced]) -> None:
    layers = {name or type(layer).__name__: layer for name, layer in layers.items()}
    earlier = {None if layer._sync_name is None else layer._sync_name.model for layer in layers.values()}
    model = earlier.pop() if len(earlier) == 1 else None
    if model is None or model.names != layers.keys():  # not the same model, converted once more
        model = layer_names.Model(frozenset(layers))
    for name, layer in layers.items():
        layer._sync_name = layer_names.LayerName(name, model, group=layer._sync_group.peek())


def revert(model: M) -> M:
    """Gives every converted layer of ``model`` the class that it had before, in place.

    A layer that was built as a ``syncnorm.SyncBatchNorm*`` becomes the batch norm that it syncs. New modules
    made by ``convert(to="group")`` and its like cannot be turned back. Nor can a class that was made from a synced
    one: revert before FSDP's ``fully_shard``, or convert after it.

    Returns:
        ``model``, ready for export or for a run without ``torch.distributed``.

    Raises:
        InputError: a class was made from that of a fused block; nothing was changed.

    Warns:
        UserWarning: once, with the names of the layers that stay synced, over their group.

    Collective: none.
    """
    stuck = {}
    fuse_relu.unfuse(model)
    for name, module in model.named_modules():
        if not _is_converted(module):
            continue
        if _forward_replaced(module):
            stuck[name] = _REPLACED_FORWARD
        elif issubclass(classes.plain_class(type(module)), Synced):
            stuck[name] = _KEEPS_SYNCING
        else:
            _set_plain(module)
    _warn_of(stuck, "revert")
    return model


@dataclass(frozen=True)
class LayerInfo:
    """One norm layer of a model, as :func:`describe` tells it."""

    name: str
    type: str
    synced: bool
    group: str
    note: str


class Description(list[LayerInfo]):
    """The norm layers of a model; prints as a table."""

    def __str__(self) -> str:
        """A plain-text table, a line a layer."""
        if not self:
            return "no normalisation layers"
        head = ("layer", "class", "synced", "group", "note")
        rows = [head, *((i.name, i.type, "yes" if i.synced else "no", i.group, i.note) for i in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """Every norm layer of ``model``: name, class, whether it is synced and over which group, or why it is not.

    A converted layer is not called synced where the module that holds it calls ``F.batch_norm`` itself (told from its
    code), until the layer's own forward has run in training; nor after one that was not synced.

    Example:
        >>> print(describe(nn.Sequential(nn.BatchNorm2d(8))))
        layer  class        synced  group  note
        0      BatchNorm2d  no      -      convert() syncs it
    """
    found = Description()
    fused, bypassed = fuse_relu.fused_layers(model), classes.bypassed(model)
    for name, module in model.named_modules():
        obstacle = _unsynced(module) or bypassed.get(module)
        note = obstacle or ("fused with its ReLU" if module in fused else _note(module))
        if note is not None:
            synced = isinstance(module, Synced) and obstacle is None
            group = module._sync_group.describe() if isinstance(module, Synced) and synced else "-"
            found.append(LayerInfo(name or "(model)", type(module).__name__, synced, group, note))
    return found


def _unsynced(module: nn.Module) -> str | None:
    """Why a forward in training was not synced; None if all were."""
    if not isinstance(module, Synced) or not module._sync_seen:
        return None
    return f"its forward {module._sync_seen}: {INSTEAD}"


def _note(module: nn.Module) -> str | None:
    """What to say of a layer; None where it is no norm."""
    if isinstance(module, Synced):
        return ""
    if isinstance(module, GroupCallsMixin):
        return f"group norm ({module._num_groups}) in the place of its batch norm"
    if isinstance(module, _BatchNorm | torch.jit.ScriptModule):
        planned, skipped = _plan(module)
        if module in planned:
            return "convert() syncs it"
        return f"left alone: {skipped['']}" if "" in skipped else None
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | _InstanceNorm):
        return "no batch statistics to sync"
    if "BatchNorm" in type(module).__name__ and not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return "left alone: not an nn.BatchNorm"
    return None  # a name with BatchNorm around a batch norm is that of a wrapper, and the layer has its own line


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Each batch norm with its name, and what stands against changing it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if "BatchNorm" in getattr(module, "original_name", ""):
                yield name, module, "TorchScript, convert before torch.jit.script"
        elif isinstance(module, _BatchNorm):
            yield name, module, _REPLACED_FORWARD if _forward_replaced(module) else None


def _plan(model: nn.Module) -> tuple[dict[nn.Module, type], dict[str, str]]:
    """The synced class of each batch norm, and by name why others have none. Changes nothing."""
    planned: dict[nn.Module, type] = {}
    skipped: dict[str, str] = {}
    for name, module, obstacle in _batch_norms(model):
        try:
            if obstacle is not None:
                raise classes.NotConvertible(obstacle)
            planned[module] = classes.synced_class(type(module))
        except classes.NotConvertible as reason:
            skipped[name] = str(reason)
    return planned, skipped


def _set_synced(module: nn.Module, cls: type, group: dist.ProcessGroup | None) -> None:
    own = None
    if type(module) is nn.SyncBatchNorm:
        # It keeps its group as a plain attribute, which a copy or pickle would trip over.
        own = module.__dict__.pop("process_group")
    module.__dict__.pop("_num_groups", None)
    for name in ("_sync_seen", "_sync_inner"):
        module.__dict__.pop(name, None)
    _set_class(module, cls)
    if group is not None or own is not None:
        module.process_group = own if group is None else group  # type: ignore[assignment]


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, Synced | GroupCallsMixin)


def _set_plain(module: nn.Module) -> None:
    group = module.__dict__.pop("_sync_group", None)
    for name in ("_sync_name", "_sync_seen", "_sync_inner", "_num_groups"):
        module.__dict__.pop(name, None)
    _set_class(module, classes.plain_class(type(module)))
    if type(module) is nn.SyncBatchNorm:
        module.process_group = None if group is None else group.peek()


def _set_class(module: nn.Module, cls: type) -> None:
    module.__dict__.pop("forward", None)  # the old class's own, bound: see _forward_replaced
    module.__class__ = cls


def _forward_replaced(module: nn.Module) -> bool:
    """Whether another forward than its class's stands on the instance. accelerate leaves the class's own there."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _to_batch(model: M) -> M:
    skipped = {}
    for name, module in revert(model).named_modules():
        if type(module) is nn.SyncBatchNorm:
            del module.process_group
            _set_class(module, BatchNorm)
        elif isinstance(module, nn.SyncBatchNorm):
            skipped[name] = "a subclass of torch.nn.SyncBatchNorm"
    _warn_of(skipped)
    return model


def _to_baseline(model: M, kind: str, num_groups: int) -> M:
    # All layers are judged before the first one changes.
    groups_of: dict[nn.Module, int] = {}
    skipped: dict[str, str] = {}
    for name, module, obstacle in _batch_norms(model):
        if obstacle is not None:
            skipped[name] = obstacle
        elif isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            skipped[name] = "lazy, and has not seen an input yet"
        elif classes.has_own_forward(type(module)) and not names_batch_norm(type(module)):
            skipped[name] = classes.NO_CALL
        else:
            groups_of[module] = baselines.groups_for(kind, module.num_features, num_groups, name)  # type: ignore[arg-type]

    replaced: dict[nn.Module, nn.Module] = {}
    for module, count in groups_of.items():
        if classes.has_own_forward(type(module)):
            _set_plain(module)
            _set_class(module, classes.group_calls_class(type(module)))
            module._num_groups = count  # type: ignore[assignment]
        else:
            replaced[module] = baselines.build(kind, module, count)
            classes.move_parametrizations(module, replaced[module])
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    _warn_of(skipped)
    return replaced.get(model, model)  # type: ignore[return-value]


def _warn_of(skipped: dict[str, str], what: str = "convert") -> None:
    if skipped:
        told = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in skipped.items())
        warnings.warn(f"syncnorm.{what} left {len(skipped)} layer(s) as they were: {told}", stacklevel=3)


def _warn_of_bypassed(model: nn.Module) -> None:
    bypassed = classes.bypassed(model)
    if bypassed:
        told = "; ".join(f"{name}: {bypassed[m]}" for name, m in model.named_modules() if m in bypassed)
        warnings.warn(f"syncnorm.convert found {len(bypassed)} layer(s) that may be bypassed: {told}", stacklevel=3)


def _check_options(
    model: Any, to: str, process_group: Any, group_size: Any, num_groups: int | None, fuse: bool
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"convert expects an nn.Module, got {type(model).__name__}")
    if to not in ("sync", "batch", *baselines.CLASSES):
        raise InputError(f"to={to!r} is none of 'sync', 'batch', 'group', 'layer', 'instance'")
    if process_group is not None and group_size is not None:
        raise InputError("give process_group or group_size, not both")
    if to != "sync" and (process_group is not None or group_size is not None or fuse):
        raise InputError(f"to={to!r} synchronises nothing: process_group, group_size and fuse go with to='sync'")
    if num_groups is not None and (to != "group" or num_groups < 1):
        raise InputError(f"num_groups={num_groups} must be positive, and goes with to='group' (got to={to!r})")
