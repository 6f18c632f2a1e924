"""The layer as a module: ``nn.BatchNorm`` with synchronized statistics, and the mixins that synchronize them."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncnorm import comm, functional
from syncnorm._torch_versions import BATCH_NORM_TAKES_BIAS, graph_break, outside_of_graphs
from syncnorm.comm import process_groups
from syncnorm.comm.layer_names import LayerName, Model
from syncnorm.comm.process_groups import ProcessGroupLike
from syncnorm.errors import SyncNormError
from syncnorm.layer import checks
from syncnorm.layer.arguments import Sync
from syncnorm.layer.window import IN_GRAPH as WINDOW_IN_GRAPH
from syncnorm.layer.window import Window, window_of

M = TypeVar("M", bound=nn.Module)

INSTEAD = "call the layer, or syncnorm.functional.sync_batch_norm"
# torch's own layer. Inside syncnorm.replacing_torch, torch.nn.SyncBatchNorm is the class of this file.
TorchSyncBatchNorm = nn.SyncBatchNorm


class Synced:
    """What every synced layer has: a process group to synchronize over, and a name by which ranks recognize it."""

    # Defaults on the class, because convert changes the class of an instance without calling a constructor.
    _sync_group = process_groups.GroupHandle(None)
    _sync_name: LayerName | None = None  # set by convert, and at the end of the constructor
    _sync_seen_outside_data_parallel = False  # whether a forward has run that is not one of nn.DataParallel
    # None before the first forward in training, "" if all of them were synced, otherwise why one was not.
    _sync_seen: str | None = None
    # Synced layers inside a layer with its own forward, which may use their statistics without calling them.
    _sync_inner: tuple[nn.Module, ...] = ()
    _sync_window: Window | None = None  # of micro-batches that share statistics; set by convert

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with its hooks; ``torch.fx`` records the call, as it does for the layers of ``torch.nn``."""
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(argument, fx.Proxy):
                return _call_when_traced(self, argument.tracer, args, kwargs)
        if self._sync_window is not None and torch.compiler.is_compiling() and self.training:  # type: ignore[attr-defined]  # of nn.Module
            return outside_of_graphs(WINDOW_IN_GRAPH, super().__call__, *args, **kwargs)  # type: ignore[misc]  # as above
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of nn.Module

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``.

        Raises:
            SyncNormError: always, because TorchScript cannot compile the synchronization.
        """
        raise SyncNormError(
            f"torch.jit.script cannot compile {type(self).__name__}, which communicates with other ranks. Script a "
            f"copy with plain batch norms: torch.jit.script(syncnorm.revert(copy.deepcopy(model)))"
        )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share statistics; None is the default group. A 1-D DeviceMesh can be assigned as well."""
        return self._sync_group.group

    @process_group.setter
    def process_group(self, group: ProcessGroupLike) -> None:
        self._sync_group = process_groups.GroupHandle(process_groups.resolve(group))
        if self._sync_name is not None:
            self._sync_name = dataclasses.replace(self._sync_name, group=self._sync_group.peek())

    def sync_name(self, group: dist.ProcessGroup | None) -> str:
        """The name by which ranks recognize this layer: its path in the model, and which of several models it is.

        Layers that were constructed as synced layers are numbered; see ``syncnorm.comm.layer_names``.
        """
        if torch.compiler.is_compiling():
            from syncnorm.layer import compiled

            return compiled.while_tracing(_name_in_graph, self, compiled.name_of(group))  # type: ignore[no-any-return]  # torch leaves it untyped
        return _name(self, group)

    def note_unsynced(self, reason: str) -> None:
        """Notes for ``describe`` why a forward in training was not synced; warns of the first such forward.

        Args:
            reason: what the layer did, as a predicate: it follows the layer's name in a sentence.

        Warns:
            UserWarning: once per layer.
        """
        if torch.compiler.is_compiling():
            from syncnorm.layer import compiled

            compiled.while_tracing(_note_unsynced, self, reason)
        else:
            _note_unsynced(self, reason)

    def reset_running_stats(self) -> None:
        """As ``nn.BatchNorm``'s: running mean 0, running variance 1, no batch counted.

        Raises:
            SyncNormError: inside ``syncnorm.no_sync_stats``, where no forward would update them again; they are
                unchanged.
        """
        complete = self._sync_name is not None and not isinstance(self, LazyModuleMixin)
        if complete and not process_groups.syncing():
            raise SyncNormError(
                "reset_running_stats inside syncnorm.no_sync_stats, where forwards do not update the running "
                "statistics: they would stay 0 and 1. Call torch.optim.swa_utils.update_bn on all ranks, outside of "
                "no_sync_stats; or call syncnorm.training.recalibrate(model, batches), which computes them again on "
                "all ranks or, inside no_sync_stats, on this one alone"
            )
        if self._sync_window is not None:
            self._sync_window.end()
        super().reset_running_stats()  # type: ignore[misc]  # of the class that this one is mixed into


