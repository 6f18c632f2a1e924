"""How the layer benchmark times single calls: from the arrival of the last rank until all ranks are done."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from syncnorm import comm
from syncnorm.testing import run_ranks
from syncnorm.tools.bench import BenchSettings, calls, exchange_latency
from syncnorm.tools.bench.calls import MAX_SKIPPED, OtherWork, call_by_call, one_clock, turns_to_fill
from syncnorm.tools.bench.exchange_latency import AFTER_WORK, BACK_TO_BACK, ONE_LATE, measure_exchange
from syncnorm.tools.bench.single_process import fake_world, world_of_one
from syncnorm.tools.common.ranks import initialized_ranks

CPU = torch.device("cpu")
# Long compared with what a busy machine adds.
LATE, STEP, SLOW_STEP = 0.4, 0.05, 0.8


def _rank_late(share_clock):
    """Rank 1 arrives ``LATE`` seconds late at each step, after it has met the other one."""
    with initialized_ranks(CPU) as ranks:
        if not share_clock:
            calls.one_clock = lambda ranks: False

        def before():
            dist.barrier()
            time.sleep(LATE * ranks.rank)

        def synced():
            dist.barrier()
            time.sleep(STEP)

        def slow_on_the_first_rank():
            time.sleep(STEP if ranks.rank else SLOW_STEP)

        steps = {"synced": synced, "local": lambda: time.sleep(STEP), "slow": slow_on_the_first_rank}
        try:
            return call_by_call(steps, ranks, 2, before)
        finally:
            calls.one_clock = one_clock


def test_a_call_counts_from_the_arrival_of_the_last_rank_until_all_are_done():
    first, second = run_ranks(_rank_late, 2, (True,))
    assert first == second
    # Ranks leave the barrier at slightly different times.
    assert LATE - 0.2 < first.lateness < LATE + 0.2
    for name in ("synced", "local"):
        assert len(first.seconds[name]) == 2
        assert all(STEP <= seconds < STEP + 0.2 for seconds in first.seconds[name])
    # It starts when the first rank arrives, and counts from the arrival of the last.
    assert all(SLOW_STEP - LATE - 0.2 < seconds < SLOW_STEP - LATE + 0.2 for seconds in first.seconds["slow"])


def test_without_a_common_clock_the_rank_counts_that_waited_least():
    first, second = run_ranks(_rank_late, 2, (False,))
    assert first == second
    assert first.lateness is None
    assert all(STEP <= seconds < STEP + 0.2 for times in first.seconds.values() for seconds in times)


def _rank_clocks():
    found = []
    with initialized_ranks(CPU) as ranks:
        for offset in (0.0, 100.0, -100.0):  # of the second rank
            calls.time = SimpleNamespace(perf_counter=lambda o=offset: time.perf_counter() + o * ranks.rank)
            try:
                found.append(one_clock(ranks))
            finally:
                calls.time = time
    return found


def test_clocks_of_different_hosts_are_found_out():
    assert run_ranks(_rank_clocks, 2) == [[True, False, False]] * 2


def test_contenders_take_turns_and_work_before_each_call():
    events = []
    with world_of_one("gloo", CPU) as ranks:
        steps = {name: lambda name=name: events.append(name) for name in "abc"}
        found = call_by_call(steps, ranks, 2, lambda: (events.append("work"), time.sleep(0.02)))
    assert events == [each for name in "abcacb" for each in ("work", name)]
    assert all(0 < seconds < 0.02 for times in found.seconds.values() for seconds in times)
    assert found.lateness == 0


def test_other_work_differs_by_rank_and_call_and_not_by_run(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch, "mul", lambda x, factor, out: sizes.append((x.numel(), out.numel())))
    for rank in (0, 1, 0):
        work = OtherWork(rank)
        for _ in range(3):
            work()
    first, second, again = sizes[:3], sizes[3:6], sizes[6:]
    assert first == again
    assert len({*first, *second}) == 6
    largest = calls.ACTIVATIONS_BYTES // 4
    assert all((1 - MAX_SKIPPED) * largest - 1 <= read == written <= largest for read, written in sizes)


def test_turns():
    assert [turns_to_fill(1.2, turn, least=15) for turn in (0.01, 0.05, 1.0)] == [120, 24, 15]


# --- the exchange


def _rank_exchange(transport):
    with initialized_ranks(CPU) as ranks:
        comm.set_transport(dist.group.WORLD, transport)
        return measure_exchange(BenchSettings(what="layer", world_size=2, device="cpu", repetitions=1), ranks)


@pytest.mark.parametrize(
    ("transport", "description"), [(None, "shared memory, 2 ranks of one host"), ("native", "native")]
)
def test_an_exchange_in_three_situations(transport, description):
    found, other = run_ranks(_rank_exchange, 2, (transport,))
    assert found == other
    assert found.num_bytes == 4096
    assert found.transport == description
    assert [situation.name for situation in found.situations] == [BACK_TO_BACK, AFTER_WORK, ONE_LATE]
    for situation in found.situations:
        assert len(situation.seconds) == 20
        assert 0 < min(situation.seconds) <= situation.median <= situation.p90 <= max(situation.seconds)
    assert found[AFTER_WORK] is found.situations[1]


def test_the_late_rank_is_another_one_at_each_call(monkeypatch):
    reads = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(reads) * 1e-4)
    monkeypatch.setattr(exchange_latency, "time", clock)

    def late_calls(rank):
        before, late = exchange_latency._OneRankLate(rank, 3), []
        for call in range(6):
            started = clock.perf_counter()
            before()
            late += [call] * (clock.perf_counter() - started > exchange_latency.LATE_SECONDS)
        return late

    assert [late_calls(rank) for rank in range(3)] == [[2, 5], [0, 3], [1, 4]]


def test_the_transport_is_that_of_the_layer(monkeypatch):
    for exchange, want in (
        (None, "native"),
        (SimpleNamespace(transport="shm"), "shm"),
    ):
        monkeypatch.setattr(exchange_latency, "exchange_of", lambda group, device, found=exchange: found)
        assert exchange_latency.transport_of(None) == want


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_exchange_is_timed_without_other_ranks(world_size):
    settings = BenchSettings(what="layer", world_size=world_size, device="cpu")
    with fake_world(world_size, CPU) as ranks:
        assert measure_exchange(settings, ranks) is None
