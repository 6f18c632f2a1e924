"""Which ranks share statistics: resolves, creates and copies process groups, and switches synchronization off."""

import functools
import os
import socket
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from syncnorm._torch_versions import DISTRIBUTED, is_initialized
from syncnorm.errors import InputError, SyncNormError

# What users pass as a process group: a mesh has one dimension, None is the default group.
ProcessGroupLike: TypeAlias = dist.ProcessGroup | DeviceMesh | None

BIND = (
    "syncnorm.convert(model, process_group=...), where torch.distributed.group.WORLD means all ranks, or "
    "syncnorm.convert(model, group_size=...)"
)

_subgroups: dict[int | str, dist.ProcessGroup] = {}  # by size
_no_sync_depth = 0  # open contexts of no_sync_stats
_world_of_one_depth = 0  # open contexts of sync_in_world_of_one


@contextmanager
def no_sync_stats() -> Iterator[None]:
    """A context for forwards in training mode that only some ranks run: it communicates nothing.

    Inside, synced layers normalize with the statistics of this rank's batch and leave the running statistics
    unchanged, so that these stay equal on all ranks. The backward of such a forward is local too. The context applies
    to all threads of the process. ``torch.compile`` compiles code once more for it.

    Forwards inside the context cannot compute running statistics, as ``torch.optim.swa_utils.update_bn`` would:
    resetting those of a synced layer raises a ``SyncNormError``. ``syncnorm.training.recalibrate`` computes them,
    inside the context on one rank alone and outside of it over all ranks.

    Example:
        >>> with no_sync_stats():
        ...     pass  # loss = model(batch) on rank 0 only
    """
    global _no_sync_depth
    _no_sync_depth += 1
    try:
        yield
    finally:
        _no_sync_depth -= 1


def syncing() -> bool:
    """False inside :func:`no_sync_stats`."""
    return _no_sync_depth == 0


@contextmanager
def sync_in_world_of_one() -> Iterator[None]:
    """A context in which a group of one rank communicates with itself instead of calling ``F.batch_norm``.

    For benchmarks and tests, which can then show every kernel and collective of a synced step on one device. It
    applies to all threads of the process.
    """
    global _world_of_one_depth
    _world_of_one_depth += 1
    try:
        yield
    finally:
        _world_of_one_depth -= 1


def resolve(group: ProcessGroupLike) -> dist.ProcessGroup | None:
    """A ProcessGroup from what users pass as one: a ProcessGroup, a 1-D DeviceMesh, or None.

    Raises:
        InputError: a mesh of several dimensions, or an object of another type.
    """
    # A rank that is not in its group gets its error at the first forward.
    if group is None or _is_non_member(group) or isinstance(group, dist.ProcessGroup):
        return group  # type: ignore[return-value]  # torch gives an int for a group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise InputError(
                f"process_group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; "
                f"pass a mesh of one dimension, for example mesh['dp']"
            )
        return group.get_group()
    raise InputError(f"process_group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}")


def check_not_inherited(group: dist.ProcessGroup) -> None:
    """Checks that this process was not forked from a rank of ``group``: it lacks the threads of its connections.

    Raises:
        SyncNormError: it was.
    """
    if _inherited and group in _inherited:
        raise SyncNormError(
            f"rank {dist.get_rank()}: process {os.getpid()} was forked from a rank after "
            f"torch.distributed.init_process_group. It is not a rank itself and cannot synchronize. Fork before "
            f"init_process_group, start the process by spawn, or run this forward under "
            f"`with syncnorm.no_sync_stats():`"
        )


def _after_fork() -> None:
    if is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)


