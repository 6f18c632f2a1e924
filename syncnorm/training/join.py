"""Uneven numbers of batches: synced layers under torch's ``Join``."""

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
from syncnorm.modules import Synced


def joinable(model: nn.Module) -> Joinable:
    """Lets ``torch.distributed.algorithms.join.Join`` wait for the synced layers of ``model`` as well.

    A rank whose data has run out answers the others' exchanges with a count of zero, in a thread beside DDP's
    own shadowing, until all have run out. It needs no record of what they do: each exchange says that itself. So
    a rank may have had no batch at all, and the order of layers may change, as long as the ranks that still
    have data agree. At the end all ranks have the running statistics of one that ran out last.

    Args:
        model: a DistributedDataParallel model, or any module with synced layers.

    Raises:
        SyncNormError: inside ``Join``, if the ranks with data disagree; on all ranks, also those without.

    Collective: ``Join`` is for all ranks. The layers' exchanges are as ever; at the end there is one more, and one
        a layer.

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
            # DDP's shadow waits for gradients, which wait for our layers: ours has to begin before, whatever
            # the order in which Join was given the two.
            model.join_hook = functools.partial(_begin_together, self._shadow, type(model).join_hook, model)  # type: ignore[method-assign]

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """The shadow of the synced layers."""
        if self._model in _notifying:  # of another epoch, which may have ended with an error
            _notifying[self._model].remove()
        _notifying[self._model] = self._model.register_forward_pre_hook(self._notify)
        self._shadow.notifying = _notifying[self._model]
        return self._shadow

    def _notify(self, *_: Any) -> None:
        Join.notify_join_context(self)  # tells it that this rank has a batch, if no other member of Join does

    @property
    def join_device(self) -> torch.device:
        """Where ``Join``'s own collectives run."""
        return next(self._model.parameters(), torch.empty(0)).device

    @property
    def join_process_group(self) -> Any:
        """DDP's group, or the default one."""
        return getattr(self._model, "process_group", dist.group.WORLD)


_notifying: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


def _begin_together(shadow: _Shadow, hook: Callable[..., JoinHook], ddp: nn.Module, **kwargs: Any) -> JoinHook:
    return _Together(shadow, hook(ddp, **kwargs))


class _Together(JoinHook):
    """DDP's hook, with our shadow running beside it."""

    def __init__(self, shadow: _Shadow, hook: JoinHook):
        self._shadow = shadow
        self._hook = hook

    def main_hook(self) -> None:
        self._shadow.main_hook()
        try:
            self._hook.main_hook()
        except RuntimeError:
            self._shadow.raise_error()  # which came first
            raise

    def post_hook(self, is_last_joiner: bool) -> None:
        self._hook.post_hook(is_last_joiner)


class _Shadow(JoinHook):
    """Takes part in the exchanges of a model's layers without having data."""

    def __init__(self, model: nn.Module):
        self._layers: dict[dist.ProcessGroup, list[nn.Module]] = {}
        for module in model.modules():
            group = process_groups.synced_group(module.process_group) if isinstance(module, Synced) else None
            if group is not None:
                self._layers.setdefault(group, []).append(module)
                comm.peers_of(group).staged = True
        self._threads: list[threading.Thread] = []
        self._error: Exception | None = None
        self.notifying: RemovableHandle | None = None

    def main_hook(self) -> None:
        """Begins to answer, at the first iteration that this rank has no data for."""
        if not self._threads:
            self._start(is_last_joiner=False)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Ends when all ranks have run out."""
        if not self._threads:
            self._start(is_last_joiner)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self.notifying is not None:
            self.notifying.remove()  # outside of Join a forward tells nobody, and may be one rank's alone
        self.raise_error()

    def raise_error(self) -> None:
        """Raises what ended an exchange."""
        if self._error is not None:
            raise self._error

    def _start(self, is_last_joiner: bool) -> None:
        for group, layers in self._layers.items():
            # Daemons: a rank that ends with an error does not wait for the others.
            thread = threading.Thread(target=self._answer, args=(group, layers, is_last_joiner), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _answer(self, group: dist.ProcessGroup, layers: list[nn.Module], is_last_joiner: bool) -> None:
        try:
            exchange = comm.exchange_of(group, torch.device("cpu"))
            assert exchange is not None
            sources: list[int] = []
            while not sources:
                headers = exchange(comm.Call(Kind.JOINED), values=is_last_joiner).headers
                if all(h.kind == Kind.JOINED for h in headers):
                    sources = [row for row, h in enumerate(headers) if h.values]
            for layer in layers:
                _copy_buffers(exchange, sources[0], layer)
        except Exception as error:
            self._error = error


@torch.no_grad()
def _copy_buffers(exchange: Exchange, source: int, layer: nn.Module) -> None:
    """Gives ``layer`` the buffers of the rank in row ``source``."""
    buffers = list(layer.buffers(recurse=False))
    if not buffers:
        return
    received = exchange(comm.Call(Kind.JOINED), [_bytes(b) for b in buffers]).payloads
    parts = torch.split(received[source], [b.numel() * b.element_size() for b in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)
