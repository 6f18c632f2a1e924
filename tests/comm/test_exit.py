"""The end of processes while other ranks, or threads inside of torch, have not finished."""

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm.errors import InputError
from syncnorm.testing import run_ranks

RETURNS_LATE = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from syncnorm.comm.failure_flags import start_thread

class Slow:  # prolongs the shutdown of the interpreter
    def __del__(self, sleep=time.sleep):
        sleep(3)

slow = Slow()
store = dist.FileStore(sys.argv[1], 1)
start_thread(lambda: store.wait(["never"], timedelta(seconds=2.5)))
"""


def test_a_thread_that_returns_from_torch_while_the_interpreter_shuts_down(tmp_path):
    ended = subprocess.run([sys.executable, "-c", RETURNS_LATE, tmp_path / "store"], capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()


def _rank_raises_and_exits() -> float:
    """Rank 0 raises and runs the exit handler; the other rank comes to the layer only after that."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    layer = syncnorm.SyncBatchNorm(3, process_group=group)
    layer(torch.randn(4, 3))
    began = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(InputError):
            layer(torch.randn(4, 2))
        from syncnorm.comm import exchange

        exchange._leave_connections_to_the_system()
    took = time.monotonic() - began
    dist.barrier()
    if dist.get_rank() == 1:  # later, but it gets the reason
        with pytest.raises(syncnorm.SyncNormError, match="expected 3 channels in dimension 1, got 2"):
            layer(torch.randn(4, 3))
    return took


def test_a_rank_that_raised_exits_without_waiting_for_the_others():
    took, _ = run_ranks(_rank_raises_and_exits, timeout=40)
    assert took < 5  # less than the timeout of 20 s
