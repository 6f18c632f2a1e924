"""Frames in shared memory: never torn, in order, and what a rank does that waits for one that does not come."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from failing import errors_of
from torch import Tensor, nn

import syncnorm
from syncnorm import comm
from syncnorm.comm.transports import SLOTS, discovery
from syncnorm.comm.transports.gloo import GlooTransport
from syncnorm.comm.transports.shared_memory import Rows, bytes_for
from syncnorm.errors import InputError
from syncnorm.testing import RankError, assert_close, run_ranks

FRAMES, FRAME_BYTES = 4000, 8192


def shared_rows() -> Rows:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts = discovery.find_hosts(dist.group.WORLD, rank, world_size, bytes_for(world_size))
    assert hosts.memory is not None, hosts.reason
    return Rows(hosts.memory, world_size, rank, hosts.rows[0], timeout_s=20)


def _rank_exchanges_numbered_frames(count_first: bool) -> list[int]:
    """Each frame is filled with its number, in four pieces with pauses. Returns the numbers of the mixed ones."""
    rows, rank = shared_rows(), dist.get_rank()
    rng = random.Random(rank)
    mixed = []
    for number in range(1, FRAMES + 1):
        frame, filled = rows.frame(rank, number, FRAME_BYTES), bytes([number % 251])
        if count_first:
            rows.publish(rank, number)
        for start in range(0, FRAME_BYTES, FRAME_BYTES // 4):
            frame[start : start + FRAME_BYTES // 4] = filled * (FRAME_BYTES // 4)
            if rng.random() < 0.01:
                time.sleep(rng.random() * 0.001)
        if not count_first:
            rows.publish(rank, number)
        assert rows.arrived(number, time.monotonic(), 10)
        if bytes(rows.frame(1 - rank, number, FRAME_BYTES)) != filled * FRAME_BYTES:
            mixed.append(number)
    return mixed


def test_no_frame_is_torn():
    assert run_ranks(_rank_exchanges_numbered_frames, args=(False,)) == [[], []]


def test_the_test_above_sees_torn_frames():
    """It would, if a frame were counted before it is complete."""
    assert any(run_ranks(_rank_exchanges_numbered_frames, args=(True,)))


def _rank_0_writes_slowly() -> int:
    """Polls before the frame was there."""
    rows, rank = shared_rows(), dist.get_rank()
    dist.barrier()
    began = time.monotonic()
    if rank == 0:
        frame = rows.frame(0, 1, 64)
        for start in range(0, 64, 16):
            time.sleep(0.1)
            frame[start : start + 16] = bytes(range(16))
    rows.publish(rank, 1)
    polls = 0
    while not rows.arrived(1, began, 0.05):
        polls += 1
        assert time.monotonic() - began < 10
    assert bytes(rows.frame(0, 1, 64)) == bytes(range(16)) * 4
    return polls


def test_a_frame_is_seen_only_when_it_is_complete():
    _, polls = run_ranks(_rank_0_writes_slowly)
    assert polls > 0


def connected_layer(**options: object) -> nn.Module:
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4, momentum=1.0)), **options)
    layer(torch.randn(3, 4))
    assert "shared memory" in comm.transport_of(layer[0].process_group)
    return layer


def _rank_1_is_killed(folder: str) -> None:
    layer = connected_layer()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        Path(folder, "killed").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    (error,) = errors_of(lambda: layer(torch.randn(3, 4)))
    Path(folder, f"raised{dist.get_rank()}").write_text(f"{time.monotonic()} {error}")


def test_a_killed_rank_is_noticed_at_once_and_named(tmp_path):
    with pytest.raises(RankError):
        run_ranks(_rank_1_is_killed, 3, (str(tmp_path),), timeout=30)
    killed = float((tmp_path / "killed").read_text())
    for rank in (0, 2):
        raised, error = (tmp_path / f"raised{rank}").read_text().split(" ", 1)
        assert "while waiting for ranks [1]" in error
        assert float(raised) - killed < 2  # 0.6 s of it for the reports of other ranks; the group's timeout is 90 s


def _rank_1_is_stopped() -> tuple[float, float, Tensor]:
    layer = connected_layer()
    rank = dist.get_rank()
    if rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    # Of the thread that waits: a kept rank may have threads of earlier calls.
    began, cpu_began = time.monotonic(), time.thread_time()
    layer(torch.full((2, 4), float(rank)))
    return time.monotonic() - began, time.thread_time() - cpu_began, layer[0].running_mean


def test_a_stopped_rank_is_waited_for_without_work():
    (waited, worked, mean), (*_, same) = run_ranks(_rank_1_is_stopped, timeout=30)
    assert waited > 2.5
    assert worked < 0.05 * waited  # of a core
    for value in (mean, same):
        assert_close(value, torch.full((4,), 0.5, dtype=torch.float64), torch.float32)


def _rank_1_never_comes() -> tuple[list[str], float]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    layer = connected_layer(process_group=group)
    began = time.monotonic()
    errors = errors_of(lambda: layer(torch.randn(3, 4))) if dist.get_rank() == 0 else []
    took = time.monotonic() - began
    dist.barrier()
    return errors, took


def test_a_rank_that_never_comes_is_an_error_after_the_groups_timeout():
    ((error,), took), _ = run_ranks(_rank_1_never_comes, timeout=30)
    assert "while waiting for ranks [1]" in error
    assert "no frame from ranks [1] of the group within 2 s" in error
    assert 2 < took < 6


class Wide(nn.Module):
    """The frames of the second layer are larger than a slot of shared memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.BatchNorm1d(8), nn.BatchNorm1d(20_000)
        self.between, self.last = nn.Linear(8, 20_000), nn.Linear(20_000, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.between(self.first(x))))


