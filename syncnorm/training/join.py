"""Uneven numbers of batches: synced layers with torch's ``Join``."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from syncnorm import comm
from syncnorm.comm import Exchange, Kind, process_groups
from syncnorm.layer.window import end_window
from syncnorm.modules import Synced


def joinable(model: nn.Module) -> Joinable:
    """Makes the synced layers of ``model`` take part in ``torch.distributed.algorithms.join.Join``.

    A rank that has run out of data answers the exchanges of the others with a count of zero, in a thread that runs
    while DDP shadows its own collectives, until all ranks have run out. Each exchange carries what it is for, so the
    rank needs no record of earlier forwards: it may have had no batch at all, and the order of layers may change, as
    long as the ranks that still have data agree. At the end all ranks have the running statistics of a rank that ran
    out last.

    Args:
        model: a DistributedDataParallel model, or any module with synced layers.

    Raises:
        SyncNormError: inside ``Join``, on all ranks, if the ranks with data disagree.

    Collective: all ranks must enter ``Join``. The layers' exchanges do not change; at the end there is one more, and
        one per layer.

    Example:
        >>> def epoch(ddp, batches, optimizer):
        ...     with Join([ddp, joinable(ddp)]):
        ...         for x, y in batches:
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(ddp(x), y).backward()
        ...             optimizer.step()
    """
    return _SyncedJoinable(model)


class _SyncedJoinable(Joinable):
    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = model
        self._shadow = _Shadow(model)
        if isinstance(model, DistributedDataParallel):
            # DDP's shadow waits for gradients, which wait for our layers. Ours must therefore start first, in
            # whatever order the two were passed to Join.
            ddp_hook = type(model).join_hook
            model.join_hook = functools.partial(_shadowed_join_hook, self._shadow, ddp_hook, model)  # type: ignore[method-assign]  # on the instance

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """The shadow of the synced layers."""
        if self._model in _notify_hooks:  # of an earlier epoch, which may have ended with an error
            _notify_hooks[self._model].remove()
        _notify_hooks[self._model] = self._model.register_forward_pre_hook(self._notify)
        self._shadow.notify_hook = _notify_hooks[self._model]
        self._shadow.begin()
        return self._shadow

    def _notify(self, *_: Any) -> None:
        Join.notify_join_context(self)  # this rank has a batch; a no-op unless it is the first member of Join

    @property
    def join_device(self) -> torch.device:
        """The device of ``Join``'s own collectives."""
        return next(self._model.parameters(), torch.empty(0)).device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The group of DDP, otherwise the default group."""
        return getattr(self._model, "process_group", dist.group.WORLD)


_notify_hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


def _shadowed_join_hook(
    shadow: _Shadow, ddp_hook: Callable[..., JoinHook], ddp: nn.Module, **kwargs: Any
) -> JoinHook:
    return _ShadowedDDPHook(shadow, ddp_hook(ddp, **kwargs))


class _ShadowedDDPHook(JoinHook):
    """DDP's hook, which starts the shadow of the synced layers first."""

    def __init__(self, shadow: _Shadow, ddp_hook: JoinHook):
        self._shadow = shadow
        self._ddp_hook = ddp_hook

    def main_hook(self) -> None:
        self._shadow.main_hook()
        try:
            self._ddp_hook.main_hook()
        except RuntimeError:
            self._shadow.raise_error()  # the cause of DDP's error
            raise

    def post_hook(self, is_last_joiner: bool) -> None:
        self._ddp_hook.post_hook(is_last_joiner)


class _Shadow(JoinHook):
    """Takes part in the exchanges of a model's layers on a rank that has no data."""

    def __init__(self, model: nn.Module):
        self._layers: dict[dist.ProcessGroup, list[nn.Module]] = {}
        for module in model.modules():
            group = process_groups.synced_group(module.process_group) if isinstance(module, Synced) else None
            if group is not None:
                self._layers.setdefault(group, []).append(module)
        self._threads: list[threading.Thread] = []
        self._error: Exception | None = None
        self.notify_hook: RemovableHandle | None = None

    def begin(self) -> None:
        """Has the layers exchange frames, which a rank without data can answer, until all ranks have run out."""
        for group in self._layers:
            comm.peers_of(group).joins.add(id(self))

    def main_hook(self) -> None:
        """Starts to answer exchanges in the first iteration without data on this rank."""
        if not self._threads:
            self._start(is_last_joiner=False)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Returns when all ranks have run out of data."""
        if not self._threads:
            self._start(is_last_joiner)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for group, layers in self._layers.items():
            comm.peers_of(group).joins.discard(id(self))
            for layer in layers:
                end_window(layer)  # the ranks have made different numbers of micro-batches
        if self.notify_hook is not None:
            self.notify_hook.remove()  # outside of Join a single rank may make a forward, without a collective
        self.raise_error()

    def raise_error(self) -> None:
        """Raises the error that ended an exchange, if there was one."""
        if self._error is not None:
            raise self._error

    def _start(self, is_last_joiner: bool) -> None:
        for group, layers in self._layers.items():
            # Daemons, so that a rank that exits with an error does not wait for the others.
            thread = threading.Thread(target=self._answer, args=(group, layers, is_last_joiner), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _answer(self, group: dist.ProcessGroup, layers: list[nn.Module], is_last_joiner: bool) -> None:
        try:
            exchange = comm.exchange_of(group, torch.device("cpu"))
            assert exchange is not None
            sources: list[int] = []
            while not sources:
                _, is_last, joined = exchange(comm.Call(Kind.JOINED), values=is_last_joiner)
                if len(joined) == len(is_last):
                    sources = [row for row in joined if is_last[row]]
            for layer in layers:
                _copy_buffers(exchange, sources[0], layer)
        except Exception as error:
            self._error = error


@torch.no_grad()
def _copy_buffers(exchange: Exchange, source: int, layer: nn.Module) -> None:
    """Copies the buffers of ``layer`` from the rank in row ``source``."""
    buffers = list(layer.buffers(recurse=False))
    if not buffers:
        return
    received = exchange(comm.Call(Kind.JOINED), [_bytes(b) for b in buffers]).payloads
    parts = torch.split(received[source], [b.numel() * b.element_size() for b in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)
