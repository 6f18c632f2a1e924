"""Native collectives: what ranks compare, and how they learn that they are out of step.

gloo stands in for NCCL, with ranks that wait for no comparison after the first calls.
"""

import functools
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from failing import errors_of
from torch import Tensor, nn

import syncnorm
from syncnorm import comm
from syncnorm.comm import communicator, native
from syncnorm.testing import assert_close, run_ranks


class StandInNCCL(dist.ProcessGroupGloo):
    """gloo with the constructor of ``dist.ProcessGroupNCCL``, whose collectives can be aborted."""

    made: ClassVar[list[SimpleNamespace]] = []

    def __init__(self, store, rank, size, options):
        super().__init__(store, rank, size, options._timeout)
        self.made.append(options)
        self._aborted = threading.Event()

    @staticmethod
    def Options() -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace())

    def _allgather_base(self, rows, row, options):
        return self._until_aborted(super()._allgather_base(rows, row, options))

    def allreduce(self, tensors, options):
        return self._until_aborted(super().allreduce(tensors, options))

    def _until_aborted(self, work):
        while not work.is_completed() and not self._aborted.wait(0.001):
            pass
        return SimpleNamespace(wait=lambda: None)

    def abort(self):
        self._aborted.set()


def name_of_backend(name: str, *_: object) -> str:
    """Not a mock, which would keep the groups that it is asked for."""
    return name


@contextmanager
def like_nccl(compared_calls: int, own: bool = False) -> Iterator[None]:
    """Ranks call gloo's collectives as they call NCCL's; in a communicator of their own or in that of the job."""
    with (
        mock.patch.object(native, "COMPARED_CALLS", compared_calls),
        mock.patch.object(native, "_ON_THE_DEVICE", ("gloo", "nccl")),
        mock.patch.object(dist, "ProcessGroupNCCL", StandInNCCL, create=True),
        mock.patch.object(communicator, "backend_of", functools.partial(name_of_backend, "nccl" if own else "gloo")),
    ):
        yield


def layers(*names: str, width: int = 4) -> nn.ModuleDict:
    return syncnorm.convert(nn.ModuleDict({name: nn.BatchNorm1d(width) for name in names}), transport="native")


def _rank_comes_to_a_layer_for_the_first_time() -> list[str]:
    net = layers("a", "b")
    net["a"](torch.randn(3, 4))
    other = net["ab"[dist.get_rank()]]
    return errors_of(lambda: other(torch.randn(3, 4)), lambda: net["b"](torch.randn(3, 4)))


def _rank_sends_more_values() -> list[str]:
    net = layers("a", width=4 + 2000 * dist.get_rank())
    return errors_of(lambda: net["a"](torch.randn(3, 4 + 2000 * dist.get_rank())))


def _rank_goes_back_while_others_go_forward() -> list[str]:
    net = layers("a", "b")
    y = net["a"](torch.randn(3, 4))
    dy = torch.randn(3, 4)
    return errors_of(lambda: y.backward(dy) if dist.get_rank() else net["b"](torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (_rank_comes_to_a_layer_for_the_first_time, ["rank 0: forward of a (call 2", "rank 1: forward of b (call 2"]),
        (_rank_sends_more_values, ["rank 0: forward of a (call 1 of the group; 4 ch", "2004 channels"]),
        (_rank_goes_back_while_others_go_forward, ["rank 0: forward of b (call 2", "rank 1: backward of a (call 1"]),
    ],
)
def test_ranks_out_of_step_raise_before_a_collective_starts(function, texts):
    for rank, (error, *rest) in enumerate(run_ranks(function, timeout=30)):
        assert error.startswith(f"SyncNormError: rank {rank}: ranks that share statistics called different layers")
        assert all(text in error for text in texts)
        assert rest in ([], ["no error"])


def _rank_is_out_of_step_later(own: bool) -> tuple[list[str], Tensor, bool, list[str], int]:
    with like_nccl(compared_calls=2, own=own):
        net = layers("a", "b" * 300)
        net["a"](torch.randn(3, 4)).backward(torch.randn(3, 4))
        other = net[["a", "b" * 300][dist.get_rank()]]
        y = other(torch.randn(3, 4))
        after = errors_of(lambda: net["a"](torch.randn(3, 4)), lambda: net["a"](torch.randn(3, 4)))
        means = torch.stack([layer.running_mean for layer in net.values()])
        syncnorm.convert(net)
        again = errors_of(lambda: net["a"](torch.randn(3, 4)).backward(torch.randn(3, 4)))
        tracked = sum(int(layer.num_batches_tracked) for layer in net.values())
    return after, y.detach(), bool(means.isfinite().all()), again, tracked


