"""An exchange that a rank leaves before it is complete: every rank raises with the reason, and training can go on."""

import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from failing import errors_of, net, step
from torch import Tensor, nn

import syncnorm
from syncnorm.comm import exchange
from syncnorm.layer import kernels
from syncnorm.layer.kernels import cpu, native
from syncnorm.testing import run_ranks


def _rank_is_interrupted() -> tuple[list[str], float, list[Tensor]]:
    """Rank 0 is interrupted while it waits and continues, as in a notebook. Later all ranks convert again."""
    model = net()
    step(model)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        time.sleep(1.5)
    began = time.monotonic()
    errors = errors_of(lambda: step(model, 1), lambda: step(model, 2), lambda: step(model, 3))
    took = time.monotonic() - began
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.barrier()
    model = syncnorm.convert(model)
    for norm in (model[1], model[3]):
        norm.reset_running_stats()
    step(model, 4)
    return errors, took, [model[1].running_mean, model[3].running_var]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_interrupt_that_is_caught(world_size):
    (first, _, buffers), *others = run_ranks(_rank_is_interrupted, world_size, timeout=40)
    assert first[0].startswith("KeyboardInterrupt")
    for error in first[1:]:
        assert "cannot be synchronized over ranks" in error
        assert "rank 0 left forward of 1 (call 5 of the group" in error
        assert "because of KeyboardInterrupt" in error
        assert "call syncnorm.convert(model) again on all ranks" in error
    for errors, took, theirs in others:
        assert "rank 0, which left forward of 1 (call 5" in errors[0] or "anymore" in errors[0], errors
        assert all("anymore" in text for text in errors[1:])
        assert took < 4  # the timeout of the group is 100 s
        for mine, same in zip(buffers, theirs, strict=True):  # training continues on all ranks
            torch.testing.assert_close(mine, same, rtol=0, atol=0)


def _rank_0_is_interrupted_twice(connected: bool) -> list[str]:
    """Rank 0 is interrupted twice and converts again each time. Rank 1 comes later and converts once."""
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    if connected:
        model(torch.randn(3, 4))
    errors = []
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for _ in range(2):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            errors += errors_of(lambda: model(torch.randn(3, 4)))
            syncnorm.convert(model)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        time.sleep(2)
        syncnorm.convert(model)
    return errors + errors_of(lambda: model(torch.randn(3, 4)))


@pytest.mark.parametrize("connected", [True, False])
def test_a_rank_that_missed_two_attempts_joins_the_third(connected):
    first, second = run_ranks(_rank_0_is_interrupted_twice, args=(connected,), timeout=30)
    assert [text.split(":")[0] for text in first] == ["KeyboardInterrupt", "KeyboardInterrupt", "no error"]
    assert second == ["no error"]


def _rank_runs_an_earlier_graph() -> list[str]:
    """The backward of a forward from before the connections were closed on rank 0, of a later one on rank 1."""
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


def test_a_graph_of_an_earlier_attempt_differs_from_one_of_this_attempt():
    for (error,) in run_ranks(_rank_runs_an_earlier_graph, timeout=30):
        assert "called different layers" in error


def _rank_0_runs_out_of_memory(in_c: bool, where: str) -> list[str]:
    """In one backward. The training loop catches it by its message and skips the batch."""
    passes = native if in_c else cpu
    model = net()
    step(model)
    real = getattr(passes, where)

    def full(*args: Any) -> object:
        if any(isinstance(arg, Tensor) and arg.numel() in (3000, 6000, 9000) for arg in args):
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return real(*args)

    skipped = []
    for seed in range(1, 4):
        with (
            mock.patch.object(passes, where, full if dist.get_rank() == 0 and seed == 1 else real),
            mock.patch.object(kernels, "library", kernels.library if in_c else None),
        ):
            try:
                step(model, seed)
            except RuntimeError as error:
                if "not enough memory" not in str(error):
                    return [*skipped, str(error)]
                skipped.append("skipped")
    return skipped


def test_out_of_memory_during_the_exchange_of_a_backward_closes_the_exchange():
    first, second = run_ranks(_rank_0_runs_out_of_memory, args=(False, "begin_grad"), timeout=40)
    assert first[0] == "skipped"
    assert "rank 0 left backward of 3 (call" in first[1]
    assert "rank 0, which left backward of 3 (call" in second[0]


@pytest.mark.parametrize(("in_c", "where"), [(False, "reduce_grad"), (True, "reduce_at"), (True, "finish_at")])
def test_out_of_memory_outside_of_the_exchange_of_a_backward_is_an_error_on_all_ranks(in_c, where):
    results = run_ranks(_rank_0_runs_out_of_memory, args=(in_c, where), timeout=40)
    assert results == [["skipped"], ["skipped"]]


ONE_THREAD = "Only one thread may run the layers of a process group at a time"


def _rank_trains_in_two_threads() -> list[str]:
    models = [net(), net()]
    step(models[0])
    errors: list[str] = []

    def run(model: nn.Module) -> None:
        for seed in range(30):
            errors.extend(text for text in errors_of(lambda: step(model, seed)) if text != "no error")  # noqa: B023

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_over_one_group():
    for errors in run_ranks(_rank_trains_in_two_threads, timeout=60):
        assert errors
        texts = (ONE_THREAD, "which started", "anymore", "called different layers")
        assert any(text in error for text in texts for error in errors), errors


def _rank_starts_two_threads() -> list[str]:
    layers = [syncnorm.SyncBatchNorm(4) for _ in range(2)]
    real = exchange.Exchange.__init__
    slow = mock.patch.object(
        exchange.Exchange, "__init__", lambda *args, **options: time.sleep(0.2) or real(*args, **options)
    )
    errors: list[str] = []
    with slow:
        threads = [
            threading.Thread(target=lambda layer=layer: errors.extend(errors_of(lambda: layer(torch.randn(3, 4)))))
            for layer in layers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors


def test_two_threads_at_their_first_layers_share_one_exchange():
    for errors in run_ranks(_rank_starts_two_threads, timeout=30):
        assert any(ONE_THREAD in error for error in errors), errors
