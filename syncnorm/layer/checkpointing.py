"""Activation checkpointing: a forward that is recomputed in the backward uses the statistics of its first run.

A recomputed layer must not gather again, since the other ranks may not recompute it, or in another order, and must
not update its running statistics a second time. The statistics of the global batch, a few numbers per channel, are
therefore kept for as long as the graph of the first run lives. No implementation of checkpointing is named here: a
first run is recognized by its saved-tensor hooks or by the ``autograd.Function`` in whose forward it happens, and a
recomputation by the backward in which it happens.
"""

import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from syncnorm._torch_versions import top_saved_tensors_hooks
from syncnorm.comm.process_groups import syncing
from syncnorm.errors import SyncNormError
from syncnorm.layer.arguments import ForwardCall
from syncnorm.layer.moments import Count, Running, update_running_

UNKNOWN = -1  # a local count that only the device knows

# The largest distance of a recomputed input from the first one, in standard deviations: more than rounding, or the
# inverse of a reversible block, leaves, and less than two batches differ by.
_SAME_INPUT_STD = 1e-2

# Attribute of a graph owner: its records, or an empty tuple if the owner outlives its graph.
_HELD = "_syncnorm_gathered"


@dataclass(eq=False)
class ForwardStatistics:
    """The statistics that one forward used, and what it did with them.

    Attributes:
        mean: (C), of the global batch.
        invstd: (C).
        var: (C), biased.
        count: values per channel in the above, with those of earlier micro-batches in a window.
        call: the forward.
        moved: the storage of the running statistics that it updated; 0 for none, -1 if none may be updated.
        counted: whether ``num_batches_tracked`` includes this batch.
        fingerprint: mean and invstd of this rank's input, (2, C); None outside of checkpointing.
        local_count: values per channel of this rank's input; ``UNKNOWN`` if only the device knows.
        backwards: how many backwards had begun before it.
        lookups: how often a recomputation has used it.
    """

    mean: Tensor
    invstd: Tensor
    var: Tensor | None
    count: Count
    call: ForwardCall
    moved: int = 0
    counted: bool = True
    fingerprint: Tensor | None = None
    local_count: int = 0
    backwards: int = 0
    lookups: int = 0

    def note(self, moves: int, counts: bool) -> None:
        """Notes what the first run updates: its running statistics, by their storage, and the count of batches."""
        _recorder.records.append(self)
        frozen = not syncing()
        self.moved, self.counted = -1 if frozen else moves, counts or frozen

    def left_to(self, moves: int, counts: bool) -> tuple[bool, bool]:
        """What a recomputation with these arguments still has to update: what no run before it has.

        Wrappers turn tracking off, set momentum to zero, or swap buffers in one of the two runs, and may choose
        either run for that.
        """
        left = moves not in (0, self.moved) and self.moved != -1, counts and not self.counted
        self.moved, self.counted = moves if left[0] else self.moved, self.counted or counts
        return left

    def complete(self, running: Running | None, moves: int, counts: bool) -> bool:
        """Updates ``running`` as far as no run before this recomputation has; whether a caller is to move its own."""
        moves_left, counts_left = self.left_to(moves, counts)
        if running is not None and self.var is not None:
            update_ = update_running_ if self.call.window is None else self.call.window.track
            update_(running, self.mean, self.var, self.count, moves_left, counts_left)
        return moves_left

    def used_again(self) -> "ForwardStatistics":
        """Notes that a recomputation uses the record."""
        self.lookups += 1
        _recorder.records.append(self)
        return self


class _Recorder(threading.local):
    """Where this thread's forwards append their records for `recording`."""

    def __init__(self) -> None:
        self.records: deque[ForwardStatistics] | list[ForwardStatistics] = deque(maxlen=0)


_remembered: "defaultdict[str, list[weakref.ref[ForwardStatistics]]]" = defaultdict(list)  # by layer name
_hooks: "dict[CodeType, weakref.WeakSet[FunctionType]]" = {}  # graph owners that are hooks, by their code
_backwards = 0  # that have begun
_recorder = _Recorder()


def updates_of(running: Running | None) -> tuple[int, bool]:
    """What a forward with these running statistics updates, as :meth:`ForwardStatistics.note` takes it."""
    if running is None:
        return 0, False
    moves = running.mean.untyped_storage()._cdata if running.momentum != 0 else 0
    return moves, running.num_batches_tracked is not None


def backward_begins() -> None:
    """Counts a backward; every backward of a layer calls it."""
    global _backwards
    _backwards += 1


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread, so that a forward is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def graph_owners() -> list[Any]:
    """The objects that live as long as the graphs of the enclosing checkpointed segments; empty outside of one."""
    if torch.compiler.is_compiling():
        return []  # the compiler's own recomputation repeats no collective
    if not torch.is_grad_enabled():
        return _contexts("forward")
    hooks = top_saved_tensors_hooks()
    # Each tensor that a segment saves holds a reference to the second hook, which will recompute the segment.
    return [hooks[1]] if hooks and isinstance(hooks[1], FunctionType) else []


def remember(
    record: ForwardStatistics, fingerprint: Tensor, local_count: int, owners: Sequence[Any], node: Any
) -> None:
    """Keeps ``record`` for recomputations of this input, for as long as one of ``owners`` or ``node`` lives.

    Hooks that do not recompute, such as those that offload activations, may outlive their graphs. A hook that is
    still in use after a backward is one of them: it no longer holds records, and the nodes of living graphs do.
    """
    record.fingerprint, record.local_count, record.backwards = fingerprint, local_count, _backwards
    for owner in owners:
        held = owner.__dict__.setdefault(_HELD, [])
        if held and isinstance(owner, FunctionType) and held[0].backwards < _backwards:
            held = owner.__dict__[_HELD] = ()
        if isinstance(held, list):
            held.append(record)
            if isinstance(owner, FunctionType):
                _hooks.setdefault(owner.__code__, weakref.WeakSet()).add(owner)
    if node is not None:
        node.metadata["syncnorm"] = record
    alive = _remembered[record.call.layer_name]
    alive.append(weakref.ref(record, alive.remove))


