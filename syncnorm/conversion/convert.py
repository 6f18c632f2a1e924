"""``convert`` and ``revert``: changes the batch norms of a model to synced ones, or to other norms, and back."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncnorm import comm
from syncnorm.comm import layer_names, process_groups
from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.conversion import baselines, classes, fuse_relu, rebuilds
from syncnorm.conversion.batch_norm_calls import bypassed_layers, mentions_batch_norm
from syncnorm.conversion.forward_override import GroupNormOverrideMixin
from syncnorm.errors import InputError
from syncnorm.layer.window import ConvertedModel, Window
from syncnorm.modules import BatchNorm, Synced, TorchSyncBatchNorm

M = TypeVar("M", bound=nn.Module)
Target = Literal["sync", "batch", "group", "layer", "instance"]
GroupSize = int | Literal["node"]
_DERIVED_CLASS = (
    "its class is derived from a synced one (by FSDP's fully_shard or by subclassing): revert before that"
)
_REPLACED_FORWARD = "its forward was replaced on the instance (by an accelerate hook or a patch): undo that first"


def convert(
    model: M,
    *,
    to: Target = "sync",
    process_group: ProcessGroupLike = None,
    group_size: GroupSize | None = None,
    num_groups: int | None = None,
    fuse: bool = False,
    transport: comm.TransportName | None = None,
    accumulate: int | None = None,
) -> M:
    """Changes every batch norm of ``model`` to another norm, in place.

    With ``to="sync"`` only the class of a layer changes: parameters, buffers, hooks, attributes, parametrizations,
    shared references, the optimizer's references to parameters and ``isinstance(m, nn.BatchNorm2d)`` stay. Layers
    that are already synced get the new group, if one is given. ``"batch"`` converts back to plain batch norm. For
    ``"group"``, ``"layer"`` and ``"instance"`` new modules share the parameters of the old ones; the running
    statistics, hooks and attributes of the old modules are dropped. Call it before or after wrapping the model in
    DistributedDataParallel, and before or after ``torch.fx.symbolic_trace``; TorchScript cannot compile synced
    layers. From the first call on, converters of other libraries leave synced layers alone and warn (see
    ``syncnorm.conversion.rebuilds``).

    Args:
        model: any module; a single batch norm, too.
        to: the norm to change to.
        process_group: ranks that share statistics, a ProcessGroup or 1-D DeviceMesh; None is the default group.
        group_size: an alternative to ``process_group``: groups of that many consecutive ranks, or of the ranks of
            each machine for ``"node"``.
        num_groups: groups of channels for ``to="group"``; 32 by default.
        fuse: also fuse each synced layer with the ReLU after it, and with an addition between them, in every block
            whose forward ``torch.fx`` can trace completely; :func:`describe` lists the fused layers. The values that
            the block's attributes have now become constants. On a GPU with Triton a fused call is one pass over the
            tensor and has no second derivative. Copies and pickles are not fused.
        transport: how the ranks that share statistics exchange their numbers on CPUs over gloo; the same on all
            ranks. ``"auto"`` is shared memory between ranks of one host and gloo between hosts; gloo alone where
            ranks cannot share memory, which is an error for ``"shm"``. ``"gloo"`` is gloo everywhere. ``"native"``
            calls ``all_gather`` and ``all_reduce`` of ``torch.distributed``, as on GPUs: an error on one rank does
            not reach the others then. None is ``SYNCNORM_TRANSPORT``, or ``"auto"`` if that is not set. It belongs
            to the process group: all layers over that group have it, those of other models too.
        accumulate: under gradient accumulation, the number K of micro-batches (forward and backward) per optimizer
            step. Each micro-batch is then normalized with the statistics of all since the last step, over all ranks
            (CmBN; see ``syncnorm.layer.window``), and the running statistics and ``num_batches_tracked`` change as
            by one batch per step. The statistics end when an optimizer steps that holds parameters of the layer
            (for layers without trained ones: of ``model``), after K micro-batches in any case, and where
            :func:`syncnorm.training.end_window` is called. It works without a process group, too. None leaves
            layers as they are in this respect, 1 turns it off. Under ``torch.compile`` such a layer is a graph
            break, and it has no second derivative.

    Returns:
        ``model``; the new layer if ``model`` itself is a batch norm and ``to`` is a norm without communication.

    Raises:
        InputError: wrong options, an ``accumulate`` that is no positive int, a ``num_groups`` that does not divide a
            layer's channels, a class that is derived from that of a fused block, or a ``transport`` for a group
            whose ranks have connected in another way, or before there is a group; nothing was changed.

    Warns:
        UserWarning: once with the names of the layers that cannot be converted and stay unchanged, and once with
            those that their parent module seems to bypass by calling ``F.batch_norm`` itself.

    Collective: with ``group_size``, all ranks of the default group must call; otherwise none. If an error (an
        interrupt, a rank that failed) has ended the synchronization over a group, it resumes when all ranks of the
        group have called again.

    Example:
        >>> model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(model[1]).__name__
        'SyncBatchNorm2d'
    """
    _check_options(model, to, process_group, group_size, num_groups, fuse, transport)
    _check_accumulate(accumulate, to)
    fuse_relu.unfuse(model)
    if to == "batch":
        return _to_batch(model)
    if to != "sync":
        return _to_baseline(model, to, 32 if num_groups is None else num_groups)

    rebuilds.watch()
    planned, skipped = plan_sync(model)
    group = process_groups.resolve(process_group)
    if group_size is not None:
        group = process_groups.subgroup(group_size)
    for used in {_group_of(module) if group is None else group for module in planned}:
        comm.reopen(used)
        comm.set_transport(used, transport)
    for module, cls in planned.items():
        _set_synced(module, cls, group)
    synced = {n: m for n, m in model.named_modules() if m in planned and isinstance(m, Synced)}
    _name_layers(synced)
    for layer in synced.values():
        inner = tuple(m for m in layer.modules() if m in planned and m is not layer)  # type: ignore[attr-defined]  # Synced is mixed into modules
        if inner:
            layer._sync_inner = inner
    if accumulate is not None:
        converted = ConvertedModel(model)
        for layer in synced.values():
            layer._sync_window = None if accumulate == 1 else Window(accumulate, converted)
    if fuse:
        fuse_relu.fuse(model)
    _warn_skipped(skipped)
    _warn_bypassed(model)
    return model


def _name_layers(layers: dict[str, Synced]) -> None:
    layers = {name or type(layer).__name__: layer for name, layer in layers.items()}
    earlier = {None if layer._sync_name is None else layer._sync_name.model for layer in layers.values()}
    model = earlier.pop() if len(earlier) == 1 else None
    if model is None or model.names != layers.keys():  # not the same model, converted again
        model = layer_names.Model(frozenset(layers))
    for name, layer in layers.items():
        layer._sync_name = layer_names.LayerName(name, model, group=layer._sync_group.peek())


def revert(model: M) -> M:
    """Restores the original class of every converted layer of ``model``, in place.

    A layer that was built as a ``syncnorm.SyncBatchNorm*`` becomes the corresponding batch norm. The new modules of
    ``convert(to="group")``, ``"layer"`` and ``"instance"`` cannot be reverted, nor can a class that is derived from a
    synced one: revert before FSDP's ``fully_shard``, or convert after it.

    Returns:
        ``model``, ready for export or for a run without ``torch.distributed``.

    Raises:
        InputError: a class is derived from that of a fused block; nothing was changed.

    Warns:
        UserWarning: once with the names of the layers that stay synced over their group.

    Collective: none.
    """
    skipped = {}
    fuse_relu.unfuse(model)
    for name, module in model.named_modules():
        cls = type(module)
        if not issubclass(cls, Synced | GroupNormOverrideMixin):
            continue
        if _forward_replaced(module):
            skipped[name] = _REPLACED_FORWARD
        elif issubclass(classes.plain_class(cls), Synced):
            skipped[name] = _DERIVED_CLASS
        else:
            _set_plain(module)
    _warn_skipped(skipped, "revert")
    return model


def plan_sync(model: nn.Module) -> tuple[dict[nn.Module, type], dict[str, str]]:
    """The synced class of each batch norm, and by layer name the reason why others have none. Changes nothing."""
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


def replace_modules(model: nn.Module, new_modules: dict[nn.Module, nn.Module]) -> None:
    """Replaces children in ``model``, in place, wherever they are referenced."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new_modules:
                parent._modules[name] = new_modules[child]


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """The name of each batch norm, the layer, and the reason why it cannot be changed, None if it can."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if "BatchNorm" in getattr(module, "original_name", ""):
                yield name, module, "TorchScript, which cannot be converted"
        elif isinstance(module, _BatchNorm):
            yield name, module, _REPLACED_FORWARD if _forward_replaced(module) else None


def _group_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The group that the layer keeps if it is converted without one; None for the default group."""
    if isinstance(module, Synced):
        return module._sync_group.peek()
    return module.process_group if type(module) is TorchSyncBatchNorm else None


