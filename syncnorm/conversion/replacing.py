"""``replacing_torch``: code that synchronizes batch norms by torch's class gets syncnorm's layers instead."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from syncnorm.conversion.convert import convert
from syncnorm.conversion.rebuilds import child, rebuilds
from syncnorm.modules import SyncBatchNorm, Synced, TorchSyncBatchNorm

# What is set inside the context. torch.nn.modules.SyncBatchNorm stays: DistributedDataParallel looks there for the
# class whose instances it refuses on CPUs.
_REPLACED = (
    (torch.nn, "SyncBatchNorm", SyncBatchNorm),
    (torch.nn.modules.batchnorm, "SyncBatchNorm", SyncBatchNorm),
    # For code that has imported torch's class before.
    (TorchSyncBatchNorm, "convert_sync_batchnorm", SyncBatchNorm.convert_sync_batchnorm),
)

_lock = threading.Lock()
_depth = 0  # open contexts
_undo = ExitStack()


@contextmanager
def replacing_torch() -> Iterator[None]:
    """A context in which ``torch.nn.SyncBatchNorm`` is :class:`syncnorm.SyncBatchNorm`.

    Frameworks that synchronize batch norms on request then use syncnorm: Lightning's
    ``Trainer(sync_batchnorm=True)``, ignite's ``auto_model(sync_bn=True)``, fastai's ``to_distributed``, mmengine's
    ``sync_bn="torch"``, timm's ``convert_sync_batchnorm``, and whoever calls
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``. Their models train on CPUs too, and layers keep their classes:
    :func:`syncnorm.revert` restores them. Layers that were converted inside stay synced outside.

    Import frameworks before, so that they do not derive classes of their own from syncnorm's. The context applies to
    all threads of the process and may be nested. Processes that are started inside must enter it themselves. To
    replace the class without a ``with`` block, call ``stack.enter_context(replacing_torch())`` of a
    ``contextlib.ExitStack`` and later ``stack.close()``.

    Example:
        >>> with replacing_torch():
        ...     model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))
        >>> type(model[0]).__name__
        'SyncBatchNorm2d'
    """
    global _depth
    with _lock:
        if _depth == 0:
            _replace()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _undo.close()


def _replace() -> None:
    for owner, name, replacement in _REPLACED:
        _undo.callback(setattr, owner, name, vars(owner)[name])
        setattr(owner, name, replacement)
    hook = register_module_module_registration_hook(_convert_instead)  # type: ignore[arg-type]  # as in rebuilds
    _undo.callback(hook.remove)


def _convert_instead(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The batch norm that ``new`` would replace in ``parent``, converted, if ``new`` is a synchronized form of it.

    For converters that construct layers themselves. timm's builds a subclass of torch's class for layers with an
    activation, which cannot be replaced by name.
    """
    if not isinstance(new, SyncBatchNorm | TorchSyncBatchNorm):
        return None
    old = child(parent, name)
    if not isinstance(old, _BatchNorm) or old is new or not rebuilds(new, old):
        return None
    old.eps, old.momentum = new.eps, new.momentum
    if not isinstance(old, Synced):
        convert(old, process_group=new.process_group)
    return old if isinstance(old, Synced) else None
