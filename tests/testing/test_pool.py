import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from syncnorm.errors import InputError, SyncNormError
from syncnorm.testing import RankError, run_ranks, shutdown


def _rank_sum(value):
    total = torch.full((3,), value) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_in_the_order_of_ranks(world_size):
    results = run_ranks(_rank_sum, world_size, args=(2.0,))
    assert [rank for rank, _, _ in results] == list(range(world_size))
    for _, size, total in results:
        assert size == world_size
        assert total.tolist() == [2.0 * sum(range(1, world_size + 1))] * 3


def _rank_pid():
    return os.getpid()


def test_ranks_are_kept_and_shared_between_world_sizes():
    pids = run_ranks(_rank_pid, 3)
    assert len({*pids, os.getpid()}) == 4
    assert run_ranks(_rank_pid, 3) == pids
    assert run_ranks(_rank_pid, 2) == pids[:2]


@pytest.mark.slow
def test_fifty_calls_are_quick():
    pids = run_ranks(_rank_pid, 2)
    start = time.monotonic()
    for _ in range(50):
        assert run_ranks(_rank_pid, 2) == pids
    assert time.monotonic() - start < 40  # about 2 s on an idle machine; spawning each time takes over 100


def _rank_state():
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SYNCNORM_TEST_VARIABLE"
    state = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.rand(()).item()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    return [os.environ.get(name) for name in names], state, os.getcwd()


def test_each_call_starts_from_the_same_state(monkeypatch, tmp_path):
    before = run_ranks(_rank_state, 2)
    monkeypatch.setenv("SYNCNORM_TEST_VARIABLE", "set later")
    monkeypatch.chdir(tmp_path)
    after = run_ranks(_rank_state, 2)
    for rank in range(2):
        assert before[rank][0] == [str(rank), "2", str(rank), "2", None]
        assert after[rank][0] == [str(rank), "2", str(rank), "2", "set later"]
        assert after[rank][2] == str(tmp_path)
        assert before[rank][1] == after[rank][1] == before[0][1]
        assert before[rank][1][:3] == (torch.float32, True, 1)


def _rank_raise_on(bad_rank):
    if dist.get_rank() == bad_rank:
        raise ValueError("the reason")
    dist.all_reduce(torch.zeros(2))


def test_a_rank_that_raises_fails_the_call_at_once_and_is_named():
    run_ranks(_rank_pid, 3)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_raise_on, 3, args=(1,))
    assert time.monotonic() - start < 5
    assert isinstance(caught.value, SyncNormError)
    message = str(caught.value)
    assert message.startswith("rank 1 (world size 3) failed first: ValueError: the reason")
    assert 'raise ValueError("the reason")' in message
    assert message.count("Traceback") == 1
    assert re.search(r"^Rank 0: .*\n?Rank 2: .*\Z", message, re.MULTILINE)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.exceptions[1] is caught.value.__cause__
    assert run_ranks(_rank_sum, 2, args=(1.0,))[1][0] == 1


def _rank_raise_while_training(bad_rank):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for step in range(3):
        loss = model(torch.randn(2, 4)).sum()
        if step == 1 and dist.get_rank() == bad_rank:
            raise ValueError("the reason")
        loss.backward()


def test_a_rank_whose_traceback_holds_its_process_group_still_frees_the_others():
    pids = run_ranks(_rank_pid, 2)
    with pytest.raises(RankError, match=r"rank 0 .*the reason") as caught:
        run_ranks(_rank_raise_while_training, 2, args=(0,))
    assert "Connection closed" in str(caught.value.exceptions[1])
    assert run_ranks(_rank_pid, 2) == pids  # no rank had to be killed


def _rank_sleep_on(slow_rank):
    if dist.get_rank() == slow_rank:
        time.sleep(60)
    raise ValueError("the reason")


