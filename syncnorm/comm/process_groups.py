"""Which ranks share statistics: resolving, creating and carrying process groups."""

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

from syncnorm.errors import InputError, SyncNormError

# What users pass as a process group: a mesh has one dimension, None is the default group.
ProcessGroupLike: TypeAlias = dist.ProcessGroup | DeviceMesh | None

BIND = (
    "syncnorm.convert(model, process_group=...), where torch.distributed.group.WORLD is all ranks, or "
    "syncnorm.convert(model, group_size=...)"
)

_made: dict[int | str, dist.ProcessGroup] = {}
_unsynced = 0  # contexts of no_sync_stats that are open
_alone = 0  # contexts of sync_in_world_of_one that are open


@contextmanager
def no_sync_stats() -> Iterator[None]:
    """For a training-mode forward that only some ranks make: it communicates nothing.

    Inside, synced layers normalise with the statistics of this rank's batch and leave the running statistics as
    they are, so that they stay equal on all ranks. The backward of such a forward is local too. For all threads
    of the process. Code of ``torch.compile`` is compiled once more for it.

    Running statistics cannot be made here by forwards, as ``torch.optim.swa_utils.update_bn`` would: resetting those
    of a synced layer raises a ``SyncNormError``. ``syncnorm.training.recalibrate`` computes them, here on one rank
    alone or, outside of this context, over all ranks.

    Example:
        >>> with no_sync_stats():
        ...     pass  # losses = model(batch), on rank 0 alone
    """
    global _unsynced
    _unsynced += 1
    try:
        yield
    finally:
        _unsynced -= 1


def syncing() -> bool:
    """False inside :func:`no_sync_stats`."""
    return _unsynced == 0


@contextmanager
def sync_in_world_of_one() -> Iterator[None]:
    """Inside, a group of one rank communicates with itself, where it would be ``F.batch_norm``.

    For benchmarks and tests, to which one card then shows every kernel and collective of a synced step. For all
    threads of the process.
    """
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def resolve(group: ProcessGroupLike) -> dist.ProcessGroup | None:
    """A ProcessGroup from what users pass as one: a ProcessGroup, a 1-D DeviceMesh, or None.

    Raises:
        InputError: a mesh of more dimensions, or something else altogether.
    """
    # torch hands ranks outside a new group this sentinel in its place; it is judged at the first forward.
    if group is None or group == dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup):
        return group  # type: ignore[return-value]  # the sentinel has the type object
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise InputError(
                f"process_group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; "
                f"pass one of them, for example mesh['dp']"
            )
        return group.get_group()
    raise InputError(f"process_group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}")


def check_not_inherited(group: dist.ProcessGroup) -> None:
    """Refuses a group in a process that was forked from one of its ranks, whose connections' threads it lacks.

    Raises:
        SyncNormError: with what to do.
    """
    if _inherited and group in _inherited:
        raise SyncNormError(
            f"rank {dist.get_rank()}: process {os.getpid()} was forked from a rank after "
            f"torch.distributed.init_process_group, so it is no rank itself and cannot synchronize: fork before, "
            f"start it by spawn, or put this forward under `with syncnorm.no_sync_stats():`"
        )


def _after_fork() -> None:
    if dist.is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)