_inherited: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def synced_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to synchronize over, or None if there is no other rank to synchronize with.

    Args:
        group: a ProcessGroup; None means the default group, if ``torch.distributed`` is initialized.

    Raises:
        InputError: this rank is not a member of ``group``.
        SyncNormError: ``group`` was destroyed, this process was forked from one of its ranks, or ``torch.jit.trace``
            is running.

    Warns:
        UserWarning: once per process, if a launcher set ``WORLD_SIZE`` above 1 and there is no process group.
    """
    if not syncing():
        return None
    world = dist.group.WORLD if DISTRIBUTED else None
    if world is None:  # torch.distributed is not initialized
        if not torch.compiler.is_compiling():
            _warn_under_a_launcher()
        return None
    if group is None:
        group = world
    elif _is_non_member(group):
        raise InputError(
            f"rank {dist.get_rank()} is not a member of the process group that this layer synchronizes over. "
            f"Give each rank a group that contains it, as syncnorm.convert(model, group_size=...) does."
        )
    if group is not world and not alive(group):
        raise SyncNormError(
            f"rank {dist.get_rank()}: the process group of this layer was destroyed. Bind it to another group: {BIND}"
        )
    check_not_inherited(group)
    if group.size() == 1 and not _world_of_one_depth:
        return None
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch leaves it untyped
        raise SyncNormError(
            f"rank {dist.get_rank()}: torch.jit.trace (or an export that uses it) runs a synced layer in training "
            f"mode, where it would communicate with other ranks. Trace model.eval(), or trace on this rank alone "
            f"under `with syncnorm.no_sync_stats():`"
        )
    return group


@functools.cache  # once per process
def _warn_under_a_launcher() -> None:
    """Warns if a launcher started several ranks but torch.distributed was not initialized."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdecimal() and int(world_size) > 1:
        warnings.warn(
            f"WORLD_SIZE={world_size}, but there is no process group: the synced layers of this rank train alone, "
            f"with local statistics. Call torch.distributed.init_process_group before the first forward",
            stacklevel=4,
        )


def subgroup(size: int | Literal["node"]) -> dist.ProcessGroup:
    """This rank's group of ``size`` consecutive ranks, or of the ranks on its machine for ``"node"``.

    Groups are created once; later calls with the same size reuse them.

    Collective: all ranks of the default group must call, with the same size.

    Raises:
        InputError: ``size`` does not divide the number of ranks.
        SyncNormError: ``torch.distributed`` is not initialized.
    """
    if not is_initialized():
        raise SyncNormError(
            f"group_size={size!r} creates process groups: call torch.distributed.init_process_group first"
        )
    world = dist.get_world_size()
    if size != "node" and (not isinstance(size, int) or isinstance(size, bool) or size < 1 or world % size):
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise InputError(f"group_size={size!r} does not divide the {world} ranks; use one of {fitting}")
    if size not in _subgroups or not alive(_subgroups[size]):
        partition = _nodes() if size == "node" else [list(range(r, r + size)) for r in range(0, world, size)]
        # Every rank creates every group, also those that it is not in, in the same order.
        _subgroups[size], _ = dist.new_subgroups_by_enumeration(partition)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return _subgroups[size]


def _nodes() -> list[list[int]]:
    """The ranks of each machine. torchrun's GROUP_RANK distinguishes nodes that share a host name."""
    here = (os.environ.get("GROUP_RANK"), socket.gethostname())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return [[r for r, node in enumerate(everywhere) if node == key] for key in dict.fromkeys(everywhere)]


def _is_non_member(group: object) -> bool:
    """Whether ``group`` is what torch returns for a new group on a rank outside of it."""
    return DISTRIBUTED and bool(group == dist.GroupMember.NON_GROUP_MEMBER)


def alive(group: dist.ProcessGroup) -> bool:
    """Whether ``group`` exists: it does not if its default group was destroyed."""
    if not torch.compiler.is_compiling():
        return group in dist.distributed_c10d._world.pg_group_ranks  # without a list of its ranks
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


class GroupHandle:
    """Holds the process group of a layer, because a ProcessGroup itself can be neither deepcopied nor pickled.

    A copy shares the group. One that was loaded from a pickle knows only that there was a group, and raises an error
    when it is used.
    """

    def __init__(self, group: dist.ProcessGroup | None, lost: str | None = None):
        self._group = group
        self._lost = lost

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group; None is the default group.

        Raises:
            SyncNormError: it was lost in a pickle.
        """
        if self._lost is not None:
            raise SyncNormError(
                f"this layer was saved with a process group ({self._lost}), which cannot be pickled. "
                f"Bind it again before training: {BIND}. To train in a single process, call syncnorm.revert(model)"
            )
        return self._group

    def peek(self) -> dist.ProcessGroup | None:
        """The group; None if it is the default group or was lost."""
        return self._group

    def describe(self) -> str:
        """A short description for a table."""
        if self._lost is not None:
            return f"lost ({self._lost})"
        if self._group is None:
            return "default" if is_initialized() else "no process group yet"
        if _is_non_member(self._group):
            return "not a member"
        return f"ranks {dist.get_process_group_ranks(self._group)}" if alive(self._group) else "destroyed"

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHandle":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._lost is None and self._group is None:
            return GroupHandle, (None,)
        return GroupHandle, (None, self._lost or self.describe())
