"""Ranks on several hosts: the results of one host, bit for bit, and errors and deaths that reach the others.

The ranks are on one machine, but each opens the files of its own host only (``hosts.on_hosts``).
"""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from failing import errors_of
from hosts import on_hosts
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import syncnorm
from syncnorm import comm
from syncnorm.comm import exchange
from syncnorm.comm.transports import two_level
from syncnorm.testing import RankError, run_ranks
from syncnorm.training import joinable

PAIRS, ODD, UNEVEN = [[0, 1], [2, 3]], [[0, 2], [1]], [[0], [1, 2]]
HOSTS = pytest.mark.parametrize("hosts", [PAIRS, ODD, UNEVEN], ids=str)


def ranks_of(hosts: list[list[int]]) -> int:
    return sum(map(len, hosts))


def connected(hosts: list[list[int]], width: int = 4, **options: object) -> nn.ModuleDict:
    """Two layers over ranks of these hosts."""
    layers = syncnorm.convert(nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(width)}), **options)
    with on_hosts(hosts):
        layers["a"](torch.randn(3, 4))
    sizes = " + ".join(str(len(host)) for host in hosts)
    found = comm.transport_of(layers["a"].process_group)
    assert found == f"auto: shared memory on {len(hosts)} hosts ({sizes} ranks), gloo between them"
    return layers