def _set_synced(module: nn.Module, cls: type, group: dist.ProcessGroup | None) -> None:
    torch_group = None
    if type(module) is TorchSyncBatchNorm:
        # It stores its group as a plain attribute, which cannot be copied or pickled.
        torch_group = module.__dict__.pop("process_group")
    module.__dict__.pop("_num_groups", None)
    for name in ("_sync_seen", "_sync_inner"):
        module.__dict__.pop(name, None)
    _set_class(module, cls)
    if group is not None or torch_group is not None:
        module.process_group = torch_group if group is None else group  # type: ignore[assignment]  # a property by now


def _set_plain(module: nn.Module) -> None:
    group = module.__dict__.pop("_sync_group", None)
    for name in ("_sync_name", "_sync_seen", "_sync_inner", "_sync_window", "_num_groups"):
        module.__dict__.pop(name, None)
    _set_class(module, classes.plain_class(type(module)))
    if type(module) is TorchSyncBatchNorm:
        module.process_group = None if group is None else group.peek()


def _set_class(module: nn.Module, cls: type) -> None:
    module.__dict__.pop("forward", None)  # of the old class, bound: see _forward_replaced
    module.__class__ = cls


def _forward_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward other than its class's, which accelerate stores there as well."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _to_batch(model: M) -> M:
    skipped = {}
    for name, module in revert(model).named_modules():
        if type(module) is TorchSyncBatchNorm:
            del module.process_group
            _set_class(module, BatchNorm)
        elif isinstance(module, TorchSyncBatchNorm):
            skipped[name] = "a subclass of torch.nn.SyncBatchNorm"
    _warn_skipped(skipped)
    return model


