"""What differs between versions and builds of torch from 2.6 on, all in one place; each entry says which differ.

The rest of the package is written for the newest version and asks here for what older ones lack or name differently.
"""

import functools
import inspect
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

F = TypeVar("F", bound=Callable[..., Any])

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if VERSION < (2, 6):
    raise ImportError(f"syncnorm needs torch 2.6 or newer, got {torch.__version__}: pip install --upgrade torch")

# From 2.13 on the tracer follows the layer, and a graph keeps its operators, which have ordered effects. Before, the
# layer is a graph break: 2.10 has no ``force_save_effectful_ops`` and fails to partition such a graph.
ONE_GRAPH = VERSION >= (2, 13)

# A build with USE_DISTRIBUTED=0 has no process groups: a layer then is the one of torch.
DISTRIBUTED = dist.is_available()

if TYPE_CHECKING or DISTRIBUTED:
    from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions
    from torch._C._distributed_c10d import Backend as Backend
    from torch.distributed.distributed_c10d import PrefixStore as PrefixStore
    from torch.distributed.distributed_c10d import Store as Store
    from torch.distributed.distributed_c10d import Work as Work

    # 2.13 renames all_gather_into_tensor and warns of the old name, the only one of 2.11.
    all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
else:

    class Store:
        """A stand-in, for annotations and imports; and so are the others."""

    Backend = PrefixStore = Work = all_gather_single = Store


def is_initialized() -> bool:
    """Whether this process has a default process group."""
    return DISTRIBUTED and dist.is_initialized()


def copied(store: Store) -> Store:
    """``store`` with a connection of its own, if it can be copied: not in 2.6, nor if it is written in Python."""
    with suppress(AttributeError, NotImplementedError, RuntimeError):
        return store.clone()  # type: ignore[attr-defined,no-any-return]  # missing in torch's stubs
    return store


_destroyed: "deque[dist.ProcessGroup]" = deque(maxlen=8)


def destroy_process_group(group: "dist.ProcessGroup") -> None:
    """``dist.destroy_process_group`` for a group that no rank uses any more; collective like that.

    Before 2.8 the last reference to a gloo group must not go right after a collective: the GIL is held until the
    group's threads have ended, and they may wait for it to free tensors. So it stays until others are destroyed.
    """
    dist.destroy_process_group(group)
    if VERSION < (2, 8):
        _destroyed.append(group)


@functools.cache
def gather_options() -> "AllgatherOptions":
    """Of a gather on the current stream: another one would have to wait for this one, and it for that."""
    options = AllgatherOptions()
    options.asyncOp = False
    return options


@functools.cache
def sum_options() -> "AllreduceOptions":
    """Of a sum on the current stream. 2.6 has no such choice: the backend's own stream, and both wait."""
    options = AllreduceOptions()  # the operation is a sum by default
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def graph_break(function: F) -> F:
    """``function`` as one that ``torch.compile`` does not trace, where it could not (before 2.13)."""
    return function if ONE_GRAPH else untraced(function)


def outside_of_graphs(reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function``, called while ``torch.compile`` traces: the graph breaks, for ``reason``."""
    if ONE_GRAPH:  # before, the layer's forward is a graph break itself, and 2.6 takes no reason
        torch._dynamo.graph_break(msg=reason)
    return _call_untraced(function, *args, **kwargs)


def untraced(function: F) -> F:
    """``function`` as one that ``torch.compile`` does not trace: a graph breaks at its call."""
    # Not torch.compiler.disable, which imports the compiler now; this does so at the first call.
    opaque: F = torch._disable_dynamo(function)  # type: ignore[attr-defined,assignment]  # not in torch's stubs
    return opaque


@untraced
def _call_untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def register_ordered(operator: Any) -> None:
    """Makes a graph keep all calls of a custom operator, in order."""
    if not ONE_GRAPH:
        return  # the operator stands in no graph
    from torch._library.effects import EffectType

    operator.register_effect(EffectType.ORDERED)


# 2.13 takes the argument, 2.11 does not: a layer with a weight has a bias, which reset_parameters relies on.
BATCH_NORM_TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm1d.__init__).parameters


def ddp_without_buffers() -> dict[str, Any]:
    """The argument with which DDP does not broadcast buffers."""
    return {DDP_BUFFERS: False}


def ddp_broadcasts_buffers(ddp: DistributedDataParallel) -> bool:
    """Whether DDP was made to broadcast buffers."""
    return bool(getattr(ddp, DDP_BUFFERS))


# 2.11 has broadcast_buffers, 2.13 both names, and 2.14 warns of the old one.
DDP_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):

    def top_saved_tensors_hooks() -> tuple[Any, Any] | None:
        """The innermost pair of saved-tensor hooks of this thread; None outside of any, or if they are disabled."""
        return torch._C._autograd._top_saved_tensors_default_hooks(False)

else:  # 2.6 cannot ask for them: they are noted as they come and go

    class _Entered(threading.local):
        def __init__(self) -> None:
            self.pairs: list[tuple[Any, Any]] = []

    _entered = _Entered()
    _enter, _exit = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def _noting_enter(self: Any) -> None:
        _enter(self)
        _entered.pairs.append((self.pack_hook, self.unpack_hook))

    def _noting_exit(self: Any, *args: object) -> None:
        if _entered.pairs:  # not if they were entered before the import
            _entered.pairs.pop()
        _exit(self, *args)

    # Replaced on the class: checkpointing and offloading use subclasses, which inherit these methods.
    saved_tensors_hooks.__enter__ = _noting_enter  # type: ignore[method-assign]  # 2.6 has no other way to ask
    saved_tensors_hooks.__exit__ = _noting_exit  # type: ignore[method-assign]  # as above

    def top_saved_tensors_hooks() -> tuple[Any, Any] | None:
        """The innermost pair of saved-tensor hooks of this thread; None outside of any, or if they are disabled."""
        disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        return _entered.pairs[-1] if _entered.pairs and disabled is None else None
