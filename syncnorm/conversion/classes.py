"""Which class stands for which: from a batch norm's class to its synced class and back.

Converting a layer is setting its ``__class__``. Synced classes of torch's own layers are written out in
``modules``; those of other classes are made here, once each, and pickle by the name of the class they came from.
"""

import functools
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from syncnorm.conversion.calls import loads_batch_norm, names_batch_norm, near_children
from syncnorm.conversion.forward_override import GroupCallsMixin, SyncCallsMixin
from syncnorm.errors import SyncNormError
from syncnorm.modules import (
    INSTEAD,
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    Synced,
    SyncMixin,
)

_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNorm: SyncBatchNorm,
}
_PLAIN: dict[type, type] = {synced: plain for plain, synced in _SYNCED.items()}
_made: dict[tuple[type, type], type] = {}


NO_CALL = "its own forward was not seen to call F.batch_norm"


class NotConvertible(Exception):
    """Says why a layer keeps its class."""


def synced_class(cls: type) -> type:
    """The synced class of a batch norm's class.

    Raises:
        NotConvertible: with the reason.
    """
    if issubclass(cls, Synced):
        return cls
    if issubclass(cls, GroupCallsMixin):
        return synced_class(plain_class(cls))
    if cls in _SYNCED:
        return _SYNCED[cls]
    if cls is nn.SyncBatchNorm:
        return FromTorchSyncBatchNorm
    if _is_parametrized(cls):
        return _rebase(cls, synced_class(cls.__bases__[0]))
    if issubclass(cls, nn.SyncBatchNorm):
        raise NotConvertible("a subclass of torch.nn.SyncBatchNorm, which DDP refuses on CPU")
    if cls.forward is _BatchNorm.forward:  # type: ignore[attr-defined]
        return _make(SyncMixin, cls)
    if names_batch_norm(cls):
        return _make(SyncCallsMixin, cls)
    raise NotConvertible(NO_CALL)


def group_calls_class(cls: type) -> type:
    """The class that runs ``cls``'s own forward with group norm in the place of ``F.batch_norm``."""
    return _make(GroupCallsMixin, plain_class(cls))


def plain_class(cls: type) -> type:
    """The class that a converted class was before; any other class is its own."""
    if cls in _PLAIN:
        return _PLAIN[cls]
    if "_plain_class" in cls.__dict__:
        return cls._plain_class  # type: ignore[attr-defined,no-any-return]
    if _is_parametrized(cls) and issubclass(cls, Synced | GroupCallsMixin):
        return _rebase(cls, plain_class(cls.__bases__[0]))
    return cls


def has_own_forward(cls: type) -> bool:
    """Whether a batch norm's class does more in its forward than batch norm."""
    forward = plain_class(cls).forward  # type: ignore[attr-defined]
    return forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """The synced layers that the module around them seems to bypass by calling ``F.batch_norm``, with a note each.

    Read from the code of that module's class. A layer that has run in training is not bypassed, nor is one inside a
    layer whose forward is followed.
    """
    followed = {m for layer in model.modules() if isinstance(layer, SyncCallsMixin) for m in layer.modules()}
    loads = functools.cache(loads_batch_norm)  # a class has many instances in a model
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        layers = [m for m in near_children(module) if isinstance(m, Synced) and m._sync_seen is None]
        if layers and module not in followed and loads(type(module)):  # type: ignore[arg-type]
            note = f"{type(module).__name__}.forward calls F.batch_norm itself: {INSTEAD}"
            found.update(dict.fromkeys(layers, note))
    return found


def move_parametrizations(old: nn.Module, new: nn.Module) -> None:
    """Gives ``new`` the parametrized tensors of ``old``, which were its plain parameters of the same names."""
    if parametrize.is_parametrized(old):
        new.parametrizations = old.parametrizations
        for name in new.parametrizations:  # type: ignore[union-attr]
            new._parameters.pop(name, None)
        new.__class__ = _rebase(type(old), type(new))


class _Made:
    """Pickling and copying for classes that exist in no module: as the original class and a mix-in."""

    _plain_class: type
    _mixin: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As the original class would, whatever its way; the class is made anew around what comes of that.
        made = type(self)
        self.__class__ = self._plain_class
        try:
            reduced = self.__reduce_ex__(protocol)
        finally:
            self.__class__ = made
        if not isinstance(reduced, tuple):
            raise SyncNormError(f"{made._plain_class.__name__} pickles by name: syncnorm.revert the model first")
        return _restore, (made._mixin, made._plain_class, *reduced[:2]), *reduced[2:]


def _restore(mixin: type, plain: type, rebuild: Any, args: tuple[Any, ...]) -> Any:
    layer = rebuild(*args)
    layer.__class__ = _make(mixin, plain)
    return layer


def _make(mixin: type, plain: type) -> type:
    if (mixin, plain) not in _made:
        prefix = "Group" if mixin is GroupCallsMixin else "Sync"
        namespace = {
            "_plain_class": plain,
            "_mixin": mixin,
            "__module__": plain.__module__,
            "__doc__": plain.__doc__,
        }
        becomes = getattr(plain, "cls_to_become", None)  # a lazy layer changes class at its first forward
        if becomes is not None:
            namespace["cls_to_become"] = synced_class(becomes)
        _made[mixin, plain] = type(f"{prefix}{plain.__name__}", (_Made, mixin, plain), namespace)
    return _made[mixin, plain]


class FromTorchSyncBatchNorm(SyncBatchNorm):
    """A :class:`SyncBatchNorm` that was a ``torch.nn.SyncBatchNorm``, and is one again after ``revert``.

    Not a subclass of torch's: DDP refuses instances of it on CPU.
    """

    _plain_class = nn.SyncBatchNorm


def _is_parametrized(cls: type) -> bool:
    # torch makes one such class an instance, and marks it by its name alone.
    return cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1 and "__getstate__" in cls.__dict__


def _rebase(parametrized: type, base: type) -> type:
    """The same parametrized class over another base: parametrize expects the layer's class at ``__bases__[0]``."""
    return type(f"Parametrized{base.__name__}", (base,), dict(parametrized.__dict__))
