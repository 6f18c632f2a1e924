"""Maps the class of a batch norm to its synced class, and back.

Converting a layer sets its ``__class__``. ``syncnorm.modules`` defines the synced classes of torch's own layers.
Those of other classes are created here, once each, and are pickled by the name of the class that they are made from.
"""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from syncnorm.conversion.batch_norm_calls import mentions_batch_norm
from syncnorm.conversion.forward_override import GroupNormOverrideMixin, SyncOverrideMixin
from syncnorm.errors import SyncNormError
from syncnorm.modules import (
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    Synced,
    SyncMixin,
    TorchSyncBatchNorm,
)

_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNorm: SyncBatchNorm,
}
_PLAIN: dict[type, type] = {synced: plain for plain, synced in _SYNCED.items()}
_made: dict[tuple[type, type], type] = {}

NO_CALL = "its own forward does not seem to call F.batch_norm"


class NotConvertible(Exception):
    """The reason why a layer keeps its class."""


def synced_class(cls: type) -> type:
    """The synced class of a batch norm class.

    Raises:
        NotConvertible: with the reason.
    """
    if issubclass(cls, Synced):
        return cls
    if issubclass(cls, GroupNormOverrideMixin):
        return synced_class(plain_class(cls))
    if cls in _SYNCED:
        return _SYNCED[cls]
    if cls is TorchSyncBatchNorm:
        return FromTorchSyncBatchNorm
    if _is_parametrized(cls):
        return _rebase(cls, synced_class(cls.__bases__[0]))
    if issubclass(cls, TorchSyncBatchNorm):
        raise NotConvertible("a subclass of torch.nn.SyncBatchNorm, which DDP refuses on CPU")
    if cls.forward is _BatchNorm.forward:  # type: ignore[attr-defined]  # a subclass of nn.Module
        return _make(SyncMixin, cls)
    if mentions_batch_norm(cls):
        return _make(SyncOverrideMixin, cls)
    raise NotConvertible(NO_CALL)


def group_norm_class(cls: type) -> type:
    """The class that runs the forward of ``cls`` with group norm in place of ``F.batch_norm``."""
    return _make(GroupNormOverrideMixin, plain_class(cls))


def plain_class(cls: type) -> type:
    """The class that a converted class was made from; any other class itself."""
    if cls in _PLAIN:
        return _PLAIN[cls]
    if "_plain_class" in cls.__dict__:
        return cls._plain_class  # type: ignore[attr-defined,no-any-return]  # as the line above checks
    if _is_parametrized(cls) and issubclass(cls, Synced | GroupNormOverrideMixin):
        return _rebase(cls, plain_class(cls.__bases__[0]))
    return cls


def has_own_forward(cls: type) -> bool:
    """Whether a batch norm class defines a forward that is not torch's."""
    forward = plain_class(cls).forward  # type: ignore[attr-defined]  # a subclass of nn.Module
    return forward not in (_BatchNorm.forward, TorchSyncBatchNorm.forward)


def move_parametrizations(old: nn.Module, new: nn.Module) -> None:
    """Moves the parametrized tensors of ``old`` to ``new``, in place of its plain parameters of the same names."""
    if parametrize.is_parametrized(old):
        new.parametrizations = old.parametrizations
        for name in new.parametrizations:  # type: ignore[union-attr]  # a ModuleDict, by is_parametrized
            new._parameters.pop(name, None)
        new.__class__ = _rebase(type(old), type(new))


def reduce_as(instance: Any, cls: type, protocol: Any) -> Any:
    """What ``__reduce_ex__`` of ``cls`` returns for ``instance``, which is of a class made from ``cls``."""
    made = type(instance)
    instance.__class__ = cls
    try:
        return instance.__reduce_ex__(protocol)
    finally:
        instance.__class__ = made


class _Made:
    """Pickles and copies an instance of a class that no module defines, as its original class and its mix-in."""

    _plain_class: type
    _mixin: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made = type(self)
        reduced = reduce_as(self, made._plain_class, protocol)
        if not isinstance(reduced, tuple):
            raise SyncNormError(f"{made._plain_class.__name__} pickles by name: syncnorm.revert the model first")
        return _restore, (made._mixin, made._plain_class, *reduced[:2]), *reduced[2:]


def _restore(mixin: type, plain: type, rebuild: Any, args: tuple[Any, ...]) -> Any:
    layer = rebuild(*args)
    layer.__class__ = _make(mixin, plain)
    return layer


def _make(mixin: type, plain: type) -> type:
    if (mixin, plain) not in _made:
        prefix = "Group" if mixin is GroupNormOverrideMixin else "Sync"
        namespace = {
            "_plain_class": plain,
            "_mixin": mixin,
            "__module__": plain.__module__,
            "__doc__": plain.__doc__,
        }
        cls_to_become = getattr(plain, "cls_to_become", None)  # a lazy layer changes its class in its first forward
        if cls_to_become is not None:
            namespace["cls_to_become"] = synced_class(cls_to_become)
        _made[mixin, plain] = type(f"{prefix}{plain.__name__}", (_Made, mixin, plain), namespace)
    return _made[mixin, plain]


class FromTorchSyncBatchNorm(SyncBatchNorm):
    """A :class:`SyncBatchNorm` that was a ``torch.nn.SyncBatchNorm``, and is one again after ``revert``.

    It is not a subclass of torch's, because DDP refuses instances of that class on CPU.
    """

    _plain_class = TorchSyncBatchNorm


def _is_parametrized(cls: type) -> bool:
    # torch creates one such class per instance, which only its name identifies.
    return cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1 and "__getstate__" in cls.__dict__


def _rebase(parametrized: type, base: type) -> type:
    """The same parametrized class with another base: parametrize expects the layer's class at ``__bases__[0]``."""
    return type(f"Parametrized{base.__name__}", (base,), dict(parametrized.__dict__))
