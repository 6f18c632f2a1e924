"""The communicator over which native collectives run: over NCCL one of the layers' own, otherwise the user's group.

NCCL matches collectives by their order in a communicator. In one of its own a layer's sum that is out of step can
never meet a gradient bucket of DDP, small collectives do not queue behind large ones, and a rank can end a collective
of the layers that will never complete without ending those of the job. It costs memory on the GPU and a connection of
all ranks at the first call of a group.
"""

import os
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm._torch_versions import Backend, PrefixStore, Work, gather_options, sum_options
from syncnorm.comm.connecting import timeout_of
from syncnorm.errors import InputError, known_everywhere

# A collective of some KiB is bound by latency: more thread blocks would only take multiprocessors from convolutions.
_MAX_CTAS = 2
COMMUNICATOR = "SYNCNORM_COMMUNICATOR", ("own", "job")  # "job": that of the user's group


def chosen(name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable; the first one of ``allowed`` if it is not set.

    To be called when the ranks have compared their values, so that all of them raise.

    Raises:
        InputError: none of ``allowed``.
    """
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise known_everywhere(InputError(f"{name} must be {' or '.join(allowed)}, got {value!r}"))
    return value


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend of ``group`` for tensors on ``device``, such as "nccl"."""
    with suppress(RuntimeError):  # none for this device
        return str(group._get_backend(device).name())
    return dist.get_backend(group)


class Communicator:
    """Runs native collectives on the current stream.

    Args:
        group: of the user.
        device: of the tensors.
        attempt: the same on all ranks, and another one each time they connect.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, attempt: str = "") -> None:
        self._group = weakref.ref(group)  # the group must be freed when it is destroyed
        self.backend = backend_of(group, device)
        self._device_type, self._attempt = device.type, attempt
        self._own: Backend | None = None
        self._compared = False  # whether the ranks have compared which one they chose

    @property
    def description(self) -> str:
        """For people."""
        return f"{self.backend}, own communicator" if self._own else self.backend

    def gather(self, rows: Tensor, row: Tensor) -> None:
        """``row`` (n) of each rank into ``rows`` (W * n)."""
        _wait(self._connected()._allgather_base(rows, row, gather_options()))

    def sum_(self, values: Tensor) -> None:
        """Sums ``values`` (n) over the ranks, in place."""
        _wait(self._connected().allreduce([values], sum_options()))

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of the user, which the caller holds a reference to."""
        group = self._group()
        assert group is not None, "the caller holds a reference"
        return group

    def _connected(self) -> Any:
        """What runs collectives, a Backend or a group. The first time the ranks have just compared their choice."""
        if not self._compared:
            own = chosen(*COMMUNICATOR) == "own"
            if self.backend == "nccl" and self.group.size() > 1 and own:
                self._own = _own_nccl(self.group, self._device_type, self._attempt)
            self._compared = True
        return self._own or self.group

    def abort(self) -> None:
        """Ends collectives that wait for a rank that will not come; the job's own communicator is left alone."""
        if self._own is not None:
            with suppress(RuntimeError):
                self._own.abort()


def _wait(work: Work | None) -> None:
    if work is not None:  # for a device this makes the stream wait, not the host
        work.wait()


def _own_nccl(group: dist.ProcessGroup, device_type: str, attempt: str) -> Backend:
    """A backend that is not registered with torch.distributed: dist.new_group needs all ranks of the job.

    Source: ``_new_process_group_helper`` in torch/distributed/distributed_c10d.py.
    """
    name = f"syncnorm/{group.group_name}/{attempt}/nccl"
    nccl: Any = dist.ProcessGroupNCCL  # missing in a torch without CUDA
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_of(group, device_type))
    options.is_high_priority_stream = True
    options.global_ranks_in_group = dist.get_process_group_ranks(group)
    options.group_name = name
    options.config.max_ctas = _MAX_CTAS
    store = PrefixStore(name, dist.distributed_c10d._get_default_store())
    backend: Backend = nccl(store, dist.get_rank(group), group.size(), options)
    backend._set_sequence_number_for_group()
    return backend