def _rank_trains(hosts: list[list[int]] | None, transport: str) -> tuple[str, list[Tensor]]:
    """Three steps on uneven parts, the last rank's empty. The frames of the widest layer are larger than a slot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    widths = (8, 300, 9000)
    parts = [part for w in widths for part in (nn.LazyLinear(w), nn.BatchNorm1d(w))]
    net = nn.Sequential(*parts)
    net(torch.randn(4, 5))
    for layer in net[1::2]:
        layer.reset_running_stats()
    net = syncnorm.convert(net, transport=transport)
    rows = [3, 1, 2, 0][-world_size:]
    with nullcontext() if hosts is None else on_hosts(hosts):
        for step in range(3):
            x = torch.randn(sum(rows), 5, generator=torch.Generator().manual_seed(step))
            y = net(x.split(rows)[rank])
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(rank)))
    gradients = [p.grad for p in net.parameters()]
    return comm.transport_of(None), [*gradients, *net.state_dict().values()]


@HOSTS
def test_results_are_those_of_one_host_bit_for_bit(hosts):
    world_size = ranks_of(hosts)
    found = [
        run_ranks(_rank_trains, world_size, arguments, timeout=60)
        for arguments in ((hosts, "auto"), (None, "shm"), (None, "gloo"))
    ]
    for rank in range(world_size):
        (where, tensors), *others = (results[rank] for results in found)
        assert [where.split(" on")[0], *(text for text, _ in others)] == [
            "auto: shared memory",
            f"shm: shared memory, {world_size} ranks of one host",
            f"gloo: gloo, {world_size} ranks",
        ]
        for _, same in others:
            for ours, theirs in zip(tensors, same, strict=True):
                assert torch.equal(ours, theirs)


def _rank_disagrees(hosts: list[list[int]], which: int) -> list[str]:
    layers = connected(hosts)
    x = torch.randn(3, 4)
    return errors_of(lambda: layers["ab"[dist.get_rank() == which]](x), lambda: layers["b"](x))


@HOSTS
@pytest.mark.parametrize("which", [0, 2])
def test_disagreement_is_the_same_error_on_all_hosts(hosts, which):
    for rank, (error, after) in enumerate(run_ranks(_rank_disagrees, ranks_of(hosts), (hosts, which), timeout=30)):
        assert f"rank {rank}: ranks that share statistics called different layers" in error
        for other in range(ranks_of(hosts)):
            assert f"rank {other}: forward of {'ab'[other == which]} (call 2" in error
        assert after == "no error"


def _rank_refuses(hosts: list[list[int]], which: int, times: int) -> list[str]:
    layers = connected(hosts)
    rank = dist.get_rank()
    errors = []
    for number in range(times):
        channels = 5 + number if rank == which else 4
        if rank != which:
            time.sleep(0.05 * rank)  # late and one after the other, so that the rank reports the next error first
        errors += errors_of(lambda: layers["a"](torch.randn(3, channels)))  # noqa: B023
    return errors + errors_of(lambda: layers["a"](torch.randn(3, 4)))


@HOSTS
@pytest.mark.parametrize("which", [0, 1, 2])
def test_errors_of_a_leader_or_of_another_rank_reach_all_hosts_in_order(hosts, which):
    times = 3
    for errors in run_ranks(_rank_refuses, ranks_of(hosts), (hosts, which, times), timeout=30):
        for number in range(times):
            assert f"expected 4 channels in dimension 1, got {5 + number}" in errors[number]
        assert errors[times] == "no error"


def _leader_goes_on_after_an_error(hosts: list[list[int]], which: int) -> tuple[str, float]:
    """A leader refuses its input and does something else for a while; the others come when it has gone on."""
    layers = connected(hosts)
    rank = dist.get_rank()
    if rank == which:
        (error,) = errors_of(lambda: layers["a"](torch.randn(3, 5)))
        time.sleep(4)
        return error, 0.0
    time.sleep(1)
    began = time.monotonic()
    (error,) = errors_of(lambda: layers["a"](torch.randn(3, 4)))
    return error, time.monotonic() - began


@pytest.mark.parametrize(("hosts", "which"), [(PAIRS, 0), (PAIRS, 2), (ODD, 1)])
def test_a_leader_that_went_on_still_sends_the_frames_of_its_host(hosts, which):
    for error, took in run_ranks(_leader_goes_on_after_an_error, ranks_of(hosts), (hosts, which), timeout=30):
        assert "expected 4 channels in dimension 1, got 5" in error
        assert took < 2


class Arrived:
    """Stands for rows, and for a transfer, whose frames are there."""

    def arrived(self, *_: object, **__: object) -> bool:
        return True


class Recorded:
    """Stands for the connections between leaders; records which transfers start."""

    def __init__(self) -> None:
        self.started: list[int] = []

    def start(self, rows: object, number: int, capacity: int) -> tuple[Arrived, memoryview]:
        self.started.append(number)
        return Arrived(), memoryview(b"")

    def finish(self, *_: object) -> None:
        pass


def test_leaders_start_their_transfers_in_order():
    """Whichever thread is the first: gloo matches the transfers of two leaders by their order."""
    leaders = Recorded()
    first = two_level.LeaderTransfer(Arrived(), 1, 64, leaders, None)
    second = two_level.LeaderTransfer(Arrived(), 2, 64, leaders, first)
    assert second.arrived(0.1)
    assert first.arrived(0.1)
    assert leaders.started == [1, 2]


def _rank_dies(hosts: list[list[int]], which: int, folder: str) -> None:
    layers = connected(hosts)
    if dist.get_rank() == which:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    (error,) = errors_of(lambda: layers["a"](torch.randn(3, 4)))
    Path(folder, str(dist.get_rank())).write_text(f"{time.monotonic() - began} {error}")


@pytest.mark.parametrize(("hosts", "which"), [(PAIRS, 0), (PAIRS, 2), (PAIRS, 3), (ODD, 1), (UNEVEN, 2)])
def test_a_killed_leader_or_member_is_noticed_on_all_hosts(hosts, which, tmp_path):
    with pytest.raises(RankError):
        run_ranks(_rank_dies, ranks_of(hosts), (hosts, which, str(tmp_path)), timeout=30)
    for rank in set(range(ranks_of(hosts))) - {which}:
        took, error = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert f"rank {rank}: forward of a (call 2 of the group" in error
        assert f"waiting for ranks [{which}]" in error
        assert float(took) < 5  # the timeout of the group is 90 s


def _rank_joins(hosts: list[list[int]]) -> tuple[Tensor, int]:
    rank = dist.get_rank()
    layer = syncnorm.SyncBatchNorm1d(2, momentum=None)
    batches = [torch.full((2, 2), float(step)) for step in range(1 + rank)]
    with on_hosts(hosts), Join([joinable(layer)]):
        for x in batches:
            layer(x)
    assert "hosts" in comm.transport_of(None)
    return layer.running_mean, int(layer.num_batches_tracked)


@HOSTS
def test_join(hosts):
    steps = ranks_of(hosts)
    for mean, tracked in run_ranks(_rank_joins, steps, (hosts,), timeout=30):
        assert tracked == steps
        torch.testing.assert_close(mean, torch.full((2,), sum(range(steps)) / steps))


def _rank_raises_and_exits(hosts: list[list[int]], which: int) -> tuple[float, list[str]]:
    """One rank refuses its input and runs the exit handler; the others come later, and get the reason."""
    layers = connected(hosts)
    rank = dist.get_rank()
    began = time.monotonic()
    errors = errors_of(lambda: layers["a"](torch.randn(3, 5))) if rank == which else []
    if rank == which:
        exchange._leave_connections_to_the_system()
    took = time.monotonic() - began
    dist.barrier()
    return took, errors or errors_of(lambda: layers["a"](torch.randn(3, 4)))


@pytest.mark.parametrize(("hosts", "which"), [(PAIRS, 0), (PAIRS, 3), (ODD, 1)])
def test_a_rank_that_raised_exits_and_the_others_learn_why(hosts, which):
    for took, errors in run_ranks(_rank_raises_and_exits, ranks_of(hosts), (hosts, which), timeout=40):
        assert took < 5
        assert "expected 4 channels in dimension 1, got 5" in errors[0]
