"""``monitor``: a running job's batch norms, looked at every so many steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import zip_longest
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from syncnorm.comm import process_groups
from syncnorm.comm.call import observers
from syncnorm.comm.gather import gather_objects
from syncnorm.errors import InputError, SyncNormError
from syncnorm.layer import checkpointing
from syncnorm.monitor.findings import Findings, Sample, summary
from syncnorm.monitor.hooks import RunHook
from syncnorm.monitor.sampling import Notes, gather_sample, observable, width
from syncnorm.monitor.telling import line

_WHAT = "syncnorm.monitor.monitor"


def monitor(
    model: nn.Module,
    every: int = 50,
    *,
    process_group: dist.ProcessGroup | None = None,
    tell: Callable[[str], None] | None = print,
) -> Monitor:
    """Watches the batch norms of ``model``, synced or not, while the ``with`` block trains it.

    Of each layer, in each step that is sampled: how far the ranks' local statistics lie from those of all ranks, how
    long each rank waits in its exchanges and for whom, and whether running statistics are the same bits on all ranks.
    The first rank tells a line for each such step, and at the end a table with what follows from it. The numbers of
    the training stay the same, bit for bit.

    A step is a forward of ``model`` in training mode, until the loop first calls ``step()`` on the monitor: from then
    on a step ends there. Not seen: code that ``torch.compile`` has compiled, CUDA graphs, forwards in
    ``syncnorm.no_sync_stats()``, and a layer's second forward in one step. Waiting is known of synced layers whose
    tensors are on CPUs, over gloo; over NCCL the host does not wait.

    Args:
        model: wrapped in DDP or not; the same batch norms on all ranks.
        every: sample each step whose number, from 1, it divides; 0 is off: no hook, no collective, no line.
        process_group: ranks to compare, a group whose backend is gloo. By default one is made of all ranks, and
            destroyed at the end; without torch.distributed there is one rank.
        tell: what takes the lines and the table, on the group's first rank; None for silence.

    Raises:
        InputError: a negative ``every``, a group that is not gloo's, or layers that are still lazy.
        SyncNormError: at the beginning, on all ranks: they hold different batch norms. Later: a rank has died.

    Collective: all ranks of the group must enter and leave the block, and count the same steps. Entering: one
        ``new_group``, if none was given, and one all_gather_object. A sampled step: one all_gather when the step has
        ended, which is at the beginning of the next, at ``step()``, or at the end of the block. Any other step, and
        leaving by an exception: none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> with monitor(model, every=1, tell=None) as watch:
        ...     _ = model(torch.randn(6, 4))
        >>> watch.findings().samples
        1
    """
    return Monitor(model, every, process_group, tell)


class Monitor:
    """What :func:`monitor` returns: a context manager; see there."""

    def __init__(
        self,
        model: nn.Module,
        every: int,
        process_group: dist.ProcessGroup | None,
        tell: Callable[[str], None] | None,
    ):
        if every < 0:
            raise InputError(f"every must be 0 (off) or more steps, got {every}")
        self._model, self._every, self._tell = model, every, tell
        self._given, self._made = process_group, False
        self._group: dist.ProcessGroup | None = None
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        inner: nn.Module = model if self._ddp is None else self._ddp.module
        self._layers = {name or "(model)": m for name, m in inner.named_modules() if isinstance(m, _BatchNorm)}
        self._samples: list[Sample] = []
        self._handles: list[Any] = []  # of the step that is sampled
        self._root: Any = None
        self._notes: Notes | None = None
        self._step, self._manual, self._forwards, self._began = 0, False, 0, 0.0

    def __enter__(self) -> Monitor:
        if self._every:
            self._group = self._talking_group()
            try:
                self._compare_layers()
                hook = RunHook(self._forward)
                self._root = self._model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                self._begin()
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._every and kind is None:
                # Of a step that has not begun there is nothing to gather.
                self._end() if self._forwards else self._disarm()
                self._say(str(self.findings()))
        finally:
            self._clean_up()

    def step(self) -> None:
        """Says that a training step is over. Collective: all ranks; one all_gather if the step was sampled."""
        self._manual = True
        if self._root is not None:
            self._end()
            self._begin()

    def findings(self) -> Findings:
        """What was found so far, the same on every rank."""
        kinds = [type(layer).__name__ for layer in self._layers.values()]
        steps = self._step - (0 if self._forwards else 1)
        size = 1 if self._group is None else self._size
        return summary(self._samples, kinds, max(steps, 0), size, _broadcasts(self._model))

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the model."""
        if not module.training or not observable() or checkpointing.in_backward():
            return
        if self._forwards and not self._manual:
            self._end()
            self._begin()
        self._forwards += 1
        if self._notes is not None and module in self._layers.values():
            self._notes.input(module, args, kwargs)  # its hook came too late for this forward
        if self._notes is not None:
            self._notes.entered = time.perf_counter()

    def _after_broadcast(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._notes is not None and module.training and observable():
            self._notes.after_broadcast()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._notes is not None and module.training and observable():
            self._notes.after_forward(self._layers.values())

    def _begin(self) -> None:
        self._step, self._forwards = self._step + 1, 0
        if self._step % self._every == 0:
            self._notes = Notes()
            for layer in dict.fromkeys(self._layers.values()):
                hook = RunHook(self._notes.input)
                self._handles.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            self._handles.append(self._model.register_forward_hook(RunHook(self._after_forward)))
            if self._ddp is not None and _broadcasts_blocking(self._ddp):
                hook = RunHook(self._after_broadcast)
                self._handles.append(self._ddp.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            observers.append(self._notes.wait)
            self._began = time.perf_counter()

    def _end(self) -> None:
        seconds, notes = time.perf_counter() - self._began, self._notes
        self._disarm()
        if notes is not None:
            self._samples.append(gather_sample(self._step, seconds, notes, self._layers, self._group))
            self._say(line(self._samples[-1]))

    def _disarm(self) -> None:
        if self._notes is not None:
            observers.remove(self._notes.wait)
        for handle in self._handles:
            handle.remove()
        self._handles, self._notes = [], None

    def _clean_up(self) -> None:
        self._disarm()
        if self._root is not None:
            self._root.remove()
        if self._made and self._group is not None and process_groups.alive(self._group):
            dist.destroy_process_group(self._group)
        self._root, self._made = None, False

    def _talking_group(self) -> dist.ProcessGroup | None:
        self._size = 1
        if self._given is not None and "gloo" not in str(dist.get_backend(self._given)):
            raise InputError(
                f"process_group must be a gloo group, for what is compared is on the host; got "
                f"{dist.get_backend(self._given)}: dist.new_group(ranks, backend='gloo'), or leave it out"
            )
        if not dist.is_initialized() or (self._given is None and dist.get_world_size() == 1):
            return None
        if self._given is None:
            self._given, self._made = dist.new_group(backend="gloo"), True
        self._size = self._given.size()
        return self._given

    def _compare_layers(self) -> None:
        lazy = [n for n, m in self._layers.items() if any(is_lazy(t) for t in (*m.parameters(), *m.buffers()))]
        if lazy:
            raise InputError(f"{', '.join(lazy)}: lazy layers have no width yet; make a forward before the monitor")
        mine = [f"{name}, {width(layer)} channels" for name, layer in self._layers.items()]
        everywhere = gather_objects(mine, self._group, _WHAT)
        for rank, theirs in enumerate(everywhere):
            for first, other in zip_longest(everywhere[0], theirs, fillvalue="no more"):
                if first != other:
                    raise SyncNormError(
                        f"{_WHAT} needs the same batch norms on all ranks: where rank 0 of the group has {first}, "
                        f"rank {rank} has {other}"
                    )

    def _say(self, text: str) -> None:
        if self._tell is not None and (self._group is None or self._group.rank() == 0):
            self._tell(text)


def _broadcasts_blocking(ddp: DistributedDataParallel) -> bool:
    broadcasts: bool = ddp.will_sync_module_buffers()  # type: ignore[no-untyped-call]
    return broadcasts and dist.get_backend(ddp.process_group) == "gloo"


def _broadcasts(model: nn.Module) -> bool | None:
    wrapped = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    return any(bool(m.forward_sync_buffers) for m in wrapped) if wrapped else None