@pytest.mark.parametrize("own", [False, True])
def test_later_a_wrong_tag_gives_nan_and_an_error_at_the_next_call(own):
    for rank, (after, y, finite, again, tracked) in enumerate(run_ranks(_rank_is_out_of_step_later, args=(own,))):
        name = "b" * 300 if rank else "a"
        assert after[0].startswith(f"SyncNormError: rank {rank}: another rank did not run forward of {name} (call ")
        assert "cannot be synchronized over ranks [0, 1] anymore" in after[1]
        assert y.isnan().all()
        assert finite
        assert again == ["no error"]
        assert tracked == 2  # not the call that was out of step


def _rank_backward_is_out_of_step() -> tuple[bool, list[str]]:
    with like_nccl(compared_calls=2):
        net = layers("a", "b")
        x = torch.randn(3, 4, requires_grad=True)
        ys = [net[name](x) for name in "ab"]
        (dx,) = torch.autograd.grad(ys[dist.get_rank()], x, torch.randn(3, 4))
        return bool(dx.isnan().all()), errors_of(lambda: net["a"](x))


def test_a_backward_out_of_step_gives_nan():
    for rank, (poisoned, (error,)) in enumerate(run_ranks(_rank_backward_is_out_of_step)):
        assert poisoned
        assert f"rank {rank}: another rank did not run backward of {'ab'[rank]} (call {rank + 1}" in error


def refuse_nan(y: Tensor) -> None:
    if y.isnan().all():
        raise RuntimeError("all values are NaN")


def _rank_refuses_its_input(compared_calls: int) -> tuple[list[str], float]:
    with like_nccl(compared_calls, own=True):
        net = layers("a")
        for _ in range(3):
            net["a"](torch.randn(3, 4))
        began = time.monotonic()
        errors = errors_of(
            lambda: refuse_nan(net["a"](torch.randn(3, 4 + dist.get_rank()))),
            lambda: refuse_nan(net["a"](torch.randn(3, 4))),
        )
        return errors, time.monotonic() - began


@pytest.mark.parametrize("compared_calls", [1000, 2])
def test_ranks_learn_of_an_input_that_another_one_refused(compared_calls):
    results = run_ranks(_rank_refuses_its_input, args=(compared_calls,), timeout=40)
    refused = "rank 1: expected 4 channels in dimension 1, got 5"
    (first, seconds), (second, _) = results
    assert second[0].startswith("InputError: " + refused)
    assert seconds < 15  # the timeout of the group is longer
    if compared_calls == 1000:
        assert "rank 1 did not take part in forward of a (call 4" in first[0]
        assert refused in first[0]
        assert first[1] == second[1] == "no error"
    else:  # the collective that waited was ended, its result is NaN, and the next call says why
        assert first[0] == "RuntimeError: all values are NaN"
        assert f"rank 1 did not take part, because its own input was invalid: {refused}" in first[1]


def _rank_runs_out_of_memory_in_a_call() -> list[str]:
    with like_nccl(1000, own=True):
        net = layers("a")
        x = torch.randn(3, 4, requires_grad=True)
        y = net["a"](x)
        fails = dist.get_rank() == 1
        with (
            mock.patch.object(native.NativeCall, "sum_", side_effect=MemoryError("none left"))
            if fails
            else nullcontext()
        ):
            errors = errors_of(lambda: y.backward(torch.randn(3, 4)), lambda: net["a"](x))
        syncnorm.convert(net)
        return errors + errors_of(lambda: refuse_nan(net["a"](x)))


def test_ranks_do_not_wait_for_one_that_failed_between_comparison_and_collective():
    (first, second) = run_ranks(_rank_runs_out_of_memory_in_a_call, timeout=30)
    assert second[0].startswith("MemoryError: none left")
    assert first[0] == "no error"  # on a GPU the host does not wait for the collective, which was ended
    for errors in (first, second):
        assert "rank 1 did not take part, because it raised MemoryError: none left" in errors[1]
        assert errors[2] == "no error"


def _rank_describes_its_communicator(setting: str) -> tuple[str, list[dict], list[str]]:
    with like_nccl(1000, own=True), mock.patch.dict("os.environ", SYNCNORM_COMMUNICATOR=setting):
        StandInNCCL.made.clear()
        net = layers("a")
        errors = errors_of(lambda: net["a"](torch.randn(3, 4)))
        return comm.transport_of(None), [{**vars(o), **vars(o.config)} for o in StandInNCCL.made], errors


def test_nccl_gets_a_communicator_of_its_own_unless_the_job_shares_its():
    for description, (options,), errors in run_ranks(_rank_describes_its_communicator, args=("",)):
        assert description == "native: the collectives of torch.distributed over nccl, own communicator"
        assert options["max_ctas"] <= 4
        assert options["global_ranks_in_group"] == [0, 1]
        assert options["group_name"].startswith("syncnorm/")
        assert errors == ["no error"]
    for description, made, errors in run_ranks(_rank_describes_its_communicator, args=("job",)):
        assert (description[-9:], made, errors) == ("over nccl", [], ["no error"])
    for _, _, (error,) in run_ranks(_rank_describes_its_communicator, args=("mine",)):
        assert "SYNCNORM_COMMUNICATOR must be own or job, got 'mine'" in error