BATCHES = [torch.randn(9, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)]
COTANGENTS = [torch.randn(9, 3, generator=torch.Generator().manual_seed(9 + step)) for step in range(3)]
SPLIT = (5, 4)


def calls_of(cls: type, name: str) -> "mock._patch[Callable[..., object]]":
    return mock.patch.object(cls, name, autospec=True, side_effect=getattr(cls, name))


def _rank_trains_a_wide_model() -> tuple[dict[str, Tensor], list[Tensor], int, int]:
    rank = dist.get_rank()
    net = syncnorm.convert(Wide())
    with calls_of(GlooTransport, "send") as over_gloo, calls_of(Rows, "swap") as in_memory:
        for x, dy in zip(BATCHES, COTANGENTS, strict=True):
            net(x.split(SPLIT)[rank]).backward(dy.split(SPLIT)[rank])
    buffers = {name: value for name, value in net.state_dict().items() if "running" in name}
    return buffers, [net.second.weight.grad, net.first.weight.grad], over_gloo.call_count, in_memory.call_count


def test_frames_larger_than_a_slot_travel_over_gloo():
    whole = Wide().double()
    for x, dy in zip(BATCHES, COTANGENTS, strict=True):
        whole(x.double()).backward(dy.double())
    results = run_ranks(_rank_trains_a_wide_model, timeout=60)
    for buffers, _, over_gloo, in_memory in results:
        assert over_gloo >= 6  # the wide layer's forward and backward in three steps
        assert in_memory >= 4  # of the narrow layer's six, without the first, which connects
        for name, value in buffers.items():
            assert_close(value, whole.state_dict()[name], torch.float32)
    for index, layer in enumerate((whole.second, whole.first)):
        total = sum(gradients[index] for _, gradients, *_ in results)
        assert_close(total, layer.weight.grad, torch.float32)


def _a_large_or_a_small_frame_may_follow(on_rank_1: int) -> list[str]:
    """A wide layer followed the narrow one; now a narrow one does. Below 0, rank 1 calls the wide one."""
    narrow, wide = (syncnorm.convert(nn.BatchNorm1d(channels)) for channels in (4, 20_000))
    for _ in range(2):
        narrow(torch.randn(3, 4))
        wide(torch.randn(3, 20_000))
    narrow(torch.randn(3, 4))
    if dist.get_rank() and on_rank_1 < 0:
        return errors_of(lambda: wide(torch.randn(3, 20_000)))
    return errors_of(lambda: narrow(torch.randn(on_rank_1 if dist.get_rank() else 3, 4)))


@pytest.mark.parametrize("values", [0, 3], ids=["empty", "usual"])
def test_a_small_frame_in_place_of_a_large_one_takes_the_same_way_on_all_ranks(values):
    results = run_ranks(_a_large_or_a_small_frame_may_follow, args=(values,), timeout=30)
    assert results == [["no error"]] * 2


def test_ranks_that_disagree_about_a_small_and_a_large_frame_name_both_calls():
    for (error,) in run_ranks(_a_large_or_a_small_frame_may_follow, args=(-1,), timeout=30):
        assert "4 channels" in error
        assert "20000 channels" in error


def _rank_0_reports_many_errors(away: float, delay: float) -> tuple[list[str], list[str]]:
    """Rank 0 refuses more batches in a row than there are slots. Rank 1 is away at first and late each time."""
    layer = connected_layer()
    rank = dist.get_rank()
    time.sleep(away * rank)
    errors = []
    for number in range(SLOTS + 2):
        time.sleep(delay * rank)
        errors += errors_of(lambda: layer(torch.randn(3, 4 if rank else 5 + number)))  # noqa: B023
    return errors, errors_of(lambda: layer(torch.randn(3, 4)))


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_many_errors_in_a_row_reach_a_slow_rank_in_order(delay):
    (first, last), (second, same) = run_ranks(_rank_0_reports_many_errors, args=(0.0, delay), timeout=30)
    for number, (theirs, ours) in enumerate(zip(first, second, strict=True)):
        assert theirs.startswith(InputError.__name__)
        assert f"expected 4 channels in dimension 1, got {5 + number}" in ours, second
    assert last == same == ["no error"]


def test_more_errors_than_slots_while_the_other_rank_is_away_close_the_exchange():
    (first, (last,)), (second, (same,)) = run_ranks(_rank_0_reports_many_errors, args=(2.5, 0.0), timeout=30)
    assert all(error.startswith(InputError.__name__) for error in first)
    for number in range(SLOTS - 1):
        assert f"got {5 + number}" in second[number]
    assert all("no error" not in error for error in [*second, last, same])
