"""Activation checkpointing: a forward that is run again in the backward uses what the first run gathered.

Recomputed, a layer must neither gather again (the other ranks may not, or in another order) nor move its running
statistics a second time. What it needs, the statistics of the whole batch, a few numbers a channel, is kept
beside the graph and dies with it. No checkpointing implementation is named here: a first run is known by its
saved-tensor hooks, or by the ``autograd.Function`` in whose forward it is; a second run, by being in a backward.
"""

import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm.process_groups import syncing
from syncnorm.errors import SyncNormError
from syncnorm.layer.moments import Count

# How far a recomputed input may be from the first, in standard deviations: rounding, or the inverse of a
# reversible block, but not another batch.
_SAME = 1e-2


_HELD = "_syncnorm_gathered"  # the attribute of an owner that holds on to records; an empty tuple where it lives on


@dataclass(eq=False)
class ForwardStatistics:
    """The statistics that one forward used, which forward it was, and what it did with them."""

    mean: Tensor
    invstd: Tensor
    count: Count
    group: dist.ProcessGroup | None
    number: int  # of the forward over its group
    var: Tensor | None = None  # biased
    moved: int = 0  # the running statistics in that storage; -1 where none are to move
    counted: bool = True  # the batch
    local: Tensor | None = None  # mean and invstd of this rank's input (2, C)
    local_count: int = 0
    backwards: int = 0  # that had begun before
    recalled: int = 0  # times

    def note(self, moves: int, counts: bool) -> None:
        """Remembers what this forward, the first run, does: what running statistics it moves, whether it counts."""
        _noted.records.append(self)
        meant_to_stay = not syncing()
        self.moved, self.counted = -1 if meant_to_stay else moves, counts or meant_to_stay

    def left_to(self, moves: int, counts: bool) -> tuple[bool, bool]:
        """What of that falls to a second run, which would do this and that: all that no run before it has done.

        Wrappers switch tracking off, set the momentum to zero, or put other buffers in place for one of the two runs;
        for which one is not ours to say.
        """
        left = moves not in (0, self.moved) and self.moved != -1, counts and not self.counted
        self.moved, self.counted = moves if left[0] else self.moved, self.counted or counts
        return left


class _Noted(threading.local):
    """Where forwards of this thread leave their records, for who runs them."""

    def __init__(self) -> None:
        self.records: deque[ForwardStatistics] | list[ForwardStatistics] = deque(maxlen=0)


_kept: "defaultdict[str, list[weakref.ref[ForwardStatistics]]]" = defaultdict(list)
_hooks: "dict[CodeType, weakref.WeakSet[FunctionType]]" = {}  # that hold records, by their code
_backwards = 0  # that have begun
_noted = _Noted()


def backward_begins() -> None:
    """To be called by a layer's backward."""
    global _backwards
    _backwards += 1


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread, so that a forward is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def graph_owners() -> list[Any]:
    """What lives as long as the graphs of the checkpointed owners around; empty outside of one."""
    if torch.compiler.is_compiling():
        return []  # the compiler's own recomputation makes no collective twice
    if not torch.is_grad_enabled():
        return _contexts("forward")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    # Each tensor that a segment saves holds on to the second hook, the one that will recompute it.
    return [hooks[1]] if hooks and isinstance(hooks[1], FunctionType) else []


def remember(
    layer: str, gathered: ForwardStatistics, local: Tensor, local_count: int, owners: list[Any], node: Any
) -> None:
    """Remembers ``gathered``, and for which input, for as long as one of ``owners``, or ``node`` of the graph, lives.

    Hooks that do not recompute may live on, as those that offload activations do. One that comes again after a
    backward is such a hook: it holds nothing any more, and what it held remains with the nodes of graphs still there.
    """
    gathered.local, gathered.local_count, gathered.backwards = local, local_count, _backwards
    for owner in owners:
        held = owner.__dict__.setdefault(_HELD, [])
        if held and isinstance(owner, FunctionType) and held[0].backwards < _backwards:
            held = owner.__dict__[_HELD] = ()
        if isinstance(held, list):
            held.append(gathered)
            if isinstance(owner, FunctionType):
                _hooks.setdefault(owner.__code__, weakref.WeakSet()).add(owner)
    if owners and node is not None:
        node.metadata["syncnorm"] = gathered
    if owners:
        kept = _kept[layer]
        kept.append(weakref.ref(gathered, kept.remove))


