"""An exchange that a rank leaves half-way, or never comes to: an error on every rank that says who, and a way on."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm import comm
from syncnorm.comm import exchange, failure_flags, frames, stall_inspector
from syncnorm.layer.kernels import cpu
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

ROWS = (3, 2, 0)


def net(wide: int = 3000) -> nn.Module:
    """Frames of different sizes: in step or not at all."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, wide), nn.BatchNorm1d(wide)]
    return syncnorm.convert(nn.Sequential(*layers))


def step(model: nn.Module, seed: int = 0) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).split(ROWS[:world_size])[rank]
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)))


def errors_of(*calls: Callable[[], object]) -> list[str]:
    """What each of them raised."""
    told = []
    for call in calls:
        try:
            call()
        except (syncnorm.SyncNormError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing")
    return told


def interrupted() -> tuple[list[str], float, list[Tensor]]:
    """Rank 0 is interrupted while it waits, catches that, and goes on, as in a notebook; later all convert again."""
    model = net()
    step(model)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(1.5)
    began = time.monotonic()
    told = errors_of(lambda: step(model, 1), lambda: step(model, 2), lambda: step(model, 3))
    took = time.monotonic() - began
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.barrier()
    model = syncnorm.convert(model)
    for norm in (model[1], model[3]):
        norm.reset_running_stats()
    step(model, 4)
    return told, took, [model[1].running_mean, model[3].running_var]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_interrupt_that_is_caught(world_size):
    (first, _, buffers), *others = run_ranks(interrupted, world_size, timeout=40)
    assert first[0].startswith("KeyboardInterrupt")
    for told in first[1:]:
        assert "cannot be synchronized over ranks" in told
        assert "rank 0 left forward of 1 (call 5 of the group" in told
        assert "because of KeyboardInterrupt" in told
        assert "call syncnorm.convert(model) again on all ranks" in told
    for told, took, theirs in others:
        assert "rank 0, which left forward of 1 (call 5" in told[0] or "anymore" in told[0], told
        assert all("anymore" in text for text in told[1:])
        assert took < 4  # of 100 s that the group would wait
        for mine, same in zip(buffers, theirs, strict=True):  # and on they go together
            torch.testing.assert_close(mine, same, rtol=0, atol=0)


def one_rank_is_late(connected: bool) -> list[str]:
    """Rank 0 is interrupted twice and converts again each time; rank 1 comes later, and converts once."""
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    if connected:
        model(torch.randn(3, 4))
    told = []
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for _ in range(2):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            told += errors_of(lambda: model(torch.randn(3, 4)))
            syncnorm.convert(model)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        time.sleep(2)
        syncnorm.convert(model)
    return told + errors_of(lambda: model(torch.randn(3, 4)))


@pytest.mark.parametrize("connected", [True, False])
def test_a_rank_that_missed_two_attempts_joins_the_third(connected):
    first, second = run_ranks(one_rank_is_late, args=(connected,), timeout=30)
    assert [text.split(":")[0] for text in first] == ["KeyboardInterrupt", "KeyboardInterrupt", "nothing"]
    assert second == ["nothing"]


def graph_of_an_earlier_attempt() -> list[str]:
    """A backward over connections that were closed meanwhile does not pair with one of the new ones."""
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    old = model(inputs[0])
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(1)
    errors_of(lambda: model(torch.randn(3, 4)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.barrier()
    syncnorm.convert(model)
    new = model(inputs[1])
    return errors_of(lambda: (old if dist.get_rank() == 0 else new).backward(torch.randn(3, 4)))


def test_a_graph_of_an_earlier_attempt_is_told_from_one_of_this():
    for (told,) in run_ranks(graph_of_an_earlier_attempt, timeout=30):
        assert "called different layers" in told


def memory_runs_out(where: str) -> list[str]:
    """On rank 0, in one backward; caught by what looks for its words, as training loops do that skip such a batch."""
    model = net()
    step(model)
    real = getattr(cpu, where)

    def full(*args: Tensor) -> object:
        if args[1].numel() in (3000, 6000, 9000):
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return real(*args)

    skipped = []
    for seed in range(1, 4):
        with mock.patch.object(cpu, where, full if dist.get_rank() == 0 and seed == 1 else real):
            try:
                step(model, seed)
            except RuntimeError as error:
                if "not enough memory" not in str(error):
                    return [*skipped, str(error)]
                skipped.append("skipped")
    return skipped


def test_memory_that_runs_out_while_the_sums_travel_closes_the_exchange():
    first, second = run_ranks(memory_runs_out, args=("begin_grad",), timeout=40)
    assert first[0] == "skipped"
    assert "rank 0 left backward of 3 (call" in first[1]
    assert "rank 0, which left backward of 3 (call" in second[0]


def test_memory_that_runs_out_before_the_sums_travel_is_an_error_of_all_in_step():
    assert run_ranks(memory_runs_out, args=("reduce_grad",), timeout=40) == [["skipped"], ["skipped"]]


def two_threads() -> list[str]:
    models = [net(), net()]
    step(models[0])
    told: list[str] = []

    def run(model: nn.Module) -> None:
        for seed in range(30):
            told.extend(text for text in errors_of(lambda: step(model, seed)) if text != "nothing")  # noqa: B023

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_two_threads_over_one_group():
    for told in run_ranks(two_threads, timeout=60):
        assert told
        assert any("Only one thread may run the layers of a process group at a time" in text for text in told) or any(
            "which started" in text or "anymore" in text or "called different layers" in text for text in told
        ), told


def two_threads_at_first() -> list[str]:
    layers = [syncnorm.SyncBatchNorm(4) for _ in range(2)]
    real = exchange.Exchange.__init__
    slow = mock.patch.object(
        exchange.Exchange, "__init__", lambda *args, **options: time.sleep(0.2) or real(*args, **options)
    )
    told: list[str] = []
    with slow:
        threads = [
            threading.Thread(target=lambda layer=layer: told.extend(errors_of(lambda: layer(torch.randn(3, 4)))))
            for layer in layers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return told


def test_two_threads_at_their_first_layers_share_one_exchange():
    for told in run_ranks(two_threads_at_first, timeout=30):
        assert any("Only one thread may run the layers of a process group at a time" in text for text in told), told


def failing_to_connect() -> tuple[list[str], float]:
    """Rank 1, before its address is in the store, where the others wait for it: a TCPStore, as of torchrun."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    ports = [server.port if server else 0]
    dist.broadcast_object_list(ports, 0)
    store = dist.TCPStore("localhost", ports[0], is_master=False, wait_for_workers=False)
    layer = syncnorm.SyncBatchNorm(4)
    real = exchange._connect

    def fails(*_: object) -> None:
        time.sleep(0.5)
        raise MemoryError("of its own")

    if dist.get_rank() == 1:
        exchange._connect = fails
    began = time.monotonic()
    try:
        with mock.patch.object(dist.distributed_c10d, "_get_default_store", return_value=store):
            told = errors_of(lambda: layer(torch.randn(3, 4)))
        return told, time.monotonic() - began
    finally:
        dist.barrier()
        exchange._connect = real


def test_a_rank_that_fails_to_connect_is_heard_of_at_once():
    results = run_ranks(failing_to_connect, 3, timeout=40)
    for (told,), took in (results[0], results[2]):
        assert "waiting for rank 1, which left forward of SyncBatchNorm no. 1" in told
        assert took < 15  # of 100 s that the group would wait


def forked(connected: bool) -> str:
    model = net(8)
    if connected:
        step(model)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, errors_of(lambda: model(torch.randn(3, 4)))[0].encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reading, 10_000).decode()
    step(model)  # the rank itself goes on
    return told


@pytest.mark.parametrize("connected", [True, False])
def test_a_forked_child_is_no_rank(connected):
    for told in run_ranks(forked, args=(connected,), timeout=30):
        assert told.startswith("SyncNormError")
        assert "was forked from a rank after torch.distributed.init_process_group" in told


def stuck(while_connecting: bool) -> tuple[list[str], float]:
    """Rank 1 comes to its first synced layer, but no further; or not even there. Tests of faults kill it instead."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    layer = syncnorm.SyncBatchNorm(4, process_group=group)
    done = threading.Event()
    real = exchange._connect
    if dist.get_rank() == 1 and while_connecting:
        exchange._connect = lambda *args: done.wait() and real(*args)
    began = time.monotonic()
    comes = dist.get_rank() != 1 or while_connecting
    told = errors_of(*[lambda: layer(torch.randn(3, 4))] * comes)
    took = time.monotonic() - began
    dist.barrier()
    done.set()
    exchange._connect = real
    return told, took


@pytest.mark.parametrize("while_connecting", [True, False])
def test_a_rank_that_is_stuck_before_it_is_connected_is_named(while_connecting):
    results = run_ranks(stuck, 3, args=(while_connecting,), timeout=60)
    for rank in (0, 2):
        (told,), took = results[rank]
        assert f"rank {rank}: forward of SyncBatchNorm no. 1" in told
        assert while_connecting or "waiting for ranks [1]" in told
        assert "could not connect to ranks [0, 1, 2]" in told
        assert took < 15  # and not the group's timeout for each of its ranks


def another_version() -> list[str]:
    if dist.get_rank() == 1:
        frames._VERSION = 99
    layer = syncnorm.SyncBatchNorm(4)
    try:
        return errors_of(lambda: layer(torch.randn(3, 4)), lambda: layer(torch.randn(3, 4)))
    finally:
        frames._VERSION = 1


def test_ranks_with_other_frames_learn_it_before_the_first_one():
    for rank, told in enumerate(run_ranks(another_version, 3, timeout=30)):
        assert told[0].startswith(f"SyncNormError: rank {rank}: the ranks run incompatible versions of syncnorm")
        assert "rank 0: frames of version 1" in told[0]
        assert "rank 1: frames of version 99" in told[0]


class Gone:
    """A store whose keeper has ended."""

    def check(self, _: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")

    def set(self, *_: str) -> None:
        raise RuntimeError("Connection reset by peer")


def store_gone() -> Tensor:
    """A rank that comes late, when the store has gone: that ends the asking, not the training."""
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))[0]
    step(layer)
    comm.peers_of(dist.group.WORLD).exchange._flags.store = Gone()
    if dist.get_rank() == 1:
        time.sleep(1)
    step(layer, 1)
    return layer.running_mean


def test_a_store_that_has_gone():
    parts = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    want = batch_norm_oracle([parts[0]], [parts[0]], running_mean=torch.zeros(4), running_var=torch.ones(4))
    want = batch_norm_oracle([parts[1]], [parts[1]], running_mean=want.running_mean, running_var=want.running_var)
    for mean in run_ranks(store_gone, timeout=30):
        assert_close(mean, want.running_mean, torch.float32)


class Slow:
    """A store that takes its time."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def set(self, key: str, text: str) -> None:
        time.sleep(0.2)
        self.held[key] = text


def test_what_two_threads_tell_a_store_at_once_arrives():
    store = Slow()
    left = failure_flags.FailureFlags(store, 0, [0, 1])
    threads = [threading.Thread(target=left.post, args=(name, "")) for name in ("one", "other", "third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.held.keys() == {"one/0", "other/0", "third/0"}


def test_who_is_missing_is_not_known_without_a_store():
    left = stall_inspector.StallInspector(failure_flags.FailureFlags(Gone(), 0, [0, 1, 2]))
    told = left.explain_failure(comm.Call(comm.Kind.FORWARD, "norm"), RuntimeError("reset"))
    assert "waiting for other ranks (which ones is unknown: the job's store does not answer)" in told
    assert "ranks [1" not in told


def rank_0_alone(connected: bool) -> list[str]:
    """A training forward of rank 0 alone; the others sit in a barrier."""
    stall_inspector._WARN_AFTER_S = 1.5
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    if connected:
        layer(torch.randn(3, 4))
    seen: list[str] = []
    if dist.get_rank() == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            threading.Timer(4, lambda: dist.distributed_c10d._get_default_store().set("go", "1")).start()
            layer(torch.randn(3, 4))
        seen = [str(w.message) for w in caught]
    else:
        dist.distributed_c10d._get_default_store().wait(["go"])
        layer(torch.randn(3, 4))
    stall_inspector._WARN_AFTER_S = 10.0
    return seen


@pytest.mark.parametrize("connected", [True, False])
def test_a_long_wait_is_one_warning_with_layer_and_missing_ranks(connected):
    (seen,), *none = run_ranks(rank_0_alone, 3, args=(connected,), timeout=40)
    assert none == [[], []]
    assert "rank 0 has waited" in seen
    assert "for ranks [1, 2] in forward of 0 (call" in seen
    assert "was `model.eval()` forgotten?" in seen


def elsewhere() -> list[str]:
    """Rank 0 waits in a layer for rank 1, which is in a barrier."""
    stall_inspector._WATCHDOG_IDLE_S, stall_inspector._WATCHDOG_PERIOD_S = 1.5, 0.3
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    layer(torch.randn(3, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() == 1:
            time.sleep(4)
        layer(torch.randn(3, 4))
    return [str(warning.message) for warning in caught]


def test_a_rank_that_is_elsewhere_learns_who_waits_for_it():
    nobody, (told,) = run_ranks(elsewhere, timeout=30)
    assert nobody == []
    assert "rank 1 has called no synced layer for" in told
    assert "other ranks wait for it: rank 0 in forward of 0 (call 2 of the group" in told