def test_ranks_that_do_not_notice_a_failure_are_replaced():
    pids = run_ranks(_rank_pid, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0 .*the reason[\s\S]*Rank 1: still running 2 s after"):
        run_ranks(_rank_sleep_on, 2, args=(1,))
    assert time.monotonic() - start < 5
    again = run_ranks(_rank_pid, 2)
    assert again[0] == pids[0]
    assert again[1] != pids[1]


def _rank_end_with(how):
    if dist.get_rank() == 1:
        how()
    dist.all_reduce(torch.zeros(2))


def exit_3():
    os._exit(3)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def abort():
    os.abort()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (exit_3, "ended its process with exit code 3"),
        (kill_self, "was ended by SIGKILL"),
        (abort, "was ended by SIGABRT"),
    ],
)
def test_a_rank_that_dies_is_named_though_the_others_raise_earlier(how, says):
    run_ranks(_rank_pid, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 .*failed first: {says}") as caught:
        run_ranks(_rank_end_with, 2, args=(how,))
    assert time.monotonic() - start < 5
    assert isinstance(caught.value.__cause__, ChildProcessError)
    if how is abort:
        assert "in abort" in str(caught.value)
    assert len(set(run_ranks(_rank_pid, 2))) == 2


def _rank_hang(bad_rank):
    if dist.get_rank() == bad_rank:
        never_join()
    dist.barrier()


def never_join():
    threading.Event().wait()


@pytest.mark.slow
def test_a_hang_names_the_ranks_and_shows_their_stacks():
    run_ranks(_rank_pid, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 and rank 0 .*: still running after 2 s") as caught:
        run_ranks(_rank_hang, 2, args=(1,), timeout=2)
    assert 2 <= time.monotonic() - start < 7
    stacks = dict(re.findall(r"Rank (\d):\n((?:.+\n?)+)", str(caught.value)))
    assert "in never_join" in stacks["1"]
    assert "in barrier" in stacks["0"]
    assert "_end_with_parent" not in str(caught.value)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(set(run_ranks(_rank_pid, 2))) == 2


def _rank_leave_work_behind():
    if dist.get_rank() == 0:
        dist.irecv(torch.zeros(1), src=1)
    return dist.get_rank()


def test_work_left_behind_does_not_reach_the_next_call():
    assert run_ranks(_rank_leave_work_behind, 2) == [0, 1]
    assert run_ranks(_rank_sum, 2, args=(1.0,))[0][2].tolist() == [3.0] * 3


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _rank_raise_needs_two():
    raise NeedsTwo("this", "that")


def test_an_exception_that_does_not_unpickle_is_reported_by_its_text():
    with pytest.raises(RankError, match="NeedsTwo: this and that") as caught:
        run_ranks(_rank_raise_needs_two, 2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "NeedsTwo: this and that" in str(caught.value.exceptions[1])


def _rank_exit_by_exception():
    sys.exit(4)


def test_sys_exit_is_a_failure():
    pids = run_ranks(_rank_pid, 2)
    with pytest.raises(RankError, match="SystemExit: 4"):
        run_ranks(_rank_exit_by_exception, 2)
    assert run_ranks(_rank_pid, 2) == pids


def _rank_return_lambda():
    return lambda: None


def test_a_result_that_does_not_pickle():
    with pytest.raises(RankError, match="returned a function that does not pickle"):
        run_ranks(_rank_return_lambda, 2)


def _rank_large_tensor(numel):
    return torch.full((numel,), float(dist.get_rank()))


def test_large_tensors_travel_both_ways():
    numel = 50_000_000 // 4
    zeros, ones = run_ranks(_rank_large_tensor, 2, args=(numel,))
    assert (zeros.numel(), ones.numel()) == (numel, numel)
    assert zeros.max() == 0
    assert ones.min() == 1
    assert run_ranks(torch.Tensor.sum, 2, args=(ones,)) == [ones.sum()] * 2


def _rank_load_with_workers():
    return torch.cat(list(DataLoader(torch.arange(4), num_workers=1, batch_size=2))).tolist()


def test_fn_may_start_processes():
    assert run_ranks(_rank_load_with_workers, 1) == [[0, 1, 2, 3]]


def _rank_nested():
    return run_ranks(_rank_pid, 1)


@pytest.mark.slow
def test_a_rank_may_have_ranks_and_still_ends():
    shutdown()
    ((inner,),) = run_ranks(_rank_nested, 1)
    start = time.monotonic()
    shutdown()
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)


class Picklable:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value


def _rank_echo(value):
    return value


@pytest.mark.slow
def test_classes_of_the_test_module_travel():
    assert run_ranks(_rank_echo, 2, args=(Picklable(3),)) == [Picklable(3)] * 2
    assert run_ranks(_rank_echo, 1, args=(_rank_pid,)) == [_rank_pid]


def test_invalid_arguments_raise_before_anything_starts():
    shutdown()

    def local():
        pass

    with pytest.raises(InputError, match="lambda"):
        run_ranks(lambda: 1)
    with pytest.raises(InputError, match=r"local\b.*defined inside another function"):
        run_ranks(local)
    with pytest.raises(InputError, match=r"cannot send .*_rank_echo and its args"):
        run_ranks(_rank_echo, args=(threading.Lock(),))
    with pytest.raises(InputError, match="world_size of 1 or more, got 0"):
        run_ranks(_rank_pid, 0)
    with pytest.raises(InputError, match="args as a tuple, got int"):
        run_ranks(_rank_echo, args=3)
    for timeout in (0, None, float("inf")):
        with pytest.raises(InputError, match="positive timeout"):
            run_ranks(_rank_pid, timeout=timeout)
    with pytest.raises(InputError, match="needs a function, got int"):
        run_ranks(5)
    from syncnorm.testing import pool

    assert pool._kept is None


@pytest.mark.slow
def test_shutdown_ends_the_ranks_and_the_next_call_starts_new_ones():
    pids = run_ranks(_rank_pid, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shutdown()
    for old in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(old, 0)
    assert not set(run_ranks(_rank_pid, 2)) & set(pids)


SCRIPT = r"""
import os, sys, threading
import torch
from syncnorm.testing import run_ranks

def f(x):
    return x + 1, os.getpid()

def hang():
    os.write(1, b"%d\n" % os.getpid())  # in one write, because the other rank prints too
    threading.Event().wait()

if __name__ == "__main__":
    results = run_ranks(f, args=(torch.ones(1),))
    print(*(pid for _, pid in results), flush=True)
    if sys.argv[1:] == ["hang"]:
        run_ranks(hang)
"""


def in_subprocess(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.slow
def test_a_script_gets_its_results_and_leaves_nothing_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = set(os.listdir(tmp_path))
    done = in_subprocess(str(script), env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 2
    for rank_pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(rank_pid), 0)
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_ranks_end_with_a_caller_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, str(script), "hang"], stdout=subprocess.PIPE, text=True, env=environ)
    with caller:
        pids = [int(p) for p in caller.stdout.readline().split()]
        assert len(pids) == 2
        assert {int(caller.stdout.readline()) for _ in pids} == set(pids)
        caller.kill()
        # both ranks hold the other end of stdout, which is closed when they have ended
        assert caller.stdout.read() == ""
    assert os.listdir(tmp_path) == ["script.py"]
