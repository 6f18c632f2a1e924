"""How processes end whose ranks have not finished with each other."""

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

COMES_BACK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from syncnorm.comm.failure_flags import start_thread

class Slow:  # keeps the interpreter busy with ending
    def __del__(self, sleep=time.sleep):
        sleep(3)

slow = Slow()
store = dist.FileStore(sys.argv[1], 1)
start_thread(lambda: store.wait(["never"], timedelta(seconds=2.5)))
"""


def test_a_thread_that_comes_back_from_torch_while_the_interpreter_ends(tmp_path):
    ended = subprocess.run([sys.executable, "-c", COMES_BACK, tmp_path / "store"], capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()


def refused_and_left() -> float:
    """Rank 0 has raised, and tears down what an exit would; the others never come to the layer."""
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
    if dist.get_rank() == 1:  # too late, but it hears why
        with pytest.raises(syncnorm.SyncNormError, match="expected 3 channels in dimension 1, got 2"):
            layer(torch.randn(4, 3))
    return took


def test_a_rank_that_has_refused_does_not_wait_for_the_others_to_exit():
    took, _ = run_ranks(refused_and_left, timeout=40)
    assert took < 5  # and not the group's 20 s