def _call_when_traced(layer: Any, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Makes the layer a leaf for every tracer: the graph calls it, and its hooks run when the graph runs.

    A tracer recognizes leaves by the name of their Python module, ``torch.nn``. It calls the forward of all others
    with proxies, and their hooks too, which would run once more whenever the graph calls the layer.
    """

    def record(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)

    return tracer.call_module(layer, record, args, kwargs)


def _note_unsynced(layer: Synced, reason: str) -> str:
    if not layer._sync_seen:
        layer._sync_seen = reason
        warnings.warn(
            f"{type(layer).__name__} {reason}, so syncnorm could not synchronize it ({_name(layer, None)}): its "
            f"statistics there are those of this rank. {INSTEAD[0].upper()}{INSTEAD[1:]}",
            stacklevel=3,
        )
    return reason


def _name_in_graph(layer: Synced, group: str) -> str:
    from syncnorm.layer import compiled

    return _name(layer, compiled.group_named(group))


def _name(layer: Any, group: dist.ProcessGroup | None) -> str:
    if layer._sync_seen is None and layer.training:
        layer._sync_seen = ""
    if layer._sync_name is None:
        layer._sync_name = _built_name(layer)
    if group is None:
        return layer._sync_name.name  # type: ignore[no-any-return]  # layer is Any: it has no common type
    return comm.peers_of(group).models.name(layer._sync_name, group)


def _built_name(layer: Any) -> LayerName:
    own = f"{type(layer).__name__}({layer.num_features})"
    return LayerName(own, Model(frozenset((own,))), built=True, group=layer._sync_group.peek())


class SyncMixin(Synced):
    """The synced forward, for a class that also derives from ``nn.BatchNorm``.

    Parameters, buffers, constructor, hooks, ``state_dict`` and evaluation are those of the other class.
    """

    @graph_break
    def forward(
        self: Any, input: Tensor, mask: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Normalizes with the statistics of all ranks in training, with the running statistics in evaluation.

        Args:
            input: (batch, num_features, *spatial), floating; the batch may differ by rank and may be 0.
            mask: boolean, broadcastable to (batch, *spatial), True where a position counts; output and gradient
                are zero elsewhere.
            residual: added to the output; see ``syncnorm.functional.sync_batch_norm``.
            relu: return the positive part.

        Raises:
            InputError: as ``syncnorm.functional.sync_batch_norm``; buffers are unchanged.

        Collective: in training, all ranks of the group must call.
        """
        group = process_groups.synced_group(self.process_group) if self.training else None
        try:
            return self._synced_forward(group, input, mask, residual, relu)  # type: ignore[no-any-return]  # self is Any
        except BaseException as error:
            functional.abort_peers_with(error, group, functional.device_of(self.running_mean, self.weight, input))
            raise

    def _synced_forward(
        self: Any,
        group: dist.ProcessGroup | None,
        input: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        # The length of a buffer and not num_features, which pruning leaves as it was.
        running_mean, running_var = self.running_mean, self.running_var
        channels = self.num_features if running_mean is None else running_mean.numel()
        checks.check_tensor(input)
        self._check_input_dim(input)
        checks.check_input(input, channels)
        checks.check_mask(input, mask)
        in_replica = warn_under_data_parallel(self)
        if mask is None and (not self.training or in_replica):
            return functional.add_and_rectify(super().forward(input), residual, relu)  # type: ignore[misc]  # of nn.BatchNorm
        running = None
        if self.track_running_stats or not self.training:
            running = functional.running_of(running_mean, running_var, self.num_batches_tracked, self.momentum)
        name = self.sync_name(group)
        return functional.batch_norm_over(
            input,
            self.weight,
            self.bias,
            running,
            training=self.training or running_mean is None,
            eps=self.eps,
            sync=Sync(None, name) if in_replica else Sync(group, name, window=window_of(self)),
            mask=mask,
            residual=residual,
            relu=relu,
        )


class BatchNorm(_BatchNorm):
    """``nn.BatchNorm`` for input of any dimension: a :class:`SyncBatchNorm` without the synchronization."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # checks.check_input does it in training, F.batch_norm in evaluation


class SyncBatchNorm(SyncMixin, BatchNorm):
    """Batch normalization over the batches of all ranks; a drop-in for ``torch.nn.SyncBatchNorm``.

    In training, statistics are those of the concatenated batch of all ranks of ``process_group``; batches may differ
    in size and be empty. In evaluation, without a process group and in a group of one rank it is
    ``nn.BatchNorm``.

    Args:
        num_features: channels, dimension 1 of the input.
        eps: added to the biased variance.
        momentum: weight of the new batch in the running statistics; None for their cumulative average.
        affine: learn a weight and a bias for each channel.
        track_running_stats: keep running mean and variance.
        process_group: a ProcessGroup or 1-D DeviceMesh; None is the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with ``affine``, whether to learn a bias.

    Shapes: input and output (batch, num_features, *spatial), 2-D or more.

    Raises:
        InputError: in a forward whose input cannot be normalized; see ``syncnorm.functional.sync_batch_norm``.

    Collective: a forward in training, by all ranks of the group: one all_gather, and one all_reduce in the
        backward. The constructor communicates nothing.

    Example:
        >>> layer = SyncBatchNorm(16)
        >>> layer(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        options = {"bias": bias} if BATCH_NORM_TAKES_BIAS else {}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **options
        )
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group
        self._sync_name = _built_name(self)  # now: all ranks construct layers in the same order

    def reset_parameters(self) -> None:
        """As ``nn.BatchNorm``'s: weight 1, bias 0, and :meth:`reset_running_stats`."""
        if BATCH_NORM_TAKES_BIAS or self.weight is None or self.bias is not None:
            super().reset_parameters()
        else:  # older versions of torch assume that there is a bias
            self.reset_running_stats()
            nn.init.ones_(self.weight)

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: ProcessGroupLike = None) -> M:
        """:func:`syncnorm.convert` under its name in torch, as a method of the class.

        Layers change in place and keep their class, hooks and attributes, where torch's method builds new ones. A
        layer that is already synced keeps its process group if none is given.

        Args:
            module: any module; a single batch norm, too.
            process_group: ranks that share statistics, a ProcessGroup or 1-D DeviceMesh; None is the default group.

        Returns:
            ``module``.

        Raises:
            InputError: as :func:`syncnorm.convert`.

        Collective: none.

        Source: torch/nn/modules/batchnorm.py.

        Example:
            >>> SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
            Sequential(
              (0): SyncBatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
            )
        """
        # Not at the top: convert changes layers to the classes of this file.
        from syncnorm.conversion.convert import convert

        return convert(module, process_group=process_group)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` that is an ``nn.BatchNorm1d``: input (batch, C) or (batch, C, length)."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` that is an ``nn.BatchNorm2d``: input (batch, C, height, width)."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` that is an ``nn.BatchNorm3d``: input (batch, C, depth, height, width)."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim


def warn_under_data_parallel(module: nn.Module) -> bool:
    """Warns at a layer's first forward inside ``nn.DataParallel``; True in one of its replicas.

    Replicas are threads of one process, which torch.distributed does not distinguish: their collectives would get
    mixed up in a distributed run.
    """
    in_replica = bool(module.__dict__.get("_is_replica", False))
    if torch.compiler.is_compiling() or (not in_replica and module._sync_seen_outside_data_parallel):
        return in_replica
    module.__dict__["_sync_seen_outside_data_parallel"] = True
    if in_replica or _called_by_data_parallel():
        warnings.warn(
            "a syncnorm layer runs inside nn.DataParallel, whose replicas, one per GPU, cannot be synchronized: each "
            "uses the statistics of its own part of the batch. Use DistributedDataParallel, one process per GPU",
            stacklevel=2,
        )
    return in_replica


def _called_by_data_parallel() -> bool:
    # Without several GPUs nn.DataParallel calls the module itself, which only the stack shows. Frames are compared
    # by their code alone: reading their locals would keep these alive, the first batch among them.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.DataParallel.forward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]  # None at the bottom of the stack, where the loop ends
    return False
