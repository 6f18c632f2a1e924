"""Ranks that wait for others: warnings on both sides, and a job's store that is gone or slow."""

import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from failing import step
from torch import Tensor, nn

import syncnorm
from syncnorm import comm
from syncnorm.comm import failure_flags, stall_inspector
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks


def _rank_0_runs_a_forward_alone(connected: bool) -> list[str]:
    """Rank 0 runs a training forward; the other ranks wait for the store meanwhile. Returns the warnings."""
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
    (seen,), *none = run_ranks(_rank_0_runs_a_forward_alone, 3, args=(connected,), timeout=40)
    assert none == [[], []]
    assert "rank 0 has waited" in seen
    assert "for ranks [1, 2] in forward of 0 (call" in seen
    assert "was `model.eval()` forgotten?" in seen


def _rank_1_is_elsewhere() -> list[str]:
    """Rank 0 waits in a layer for rank 1, which is somewhere else. Returns the warnings."""
    stall_inspector._WATCHDOG_IDLE_S, stall_inspector._WATCHDOG_PERIOD_S = 1.5, 0.3
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    layer(torch.randn(3, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if dist.get_rank() == 1:
            time.sleep(4)
        layer(torch.randn(3, 4))
    return [str(warning.message) for warning in caught]


def test_a_rank_that_is_elsewhere_is_warned_that_others_wait_for_it():
    none, (message,) = run_ranks(_rank_1_is_elsewhere, timeout=30)
    assert none == []
    assert "rank 1 has called no synced layer for" in message
    assert "other ranks wait for it: rank 0 in forward of 0 (call 2 of the group" in message


class Gone:
    """A store whose host process has ended."""

    def check(self, _: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")

    def set(self, *_: str) -> None:
        raise RuntimeError("Connection reset by peer")


def _rank_trains_without_a_store() -> Tensor:
    """Rank 1 comes late when the store is gone: this ends the requests to the store, not the training."""
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))[0]
    step(layer)
    comm.peers_of(dist.group.WORLD).exchange._flags.store = Gone()
    if dist.get_rank() == 1:
        time.sleep(1)
    step(layer, 1)
    return layer.running_mean


def test_training_continues_without_the_store():
    parts = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    want = batch_norm_oracle([parts[0]], [parts[0]], running_mean=torch.zeros(4), running_var=torch.ones(4))
    want = batch_norm_oracle([parts[1]], [parts[1]], running_mean=want.running_mean, running_var=want.running_var)
    for mean in run_ranks(_rank_trains_without_a_store, timeout=30):
        assert_close(mean, want.running_mean, torch.float32)


class Slow:
    """A slow store."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def set(self, key: str, text: str) -> None:
        time.sleep(0.2)
        self.held[key] = text


def test_notes_that_several_threads_post_at_once_all_arrive():
    store = Slow()
    flags = failure_flags.FailureFlags(store, 0, [0, 1])
    threads = [threading.Thread(target=flags.post, args=(name, "")) for name in ("one", "other", "third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.held.keys() == {"one/0", "other/0", "third/0"}


def test_without_a_store_the_missing_ranks_are_unknown():
    inspector = stall_inspector.StallInspector(failure_flags.FailureFlags(Gone(), 0, [0, 1, 2]))
    message = inspector.explain_failure(comm.Call(comm.Kind.FORWARD, "norm"), RuntimeError("reset"))
    assert "waiting for other ranks (which ones is unknown: the job's store does not answer)" in message
    assert "ranks [1" not in message