def _rank_uses_one_setting_each() -> list[str]:
    setting = ("own", "job")[dist.get_rank()]
    with like_nccl(1000, own=True), mock.patch.dict("os.environ", SYNCNORM_COMMUNICATOR=setting):
        return errors_of(lambda: layers("a")["a"](torch.randn(3, 4)))


def test_ranks_with_different_communicators_raise():
    for rank, (error,) in enumerate(run_ranks(_rank_uses_one_setting_each, timeout=30)):
        assert f"rank {rank}: the ranks have different settings:\n  rank 0: SYNCNORM_COMMUNICATOR=own," in error
        assert "rank 1: SYNCNORM_COMMUNICATOR=job," in error


def _rank_in_debug_mode() -> list[str]:
    with like_nccl(compared_calls=0):
        syncnorm.set_debug(True)
        try:
            return errors_of(lambda: layers("a", "b")["ab"[dist.get_rank()]](torch.randn(3, 4)))
        finally:
            syncnorm.set_debug(False)


def test_in_debug_mode_all_calls_are_compared():
    for (error,) in run_ranks(_rank_in_debug_mode):
        assert "rank 0: forward of a (call 1" in error
        assert "rank 1: forward of b (call 1" in error


def _rank_sees_another_one_in_debug_mode() -> tuple[list[str], list[str]]:
    with like_nccl(compared_calls=1):
        syncnorm.set_debug(dist.get_rank() == 1)
        try:
            net = layers("a", "b")
            usual = errors_of(*[lambda: net["a"](torch.randn(3, 4))] * 3)
            return usual, errors_of(lambda: net["ab"[dist.get_rank()]](torch.randn(3, 4)))
        finally:
            syncnorm.set_debug(False)


def test_one_rank_in_debug_mode_is_enough():
    for usual, (error,) in run_ranks(_rank_sees_another_one_in_debug_mode, timeout=30):
        assert usual == ["no error"] * 3
        assert "rank 0: forward of a (call 4" in error
        assert "rank 1: forward of b (call 4" in error


def _rank_gathers_and_sums() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    cpu = torch.device("cpu")
    with mock.patch.dict("os.environ", SYNCNORM_TRANSPORT="native"):
        group = dist.group.WORLD
        forward, backward = (
            comm.native_call(kind, "a", 2, torch.float32, 0.0, group, cpu, 1)
            for kind in (comm.Kind.FORWARD, comm.Kind.BACKWARD)
        )
        rows = native.gather([torch.full((3,), float(rank))], forward)
        (total,) = native.reduce([torch.full((3,), 1.0 + rank)], backward)()
    return rows, total


def test_gather_and_sum():
    for rows, total in run_ranks(_rank_gathers_and_sums, 3):
        assert rows.tolist() == [[0] * 3, [1] * 3, [2] * 3]
        assert_close(total, torch.full((3,), 6.0, dtype=torch.float64), torch.float32)


def _rank_lists_its_collectives(forward: str) -> list[str]:
    found = []
    with (
        mock.patch.dict("os.environ", SYNCNORM_FORWARD=forward),
        mock.patch.object(native, "SUM_FROM_RANKS", 2),
        mock.patch.object(native.NativeCall, "gather", lambda *args: found.append("gather") or gather(*args)),
        mock.patch.object(native.NativeCall, "sum_", lambda *args: found.append("sum") or sum_(*args)),
    ):
        net = layers("a")
        net["a"](torch.randn(3, 4)).backward(torch.randn(3, 4))
        net.double()["a"](torch.randn(3, 4).double())
    return found


gather, sum_ = native.NativeCall.gather, native.NativeCall.sum_


@pytest.mark.parametrize(("forward", "first"), [("", "sum"), ("auto", "sum"), ("gather", "gather"), ("sum", "sum")])
def test_from_many_ranks_on_forwards_sum(forward, first):
    for found in run_ranks(_rank_lists_its_collectives, args=(forward,)):
        assert found == [first, "sum", "gather"]  # fp64 is always gathered


def _rank_destroys_a_group(own: bool) -> list[bool]:
    with like_nccl(compared_calls=2, own=own):
        group = dist.new_group()
        net = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), process_group=group, transport="native")
        for _ in range(3):
            net(torch.randn(3, 4)).backward(torch.randn(3, 4))
        freed = weakref.ref(comm.peers_of(group).exchange), weakref.ref(group)
        del net
        dist.destroy_process_group(group)
        del group
        gc.collect()
    return [reference() is None for reference in freed]


@pytest.mark.parametrize("own", [False, True])
def test_a_destroyed_group_is_freed(own):
    assert run_ranks(_rank_destroys_a_group, args=(own,)) == [[True, True]] * 2