def _to_baseline(model: M, kind: str, num_groups: int) -> M:
    # All layers are checked before the first one changes.
    groups_of: dict[_BatchNorm, int] = {}
    skipped: dict[str, str] = {}
    for name, module, obstacle in _batch_norms(model):
        if obstacle is not None:
            skipped[name] = obstacle
        elif isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            skipped[name] = "lazy and not initialized yet"
        elif classes.has_own_forward(type(module)) and not mentions_batch_norm(type(module)):
            skipped[name] = classes.NO_CALL
        else:
            assert isinstance(module, _BatchNorm)  # a ScriptModule has an obstacle
            groups_of[module] = baselines.groups_for(kind, module.num_features, num_groups, name)

    replaced: dict[nn.Module, nn.Module] = {}
    for module, count in groups_of.items():
        if classes.has_own_forward(type(module)):
            _set_plain(module)
            _set_class(module, classes.group_norm_class(type(module)))
            module._num_groups = count  # type: ignore[assignment]  # declared by its new class
        else:
            replaced[module] = baselines.build(kind, module, count)
            classes.move_parametrizations(module, replaced[module])
    replace_modules(model, replaced)
    _warn_skipped(skipped)
    return replaced.get(model, model)  # type: ignore[return-value]  # a new layer, as the docstring of convert says


def _warn_skipped(skipped: dict[str, str], caller: str = "convert") -> None:
    if skipped:
        reasons = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in skipped.items())
        warnings.warn(f"syncnorm.{caller} left {len(skipped)} layer(s) unchanged: {reasons}", stacklevel=3)


def _warn_bypassed(model: nn.Module) -> None:
    bypassed = bypassed_layers(model)
    if bypassed:
        notes = "; ".join(f"{name}: {bypassed[m]}" for name, m in model.named_modules() if m in bypassed)
        warnings.warn(f"syncnorm.convert found {len(bypassed)} layer(s) that may be bypassed: {notes}", stacklevel=3)


def _check_options(
    model: Any,
    to: str,
    process_group: ProcessGroupLike,
    group_size: GroupSize | None,
    num_groups: int | None,
    fuse: bool,
    transport: str | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"convert expects an nn.Module, got {type(model).__name__}")
    if to not in ("sync", "batch", *baselines.CLASSES):
        raise InputError(f"to={to!r} must be 'sync', 'batch', 'group', 'layer' or 'instance'")
    if process_group is not None and group_size is not None:
        raise InputError("pass process_group or group_size, not both")
    if to != "sync" and (process_group is not None or group_size is not None or fuse or transport is not None):
        raise InputError(
            f"to={to!r} synchronizes nothing: process_group, group_size, fuse and transport require to='sync'"
        )
    if num_groups is not None and (to != "group" or num_groups < 1):
        raise InputError(f"num_groups={num_groups} must be positive and requires to='group' (got to={to!r})")


def _check_accumulate(accumulate: Any, to: str) -> None:
    if accumulate is None:
        return
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise InputError(f"accumulate={accumulate!r} must be a number of micro-batches, an int from 1 on")
    if to != "sync":
        raise InputError(f"to={to!r} shares no statistics between micro-batches: accumulate requires to='sync'")