@contextmanager
def recording(records: list[ForwardStatistics]) -> Iterator[None]:
    """Appends to ``records`` the record of each forward in the block, recomputed or not."""
    before, _recorder.records = _recorder.records, records
    try:
        yield
    finally:
        _recorder.records = before


def is_recording() -> bool:
    """Whether a forward in this thread has to leave a record in any case."""
    return isinstance(_recorder.records, list)


def known(layer_name: str) -> bool:
    """Whether any first run of the layer is remembered."""
    return bool(_remembered[layer_name])


def recomputes_in_step(layer_name: str) -> bool:
    """Whether this is a recomputation, and the layer's first runs were those of micro-batches that ran in step."""
    return in_backward() and any(
        record and record.call.in_step for record in (ref() for ref in _remembered[layer_name])
    )


def only_candidate(layer_name: str, channels: int, local_count: int) -> ForwardStatistics | None:
    """The record of the layer's first run in the segment that is being recomputed, if the segment has only one.

    Unlike :func:`lookup` it compares no values, for which the host would have to wait for a GPU. A segment that does
    not repeat its first run gets the statistics of that run, with no collective that the other ranks may not make.

    Args:
        layer_name: of the layer.
        channels: of the input.
        local_count: its values per channel on this rank, or ``UNKNOWN``.
    """
    candidates = {
        id(record): record
        for record in _of_recomputed_segments(hooks=True)
        if record.call.layer_name == layer_name
        and record.mean.numel() == channels
        and record.local_count == local_count
    }
    return next(iter(candidates.values())).used_again() if len(candidates) == 1 else None


def lookup(layer_name: str, fingerprint: Tensor, local_count: int, moves: int = 0) -> ForwardStatistics | None:
    """The record of the layer's first run with this input, or None.

    Records of several segments or batches may be alive; the moments of this rank's input distinguish them.

    Args:
        layer_name: of the layer.
        fingerprint: mean and invstd of this rank's input, (2, C).
        local_count: its values per channel, or ``UNKNOWN``.
        moves: as of :meth:`ForwardStatistics.note`.

    Raises:
        SyncNormError: two first runs had this input on this rank, but different inputs on other ranks.
    """
    alive = [record for record in (ref() for ref in _remembered[layer_name]) if record is not None]
    recomputed = _of_recomputed_segments(hooks=local_count <= 0)
    distances = {
        record: _distance(record.fingerprint, fingerprint)
        for record in [r for r in alive if any(r is other for other in recomputed)] or alive
        if record.fingerprint is not None
        and record.fingerprint.shape == fingerprint.shape
        and record.local_count == local_count
    }
    nearest = min(distances.values(), default=_SAME_INPUT_STD)
    best = [record for record, distance in distances.items() if distance == nearest < _SAME_INPUT_STD]
    if local_count > 0 and any(not torch.equal(record.mean, best[0].mean) for record in best):
        raise SyncNormError(
            f"cannot tell which of {len(best)} checkpointed forwards of {layer_name} is recomputed: this rank's "
            f"input was the same in each of them, the other ranks' inputs were not. Run their backwards before the "
            f"next forward"
        )
    if not best:
        return None
    # The same input may come more than once: with other running statistics, or repeatedly within a segment, which
    # recomputes its forwards in their first order.
    return min(best, key=lambda record: (record.moved not in (0, -1, moves), record.lookups)).used_again()


def _of_recomputed_segments(hooks: bool) -> list[ForwardStatistics]:
    """Records held by the segments that are being recomputed.

    Functions are recognized by their context, whose backward runs. Hooks are recognized by their code and closure;
    that is slower, and needed only where the input's values do not distinguish segments: on a rank without values, or
    if the host does not read them.
    """
    found = [record for context in _contexts("backward") for record in context.__dict__.get(_HELD, ())]
    frame = sys._getframe(1) if hooks else None
    while frame is not None:
        for hook in list(_hooks.get(frame.f_code, ())):
            names, cells = hook.__code__.co_freevars, hook.__closure__ or ()
            if all(frame.f_locals.get(n) is cell.cell_contents for n, cell in zip(names, cells, strict=True)):
                found += hook.__dict__.get(_HELD, ())
        frame = frame.f_back
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    (mean_a, invstd_a), (mean_b, invstd_b) = a.nan_to_num(), b.nan_to_num()  # NaN in both inputs is no difference
    shift = (mean_a - mean_b).abs() * torch.minimum(invstd_a, invstd_b)
    stretch = (invstd_a - invstd_b).abs() / torch.maximum(invstd_a, invstd_b).clamp(min=1e-30)
    return float(torch.maximum(shift, stretch).max())


def _contexts(method: str) -> list[Any]:
    """The contexts of the autograd Functions whose ``forward`` or ``backward`` is running, innermost first."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == method and code.co_argcount > 0:
            context = frame.f_locals.get(code.co_varnames[0])  # None if the function has deleted it
            if isinstance(context, torch.autograd.function.BackwardCFunction):
                found.append(context)
        frame = frame.f_back  # type: ignore[assignment]  # None at the bottom of the stack, where the loop ends
    return found
