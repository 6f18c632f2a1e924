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
from syncnorm.conversion.classes import has_own_forward
from syncnorm.modules import SyncBatchNorm, Synced, TorchSyncBatchNorm

# apex, mmcv: SyncBatchNorm, MMSyncBN; detectron2: NaiveSyncBatchNorm; others: SynchronizedBatchNorm2d. Not a layer
# that contains a norm and more, such as SyncBNReLU.
_SYNCHRONIZED = re.compile(r"(MM|Naive|Torch)?Sync(hronized)?(BatchNorm|BN)([123]d)?")

_watching = False
_warned: "weakref.WeakSet[Model]" = weakref.WeakSet()
_warned_of: set[type] = set()  # classes that would have replaced layers which were constructed and not converted


def watch() -> None:
    """From now on, other libraries' converters leave synced layers alone, in every model of this process."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_keep)  # type: ignore[arg-type]  # torch's type omits the result
        _watching = True


def child(parent: nn.Module, name: str) -> nn.Module | None:
    """The module that is registered as ``name``."""
    return dict(parent._modules.items()).get(name)  # those of a TorchScript module are no dictionary


def rebuilds(new: nn.Module, old: nn.Module) -> bool:
    """Whether ``new`` is ``old`` built anew as another class of batch norm.

    It then shares a parameter or buffer with ``old`` (or neither has any) and has no additional ones. A subclass of
    torch's layer counts only if ``old`` has a forward of its own as well, as timm's layers with an activation do.
    """
    exact = TorchSyncBatchNorm, SyncBatchNorm
    derived = isinstance(new, exact) and type(new) not in exact
    if derived and not has_own_forward(type(old)):
        return False
    kept, own = (dict(chain(m.named_parameters(), m.named_buffers())) for m in (old, new))
    if not kept and not own:
        return all(getattr(new, name, None) == getattr(old, name) for name in ("num_features", "eps", "momentum"))
    ids = {id(tensor) for tensor in kept.values()}
    return own.keys() <= kept.keys() and any(id(tensor) in ids for tensor in own.values())


def _keep(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module | None:
    """The synced layer that ``new`` would replace in ``parent``, if ``new`` is another library's form of it."""
    if new is None or isinstance(new, Synced) or not _is_synchronized(new):  # first: most modules end here
        return None
    old = child(parent, name)
    if not isinstance(old, Synced) or not rebuilds(new, old):
        return None
    if _first_of_model(old, type(new)):
        warnings.warn(
            f"a converter to {type(new).__module__}.{type(new).__name__} leaves the layers alone that syncnorm has "
            f"synchronized already, {type(old).__name__} '{name}' of {type(parent).__name__} first; they keep their "
            f"process groups. To use that class instead, call syncnorm.revert(model) before",
            stacklevel=4,
        )
    return old


def _first_of_model(layer: Synced, replacement: type) -> bool:
    """Whether no layer of this one's model has been kept yet; of layers that were constructed, no layer at all."""
    if layer._sync_name is None or layer._sync_name.built:
        first = replacement not in _warned_of
        _warned_of.add(replacement)
    else:
        first = layer._sync_name.model not in _warned
        _warned.add(layer._sync_name.model)
    return first


def _is_synchronized(module: nn.Module) -> bool:
    return isinstance(module, TorchSyncBatchNorm) or bool(_SYNCHRONIZED.fullmatch(type(module).__name__))
