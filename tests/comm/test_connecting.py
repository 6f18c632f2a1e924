"""Ranks that connect in their first synced layer: one that fails, hangs, is forked or has another wire format."""

import os
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from failing import errors_of, net, step
from versions import copied_stores

import syncnorm
from syncnorm.comm import exchange, frames
from syncnorm.comm.failure_flags import FailureFlags
from syncnorm.testing import run_ranks


def _rank_1_fails_to_connect() -> tuple[list[str], float]:
    """Rank 1 fails before its address is in the store, where the others wait for it: a TCPStore, as torchrun uses."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    ports = [server.port if server else 0]
    dist.broadcast_object_list(ports, 0)
    store = dist.TCPStore("localhost", ports[0], is_master=False, wait_for_workers=False)
    layer = syncnorm.SyncBatchNorm(4)
    real = exchange._connect

    def fails(*_: object) -> None:
        time.sleep(0.5)
        raise MemoryError("raised by the test")

    if dist.get_rank() == 1:
        exchange._connect = fails
    began = time.monotonic()
    try:
        with mock.patch.object(dist.distributed_c10d, "_get_default_store", return_value=store):
            errors = errors_of(lambda: layer(torch.randn(3, 4)))
        return errors, time.monotonic() - began
    finally:
        dist.barrier()
        exchange._connect = real


@copied_stores
def test_a_rank_that_fails_to_connect_is_noticed_at_once():
    results = run_ranks(_rank_1_fails_to_connect, 3, timeout=40)
    for (error,), took in (results[0], results[2]):
        assert "waiting for rank 1, which left forward of SyncBatchNorm no. 1" in error
        assert took < 15  # the timeout of the group is 100 s


def _rank_1_is_stuck(while_connecting: bool) -> tuple[list[str], float]:
    """Rank 1 hangs while it connects in its first synced layer, or does not come to it. (Tests of faults kill it.)"""
    group = dist.new_group(timeout=timedelta(seconds=2))
    layer = syncnorm.SyncBatchNorm(4, process_group=group)
    done = threading.Event()
    real = exchange._connect
    if dist.get_rank() == 1 and while_connecting:
        exchange._connect = lambda *args: done.wait() and real(*args)
    began = time.monotonic()
    comes = dist.get_rank() != 1 or while_connecting
    errors = errors_of(*[lambda: layer(torch.randn(3, 4))] * comes)
    took = time.monotonic() - began
    dist.barrier()
    done.set()
    exchange._connect = real
    return errors, took


@pytest.mark.parametrize("while_connecting", [True, False])
def test_a_rank_that_is_stuck_before_it_is_connected_is_named(while_connecting):
    results = run_ranks(_rank_1_is_stuck, 3, args=(while_connecting,), timeout=60)
    for rank in (0, 2):
        (error,), took = results[rank]
        assert f"rank {rank}: forward of SyncBatchNorm no. 1" in error
        assert while_connecting or "waiting for ranks [1]" in error
        assert "could not connect to ranks [0, 1, 2]" in error
        assert took < 15  # less than the timeout of the group for each of its ranks


def _rank_1_has_another_version() -> list[str]:
    if dist.get_rank() == 1:
        frames._VERSION = 99
    layer = syncnorm.SyncBatchNorm(4)
    try:
        return errors_of(lambda: layer(torch.randn(3, 4)), lambda: layer(torch.randn(3, 4)))
    finally:
        frames._VERSION = 1


def test_ranks_with_different_wire_formats_raise_before_the_first_frame():
    for rank, errors in enumerate(run_ranks(_rank_1_has_another_version, 3, timeout=30)):
        assert errors[0].startswith(f"SyncNormError: rank {rank}: the ranks run incompatible versions of syncnorm")
        assert "rank 0: frames of version 1" in errors[0]
        assert "rank 1: frames of version 99" in errors[0]


def _rank_1_is_older(version: str) -> list[str]:
    post = FailureFlags.post
    older = mock.patch.object(FailureFlags, "post", lambda self, kind, _: post(self, kind, f"auto\n{version}"))
    with older if dist.get_rank() == 1 else nullcontext():
        return errors_of(lambda: syncnorm.SyncBatchNorm(4)(torch.randn(3, 4)))


def test_an_older_version_without_settings_is_told_apart():
    for rank, (error,) in enumerate(run_ranks(_rank_1_is_older, args=("frames of version 0",), timeout=30)):
        assert error.startswith(f"SyncNormError: rank {rank}: the ranks run incompatible versions of syncnorm")
        assert "rank 1: frames of version 0" in error


def _rank_forks(connected: bool) -> str:
    model = net(8)
    if connected:
        step(model)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, errors_of(lambda: model(torch.randn(3, 4)))[0].encode())
        os._exit(0)
    os.waitpid(child, 0)
    error = os.read(reading, 10_000).decode()
    step(model)  # the rank itself continues
    return error


@pytest.mark.parametrize("connected", [True, False])
def test_a_forked_child_is_no_rank(connected):
    for error in run_ranks(_rank_forks, args=(connected,), timeout=30):
        assert error.startswith("SyncNormError")
        assert "was forked from a rank after torch.distributed.init_process_group" in error