@contextmanager
def noting(records: list[ForwardStatistics]) -> Iterator[None]:
    """Adds to ``records`` what forwards in the block keep or recall."""
    before, _noted.records = _noted.records, records
    try:
        yield
    finally:
        _noted.records = before


def known(layer: str) -> bool:
    """Whether a first run of ``layer`` is remembered at all."""
    return bool(_kept[layer])


def lookup(layer: str, local: Tensor, local_count: int, moves: int = 0) -> ForwardStatistics | None:
    """What the first run of ``layer`` with this input gathered; None if there was none.

    Several may be alive, of other owners or batches; the moments of this rank's input tell them apart.

    Args:
        layer: its name.
        local: mean and invstd of this rank's input, (2, C).
        local_count: its values a channel.
        moves: as of :meth:`ForwardStatistics.note`.

    Raises:
        SyncNormError: two first runs had this input on this rank, but other inputs elsewhere.
    """
    alive = [g for g in (ref() for ref in _kept[layer]) if g is not None]
    of_segment = _of_running_segments(hooks=local_count == 0)
    distances = {
        g: _distance(g.local, local)
        for g in [g for g in alive if any(g is other for other in of_segment)] or alive
        if g.local is not None and g.local.shape == local.shape and g.local_count == local_count
    }
    nearest = min(distances.values(), default=_SAME)
    best = [g for g, distance in distances.items() if distance == nearest < _SAME]
    if local_count > 0 and any(not torch.equal(g.mean, best[0].mean) for g in best):
        raise SyncNormError(
            f"cannot tell which of {len(best)} checkpointed forwards of {layer} is computed again: this rank's input "
            f"was the same in each, the other ranks' inputs were not. Run their backwards before the next forward"
        )
    if not best:
        return None
    # One input may come more than once: to other statistics, or, within a segment, in the order of the first run.
    found = min(best, key=lambda g: (g.moved not in (0, -1, moves), g.recalled))
    found.recalled += 1
    _noted.records.append(found)
    return found


def _of_running_segments(hooks: bool) -> list[ForwardStatistics]:
    """Records of the owners that are being computed again: those of functions whose backward runs, and of hooks.

    Hooks are looked for where no input can tell, on a rank without values: by their code, and what they close over.
    """
    found = [g for context in _contexts("backward") for g in context.__dict__.get(_HELD, ())]
    frame = sys._getframe(1) if hooks else None
    while frame is not None:
        for hook in list(_hooks.get(frame.f_code, ())):
            names, cells = hook.__code__.co_freevars, hook.__closure__ or ()
            if all(frame.f_locals.get(n) is cell.cell_contents for n, cell in zip(names, cells, strict=True)):
                found += hook.__dict__.get(_HELD, ())
        frame = frame.f_back
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    (mean_a, invstd_a), (mean_b, invstd_b) = a.nan_to_num(), b.nan_to_num()  # a NaN in the input is no other input
    shift = (mean_a - mean_b).abs() * torch.minimum(invstd_a, invstd_b)
    stretch = (invstd_a - invstd_b).abs() / torch.maximum(invstd_a, invstd_b).clamp(min=1e-30)
    return float(torch.maximum(shift, stretch).max())


def _contexts(method: str) -> list[Any]:
    """The contexts of the autograd Functions whose ``forward`` or ``backward`` is being run, innermost first."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == method and code.co_argcount > 0:
            context = frame.f_locals.get(code.co_varnames[0])  # unless it was deleted
            if isinstance(context, torch.autograd.function.BackwardCFunction):
                found.append(context)
        frame = frame.f_back  # type: ignore[assignment]
    return found
