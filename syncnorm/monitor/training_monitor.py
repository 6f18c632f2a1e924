"""``monitor``: samples the batch norms of a training job every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from syncnorm._torch_versions import ddp_broadcasts_buffers, destroy_process_group, is_initialized
from syncnorm.comm import process_groups
from syncnorm.comm.call import observers
from syncnorm.errors import InputError
from syncnorm.layer import checkpointing
from syncnorm.monitor.findings import Findings, Sample, summarize
from syncnorm.monitor.sampling import RankSample, gather_sample, num_channels, observable
from syncnorm.monitor.scalars import WriteScalar, scalars_of
from syncnorm.training.buffers import check_same_layers


def monitor(
    model: nn.Module,
    every: int = 50,
    *,
    process_group: dist.ProcessGroup | None = None,
    log: Callable[[str], None] | None = print,
    scalars: WriteScalar | None = None,
) -> Monitor:
    """Monitors the batch norms of ``model``, synced or not, while the ``with`` block trains it.

    For each layer, each sampled step shows how far the local statistics of the ranks are from the global ones, how
    long each rank waits in the layer's exchanges and which rank the others wait for, and whether the running
    statistics have identical bits on all ranks. The first rank logs one line per sampled step, and at the end a table
    with conclusions. The training computes the same bits as without the monitor.

    A step is a forward of ``model`` in training mode. Once the training loop has called ``step()`` on the monitor,
    each step ends at that call instead. Not observed are code that ``torch.compile`` has compiled, CUDA graphs,
    forwards in ``syncnorm.no_sync_stats()``, and further forwards of a layer in the same step. Waits are known for
    synced layers whose tensors are on CPUs, over gloo; with NCCL the host does not wait.

    Args:
        model: wrapped in DDP or not; with the same batch norms on all ranks.
        every: sample each step whose number (from 1) is a multiple; 0 disables the monitor: no hooks, no collectives,
            no output.
        process_group: ranks to compare, a group with the gloo backend. By default a group of all ranks is created,
            and destroyed at the end; without torch.distributed there is one rank.
        log: receives the lines and the table on the group's first rank; None disables output.
        scalars: called on the group's first rank with the name, the value and the step of each number of a sampled
            step, which :func:`syncnorm.monitor.scalars_of` lists. For TensorBoard it is ``writer.add_scalar``; for
            other trackers see ``syncnorm.integrations.scalars``.

    Raises:
        InputError: ``every`` is negative, the group's backend is not gloo, or layers are lazy and not initialized.
        SyncNormError: on entry, on all ranks, if they hold different batch norms; later, if another rank has died.

    Collective: all ranks of the group must enter and leave the block, and make the same number of steps. Entry: one
        ``new_group`` if none was given, and one all_gather_object. A sampled step: one all_gather when the step ends,
        which is when the next one begins, at ``step()``, or at the end of the block. Other steps, and leaving by an
        exception: none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> with monitor(model, every=1, log=None) as watch:
        ...     _ = model(torch.randn(6, 4))
        >>> watch.findings().samples
        1
    """
    return Monitor(model, every, process_group, log, scalars)


class Monitor:
    """The context manager that :func:`monitor` returns."""

    def __init__(
        self,
        model: nn.Module,
        every: int,
        process_group: dist.ProcessGroup | None,
        log: Callable[[str], None] | None,
        scalars: WriteScalar | None = None,
    ):
        if every < 0:
            raise InputError(f"every must be 0 (off) or a positive number of steps, got {every}")
        self._model, self._every, self._log, self._scalars = model, every, log, scalars
        self._given_group, self._owns_group = process_group, False
        self._group: dist.ProcessGroup | None = None  # None if there is one rank
        self._world_size = 1
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        inner: nn.Module = model if self._ddp is None else self._ddp.module
        self._layers = {name or "(model)": m for name, m in inner.named_modules() if isinstance(m, _BatchNorm)}
        self._samples: list[Sample] = []
        self._model_hook: RemovableHandle | None = None
        # Of the current step:
        self._step, self._forwards, self._began = 0, 0, 0.0
        self._rank_sample: RankSample | None = None  # None if the step is not sampled
        self._hooks: list[RemovableHandle] = []
        self._manual_steps = False  # whether step() ends a step

    def __enter__(self) -> Monitor:
        if self._every:
            self._group = self._gloo_group()
            self._world_size = 1 if self._group is None else self._group.size()
            try:
                self._check_layers()
                hook = _TransientHook(self._before_forward)
                self._model_hook = self._model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                self._begin_step()
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._every and kind is None:
                # A step without a forward has nothing to gather.
                self._end_step() if self._forwards else self._stop_sampling()
                self._log_on_first_rank(str(self.findings()))
        finally:
            self._clean_up()

    def step(self) -> None:
        """Ends a training step. Collective: all ranks; one all_gather if the step was sampled."""
        self._manual_steps = True
        if self._model_hook is not None:
            self._end_step()
            self._begin_step()

    def findings(self) -> Findings:
        """The findings so far, the same on every rank."""
        kinds = [type(layer).__name__ for layer in self._layers.values()]
        steps = self._step - (0 if self._forwards else 1)
        return summarize(self._samples, kinds, max(steps, 0), self._world_size, _ddp_broadcasts(self._model))

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or not observable() or checkpointing.in_backward():
            return
        if self._forwards and not self._manual_steps:
            self._end_step()
            self._begin_step()
        self._forwards += 1
        if self._rank_sample is not None:
            if module in self._layers.values():
                # The model is a layer itself, whose own hook was registered too late for this forward.
                self._rank_sample.record_input(module, args, kwargs)
            self._rank_sample.forward_began = time.perf_counter()

    def _before_ddp_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rank_sample is not None and module.training and observable():
            self._rank_sample.record_broadcast()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._rank_sample is not None and module.training and observable():
            self._rank_sample.record_buffers(self._layers.values())

    def _begin_step(self) -> None:
        self._step, self._forwards = self._step + 1, 0
        if self._step % self._every == 0:
            self._start_sampling()

    def _end_step(self) -> None:
        step_s, rank_sample = time.perf_counter() - self._began, self._rank_sample
        self._stop_sampling()
        if rank_sample is not None:
            sample = gather_sample(self._step, step_s, rank_sample, self._layers, self._group)
            self._samples.append(sample)
            self._log_on_first_rank(str(sample))
            if self._scalars is not None and self._is_first_rank():
                for name, value in scalars_of(sample):
                    self._scalars(name, value, sample.step)

    def _start_sampling(self) -> None:
        self._rank_sample = RankSample()
        for layer in dict.fromkeys(self._layers.values()):
            hook = _TransientHook(self._rank_sample.record_input)
            self._hooks.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        self._hooks.append(self._model.register_forward_hook(_TransientHook(self._after_forward)))
        if self._ddp is not None and _broadcast_blocks(self._ddp):
            hook = _TransientHook(self._before_ddp_module)
            self._hooks.append(self._ddp.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        observers.append(self._rank_sample.record_wait)
        self._began = time.perf_counter()

    def _stop_sampling(self) -> None:
        if self._rank_sample is not None:
            observers.remove(self._rank_sample.record_wait)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._rank_sample = [], None

    def _clean_up(self) -> None:
        self._stop_sampling()
        if self._model_hook is not None:
            self._model_hook.remove()
        if self._owns_group and self._group is not None and process_groups.alive(self._group):
            destroy_process_group(self._group)
        self._model_hook, self._owns_group = None, False

    def _gloo_group(self) -> dist.ProcessGroup | None:
        """The ranks to compare; None if there is one rank."""
        group = self._given_group
        if group is not None and "gloo" not in str(dist.get_backend(group)):
            raise InputError(
                f"process_group must have the gloo backend, because the monitor compares tensors on the host; got "
                f"{dist.get_backend(group)}. Create it with dist.new_group(ranks, backend='gloo'), or leave it out"
            )
        if not is_initialized() or (group is None and dist.get_world_size() == 1):
            return None
        if group is None:
            group, self._owns_group = dist.new_group(backend="gloo"), True
        return group

    def _check_layers(self) -> None:
        lazy = [n for n, m in self._layers.items() if any(is_lazy(t) for t in (*m.parameters(), *m.buffers()))]
        if lazy:
            raise InputError(f"{', '.join(lazy)}: lazy layers are not initialized; run a forward before the monitor")
        channels = {name: num_channels(layer) for name, layer in self._layers.items()}
        check_same_layers(channels, self._group, "syncnorm.monitor.monitor")

    def _log_on_first_rank(self, text: str) -> None:
        if self._log is not None and self._is_first_rank():
            self._log(text)

    def _is_first_rank(self) -> bool:
        return self._group is None or self._group.rank() == 0


class _TransientHook:
    """A forward hook, or a pre-hook with kwargs, that does nothing in a copied or unpickled model."""

    def __init__(self, function: Callable[[Any, tuple[Any, ...], Any], None] | None = None):
        self._function = function

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs_or_output: Any) -> None:
        if self._function is not None:
            self._function(module, args, kwargs_or_output)

    def __reduce__(self) -> tuple[Any, ...]:  # deepcopy uses it as well
        return _TransientHook, ()


def _broadcast_blocks(ddp: DistributedDataParallel) -> bool:
    """Whether DDP broadcasts buffers before a forward, and the host waits for that."""
    broadcasts: bool = ddp.will_sync_module_buffers()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return broadcasts and dist.get_backend(ddp.process_group) == "gloo"


def _ddp_broadcasts(model: nn.Module) -> bool | None:
    """Whether a DDP module in ``model`` broadcasts buffers; None if there is none."""
    wrapped = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    return any(ddp_broadcasts_buffers(m) for m in wrapped) if wrapped else None
