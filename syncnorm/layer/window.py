"""Batch norm under gradient accumulation: the statistics of all micro-batches since the last optimizer step (CmBN).

A micro-batch is a rank that came earlier. What the ranks' gather would have brought from it, ``[mean | invstd]`` and
a count, is kept in the layer's window and joins the rows of the present micro-batch in the same merge. Micro-batch t
is thus normalized with mean and variance of the N_t values of micro-batches 1 to t, over all ranks.

Its backward is the usual one, with these statistics and with the number of values of micro-batch t. The statistics
also depend on the weights through the earlier micro-batches, whose graphs are gone: their share of the derivative is
taken to be that of micro-batch t, as if all were alike. With N_t instead of that number, which is the derivative
through micro-batch t alone, a part of the gradient would remain along the shift and the scale of each channel, where
the output does not depend on the weights; norms of weights then grow with every step. Neglected is how these values
move the outputs of later micro-batches, and how later ones would have moved theirs: the last micro-batch of a window
sees the statistics of the whole batch, the first only its own.

The weights do not change within a window, so earlier statistics need no correction. The running statistics are kept
as if the micro-batches so far were one batch: at the end of a window they have been updated once, by all of it.

Source: Bochkovskiy, Wang, Liao, "YOLOv4" (2020), section 3.3 and figure 4: cross mini-batch normalization. Yao et
al., "Cross-Iteration Batch Normalization" (CVPR 2021), pool over optimizer steps as well, and correct earlier
statistics by a Taylor expansion in the weights. Within a window its terms are zero, but their derivatives are those
of the earlier statistics, for which the present ones stand here. They average the statistics of iterations; here
these are merged by their counts, by Chan's formula (``moments.merge``).
"""

import copy
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from syncnorm.layer.moments import Count, Running, count_column, update_running_

ATTRIBUTE = "_sync_window"  # of a synced layer
IN_GRAPH = (
    "a synced layer accumulates statistics over micro-batches, which no graph can hold: compile without fullgraph, "
    "or turn it off by syncnorm.convert(model, accumulate=1)"
)


class ConvertedModel:
    """The model whose layers one ``convert`` has given windows; copied with the model, pickled without it.

    Attributes:
        root: a weak reference to the model; None where it is not known, as after unpickling.
        backwards: how many backwards of its layers have begun.
    """

    def __init__(self, root: nn.Module | None = None):
        self.root = None if root is None else weakref.ref(root)
        self.backwards = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConvertedModel":
        root = None if self.root is None else self.root()
        return ConvertedModel(memo.get(id(root)))  # the copy of the root; None if only a part of it is copied

    def __reduce__(self) -> tuple[Any, ...]:
        return ConvertedModel, ()

    def owns_any(self, parameters: set[int]) -> bool:
        """Whether any of the parameters, given by their ids, is of this model; True if the model is not known."""
        root = None if self.root is None else self.root()
        return root is None or any(id(p) in parameters for p in root.parameters())