_inherited: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def synced_group(group: Any) -> dist.ProcessGroup | None:
    """The group to synchronise over, or None where there is nobody to synchronise with.

    Args:
        group: a ProcessGroup; None means the default group, if ``torch.distributed`` is initialised.

    Raises:
        InputError: this rank is not a member of ``group``.
        SyncNormError: ``group`` was destroyed, or this process was forked from one of its ranks.

    Warns:
        UserWarning: once a process, where a launcher's ``WORLD_SIZE`` is above 1 and there is no process group.
    """
    if not syncing():
        return None
    if not dist.is_initialized():
        if not torch.compiler.is_compiling():
            _warn_under_a_launcher()
        return None
    if group is None:
        group = dist.group.WORLD
    if group != dist.GroupMember.NON_GROUP_MEMBER and not alive(group):
        raise SyncNormError(
            f"rank {dist.get_rank()}: the process group of this layer was destroyed. Bind it to another: {BIND}"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(
            f"rank {dist.get_rank()} is not a member of the process group that this layer synchronises over. "
            f"Give each rank a group that holds it: syncnorm.convert(model, group_size=...) does."
        )
    check_not_inherited(group)
    return group if group.size() > 1 or _alone else None


@functools.cache  # once a process
def _warn_under_a_launcher() -> None:
    """Warns where a launcher started several ranks, of which torch.distributed has not been told."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdecimal() and int(world_size) > 1:
        warnings.warn(
            f"WORLD_SIZE={world_size}, but there is no process group: synced layers of this rank train alone, with "
            f"its local statistics. Call torch.distributed.init_process_group before the first forward",
            stacklevel=4,
        )


def subgroup(size: int | Literal["node"]) -> dist.ProcessGroup:
    """This rank's group of ``size`` consecutive ranks, or of the ranks on its machine for ``"node"``.

    Groups are created once and reused by later calls with the same size.

    Collective: all ranks of the default group must call, with the same size.

    Raises:
        InputError: a size that does not divide the world.
        SyncNormError: ``torch.distributed`` is not initialised.
    """
    if not dist.is_initialized():
        raise SyncNormError(
            f"group_size={size!r} creates process groups: call torch.distributed.init_process_group first"
        )
    world = dist.get_world_size()
    if size != "node" and (not isinstance(size, int) or isinstance(size, bool) or size < 1 or world % size):
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise InputError(f"group_size={size!r} does not divide the {world} ranks; use one of {fitting}")
    if size not in _made or not alive(_made[size]):
        partition = _nodes() if size == "node" else [list(range(r, r + size)) for r in range(0, world, size)]
        # Every rank creates every group, in the same order, also those that it is not in.
        mine, _ = dist.new_subgroups_by_enumeration(partition)  # type: ignore[no-untyped-call]
        _made[size] = mine
    return _made[size]


def _nodes() -> list[list[int]]:
    """Ranks by machine. torchrun's GROUP_RANK tells nodes apart that share a host name."""
    here = (os.environ.get("GROUP_RANK"), socket.gethostname())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return [[r for r, node in enumerate(everywhere) if node == key] for key in dict.fromkeys(everywhere)]


def alive(group: dist.ProcessGroup) -> bool:
    """False for a group of a default group that was destroyed since."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


class GroupHandle:
    """Carries a layer's process group through deepcopy and pickle, which a ProcessGroup itself does not survive.

    A copy shares the group. A loaded pickle knows only that there was one, and refuses to hand it out.
    """

    def __init__(self, group: dist.ProcessGroup | None, lost: str | None = None):
        self._group = group
        self._lost = lost

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group.

        Raises:
            SyncNormError: it was lost in a pickle.
        """
        if self._lost is not None:
            raise SyncNormError(
                f"this layer was saved with a process group ({self._lost}), which a file cannot hold. Bind it "
                f"again before training: {BIND}; for training in one process, syncnorm.revert(model)"
            )
        return self._group

    def peek(self) -> dist.ProcessGroup | None:
        """The group, or None if there is none or it was lost."""
        return self._group

    def describe(self) -> str:
        """A few words for a table."""
        if self._lost is not None:
            return f"lost ({self._lost})"
        if self._group is None:
            return "default" if dist.is_initialized() else "no process group yet"
        if self._group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            return "not a member"
        return f"ranks {dist.get_process_group_ranks(self._group)}" if alive(self._group) else "destroyed"

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHandle":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._lost is None and self._group is None:
            return GroupHandle, (None,)
        return GroupHandle, (None, self._lost or self.describe())
