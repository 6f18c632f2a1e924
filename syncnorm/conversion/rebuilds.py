"""Keeps synced layers in their model when a converter of another library would rebuild them.

Such a converter (torch's own, apex's, mmcv's, timm's) walks through a model and registers, in place of each
``nn.BatchNorm``, a synchronized norm of its own that takes over the parameters and buffers. syncnorm's layers are
``nn.BatchNorm`` too, so it would rebuild them as well: hooks, classes and process groups would be lost, and on a CPU
the model would no longer run. torch calls registration hooks at that moment, and they may choose another module.
"""

import re
import warnings
import weakref
from itertools import chain

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from syncnorm.comm.layer_names import Model
from syncnorm.modules import Synced, TorchSyncBatchNorm

# apex, mmcv: SyncBatchNorm; detectron2: NaiveSyncBatchNorm; segmentation libraries: SynchronizedBatchNorm2d.
_SYNCHRONIZED = re.compile(r"Sync\w*(BatchNorm|BN)")

_watching = False
_warned: "weakref.WeakSet[Model]" = weakref.WeakSet()


def watch() -> None:
    """From now on, other libraries' converters leave synced layers alone, in every model of this process."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_keep)  # type: ignore[arg-type]  # torch's type omits the result
        _watching = True


def takes_over(new: nn.Module, old: nn.Module) -> bool:
    """Whether ``new`` was built from ``old``: a parameter or buffer of ``old`` is its own."""
    kept = {id(tensor) for tensor in chain(old.parameters(), old.buffers())}
    return any(id(tensor) in kept for tensor in chain(new.parameters(), new.buffers()))


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The synced layer that ``new`` would replace in ``parent``, if ``new`` is another library's form of it."""
    old = parent._modules.get(name)
    if not isinstance(old, Synced) or new is None or isinstance(new, Synced):
        return None
    if not _is_synchronized(new) or not takes_over(new, old):
        return None
    model = old._sync_name and old._sync_name.model
    if model not in _warned:
        if model is not None:
            _warned.add(model)
        warnings.warn(
            f"a converter to {type(new).__module__}.{type(new).__name__} leaves the layers alone that syncnorm has "
            f"synchronized already, {type(old).__name__} '{name}' of {type(parent).__name__} first; they keep their "
            f"process groups. To use that class instead, call syncnorm.revert(model) before",
            stacklevel=4,
        )
    return old


def _is_synchronized(module: nn.Module) -> bool:
    return isinstance(module, TorchSyncBatchNorm) or bool(_SYNCHRONIZED.search(type(module).__name__))