class Window:
    """What a layer has gathered since the last optimizer step; a copy or a pickle of it is empty.

    A window ends when an optimizer steps that holds parameters of the layer, at the first call after ``size``
    micro-batches, or by :meth:`end`. A layer may be called several times in a micro-batch. A call begins the next
    one if a backward of the model has begun since the last call, or if the graph of the last call is gone or was
    never built.

    Args:
        size: the largest number of micro-batches.
        model: what has been converted.
    """

    def __init__(self, size: int, model: ConvertedModel):
        self.size, self.model = size, model
        self._layer: weakref.ref[nn.Module] | None = None
        self.end()
        _watch_optimizers()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Window":
        return Window(self.size, copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Window, (self.size, self.model)

    def end(self) -> None:
        """Forgets what was gathered. The running statistics already contain it."""
        self._micro_batches = 0
        self._row: Tensor | None = None  # [mean (C) | invstd (C)] of all micro-batches
        self.count: Count = 0  # of the values in it
        self._graphs: Sequence[weakref.ref[Any]] = ()  # what lives as long as the graph of the last call
        self._backwards = 0  # of the model, at the last call
        self._tracked: dict[str, tuple[Tensor, Tensor]] = {}  # buffers before the window, and as it has updated them
        _open.discard(self)

    def begin(self, mean: Tensor) -> int:
        """The number, from 1, of the micro-batch that a call of the layer now belongs to; may end the window.

        Until :meth:`add` it has no other effect, so that ranks remain in step if one of them fails in between.

        Args:
            mean: (C), of this rank's input. With another number of channels, or on another device, the window ends.
        """
        row = self._row
        if row is not None and (row.numel() != 2 * mean.numel() or row.device != mean.device):
            self.end()
        number = self._next()
        if number > self.size:
            self.end()
            number = 1
        return number

    def _next(self) -> int:
        """The number of the micro-batch of the next call, were the window not limited."""
        same = self.model.backwards == self._backwards and any(graph() is not None for graph in self._graphs)
        return self._micro_batches if same else self._micro_batches + 1

    @property
    def continues(self) -> bool:
        """Whether the running statistics contain micro-batches of the window to which the next call belongs."""
        return bool(self._tracked) and self._next() <= self.size

    def with_earlier(self, rows: Tensor, counts: Sequence[int] | Tensor) -> tuple[Tensor, Sequence[int] | Tensor]:
        """The moments (W, 2C) and counts of all ranks, and behind them those of the earlier micro-batches.

        Counts on a GPU are a tensor (W, 1), which no host waits for.
        """
        if not rows.is_cpu or isinstance(counts, Tensor) or isinstance(self.count, Tensor):
            gathered = counts.unbind(0) if isinstance(counts, Tensor) else counts
            counts = count_column((*gathered, self.count), rows)
        else:
            counts = [*counts, self.count]
        row = torch.ones_like(rows[:1]) if self._row is None else self._row.to(rows.dtype)
        return torch.cat([rows, row]), counts

    def add(self, number: int, mean: Tensor, invstd: Tensor, count: Count, graphs: Sequence[Any]) -> None:
        """Notes what a call has merged.

        Args:
            number: what :meth:`begin` returned.
            mean: (C), of this and all earlier micro-batches, over all ranks.
            invstd: (C), likewise.
            count: values per channel, likewise.
            graphs: objects that live as long as the graph of this call.
        """
        self._micro_batches = number
        self._row, self.count = torch.cat([mean, invstd]).unsqueeze(0), count
        self._graphs = [weakref.ref(graph) for graph in graphs if graph is not None]
        self._backwards = self.model.backwards
        _open.add(self)

    def track(
        self, running: Running, mean: Tensor, var: Tensor, count: Count, moves: bool = True, counts: bool = True
    ) -> None:
        """``moments.update_running_``, in place of what an earlier micro-batch of the window has updated.

        A buffer that something else has changed since, such as ``load_state_dict``, is updated from its new value.
        """
        buffers = {"mean": running.mean, "var": running.var} if moves else {}
        if counts and running.num_batches_tracked is not None:
            buffers["num_batches_tracked"] = running.num_batches_tracked
        for name, buffer in buffers.items():
            if name in self._tracked and self._tracked[name][0].shape == buffer.shape:
                before, after = (v.to(buffer.device) for v in self._tracked[name])
                buffer.copy_(torch.where(buffer == after, before, buffer))
        earlier = {name: buffer.clone() for name, buffer in buffers.items()}
        update_running_(running, mean, var, count, moves, counts)
        self._tracked |= {name: (earlier[name], buffer.clone()) for name, buffer in buffers.items()}

    def belongs_to(self, parameters: set[int], models: dict[ConvertedModel, bool]) -> bool:
        """Whether the window ends when an optimizer with these parameters, given by their ids, steps.

        The layer's own parameters decide; those of the model do if it has none, or if they are frozen.

        Args:
            parameters: of the optimizer.
            models: what is already known of models; updated.
        """
        layer = None if self._layer is None else self._layer()
        trained = [] if layer is None else [p for p in layer.parameters() if p.requires_grad]
        if trained:
            return any(id(p) in parameters for p in trained)
        if self.model not in models:
            models[self.model] = self.model.owns_any(parameters)
        return models[self.model]


_open: "weakref.WeakSet[Window]" = weakref.WeakSet()  # all that have gathered something


def window_of(layer: Any) -> Window | None:
    """The window of a layer whose forward runs; None if it has none."""
    window: Window | None = getattr(layer, ATTRIBUTE, None)
    if window is not None and window._layer is None:
        window._layer = weakref.ref(layer)
    return window


def end_window(model: nn.Module) -> None:
    """Ends the windows of all layers of ``model``: the next micro-batch begins new ones.

    :func:`syncnorm.convert` with ``accumulate`` says when windows end by themselves. Call this where the weights
    change in another way than by a ``torch.optim.Optimizer`` that holds them, as in a functional optimizer.

    Args:
        model: wrapped or not. Layers without a window stay as they are.

    Collective: none, but all ranks must end their windows at the same place; they raise at the next forward
        otherwise.

    Example:
        >>> import syncnorm
        >>> model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(1)), accumulate=4)
        >>> _ = model(torch.tensor([[0.0], [2.0]]))
        >>> end_window(model)
        >>> model(torch.tensor([[4.0], [6.0]])).detach().round().flatten().tolist()
        [-1.0, 1.0]
    """
    for layer in model.modules():
        window: Window | None = getattr(layer, ATTRIBUTE, None)
        if window is not None:
            window.end()


@contextmanager
def without_windows(model: nn.Module) -> Iterator[None]:
    """In the block each call of a layer of ``model`` is by its own statistics; windows stay as they were."""
    windows = {layer: layer.__dict__.pop(ATTRIBUTE) for layer in model.modules() if ATTRIBUTE in layer.__dict__}
    try:
        yield
    finally:
        for layer, window in windows.items():
            layer.__dict__[ATTRIBUTE] = window


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if _open:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        models: dict[ConvertedModel, bool] = {}
        for window in [window for window in _open if window.belongs_to(parameters, models)]:
            window.end()
