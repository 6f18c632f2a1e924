"""The choice of a transport: the variable, the argument, what ranks do that were told differently or cannot do it."""

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from failing import errors_of
from torch import nn

import syncnorm
from syncnorm import comm, native
from syncnorm.errors import InputError
from syncnorm.testing import RankError, run_ranks

SHARED = "shared memory, 2 ranks of one host"
NATIVE = "native: the collectives of torch.distributed over gloo"


def model(**options: object) -> nn.Module:
    return syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), **options)


def train(net: nn.Module) -> None:
    """A forward and a backward; checks what the ranks exchanged."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net(torch.full((2, 4), float(rank), requires_grad=True)).sum().backward()
    expected = 0.1 * (world_size - 1) / 2
    torch.testing.assert_close(net[0].running_mean, torch.full((4,), expected))


def _rank_has_variable(values: list[str]) -> list[str]:
    os.environ["SYNCNORM_TRANSPORT"] = values[dist.get_rank()]
    net = model()
    return errors_of(lambda: net(torch.randn(3, 4)), lambda: net(torch.randn(3, 4)))


@pytest.mark.parametrize(
    "values", [("native", "auto"), ("auto", "native"), ("gloo", "shm"), ("shn", "auto"), ("native", "shn")]
)
def test_ranks_that_were_told_different_transports_all_say_so(values):
    for rank, errors in enumerate(run_ranks(_rank_has_variable, args=(values,), timeout=30)):
        for error in errors:
            assert error.startswith(f"SyncNormError: rank {rank}: the ranks chose different transports")
            assert f"rank 0: {values[0]}\n  rank 1: {values[1]}\n" in error
            assert "Set SYNCNORM_TRANSPORT, or transport= of syncnorm.convert, to the same value" in error


def test_an_unknown_transport_is_an_error_on_all_ranks():
    for errors in run_ranks(_rank_has_variable, args=(["shn", "shn"],), timeout=30):
        for error in errors:
            assert error.startswith("InputError")
            assert "must be one of auto, shm, gloo, native, got 'shn'" in error


def _rank_is_described(transport: str | None, variable: str) -> list[str]:
    os.environ["SYNCNORM_TRANSPORT"] = variable
    net = model(transport=transport)
    lines = [str(syncnorm.describe(net)).splitlines()[-1]]
    train(net)
    return [*lines, str(syncnorm.describe(net)).splitlines()[-1]]


@pytest.mark.parametrize(
    ("transport", "variable", "before", "after"),
    [
        (None, "", "auto, not connected yet", f"auto: {SHARED}"),
        ("shm", "gloo", "shm, not connected yet", f"shm: {SHARED}"),  # the argument comes before the variable
        (None, "gloo", "gloo, not connected yet", "gloo: gloo, 2 ranks"),
        ("native", "", NATIVE, NATIVE),
    ],
)
def test_describe_says_how_ranks_exchange_numbers(transport, variable, before, after):
    expected = [f"group default: transport {text}" for text in (before, after)]
    assert run_ranks(_rank_is_described, args=(transport, variable)) == [expected, expected]


def _rank_converts_again() -> tuple[str, list[str]]:
    net, other = model(), nn.Sequential(nn.BatchNorm1d(4))
    train(net)
    syncnorm.convert(net, transport="auto")  # it is that already
    with pytest.raises(InputError, match=r"transport='gloo', but .* already connected in another way \(auto\)"):
        syncnorm.convert(other, transport="gloo")
    assert type(other[0]) is nn.BatchNorm1d  # nothing was changed
    syncnorm.convert(other, group_size=2, transport="gloo")  # another group
    train(other)
    return comm.transport_of(None), [comm.transport_of(layer.process_group) for layer in (net[0], other[0])]


def test_the_argument_belongs_to_a_group():
    shared = f"auto: {SHARED}"
    assert run_ranks(_rank_converts_again) == [(shared, [shared, "gloo: gloo, 2 ranks"])] * 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"transport": "auto"}, "call torch.distributed.init_process_group first"),
        ({"transport": "auto", "to": "group"}, "fuse and transport require to='sync'"),
    ],
)
def test_an_argument_without_use_is_refused(options, error):
    with pytest.raises(InputError, match=error):
        model(**options)


def _rank_1_has_nothing_in_c(transport: str) -> tuple[list[str], str]:
    net = model(transport=transport)
    without = mock.patch.multiple(native, library=None, absent="removed by the test")
    with without if dist.get_rank() == 1 else nullcontext():
        errors = errors_of(*[lambda: net(torch.randn(3, 4))] * 2)
    described = comm.transport_of(None)
    if transport == "shm":
        train(model(transport="gloo"))  # after the error another one can be chosen
    return errors, described


def test_shm_without_native_code_is_an_error_on_all_ranks_that_says_why():
    for rank, (errors, _) in enumerate(run_ranks(_rank_1_has_nothing_in_c, args=("shm",), timeout=30)):
        assert errors[0].startswith(f"SyncNormError: rank {rank}: the transport shm was chosen, but ranks cannot")
        assert "cannot be synchronized over ranks [0, 1] anymore" in errors[1]
        for error in errors:
            assert "rank 1: there is no native code, removed by the test. With auto they would use gloo" in error


def test_auto_without_native_code_is_gloo():
    for errors, described in run_ranks(_rank_1_has_nothing_in_c, args=("auto",)):
        assert errors == ["no error", "no error"]
        assert described == "auto: gloo, 2 ranks"


def _native_rank_refuses_its_first_batch() -> list[str]:
    net = model(transport="native")
    return errors_of(lambda: net(torch.randn(3, 4 + dist.get_rank())))


def test_native_ranks_that_have_not_met_learn_of_an_error():
    (first,), (second,) = run_ranks(_native_rank_refuses_its_first_batch, timeout=30)
    assert second.startswith("InputError: ")
    assert "expected 4 channels in dimension 1, got 5" in second
    assert "rank 1 did not take part in forward of 0 (call 1 of the group" in first
    assert "because its own input was invalid" in first
    assert "expected 4 channels in dimension 1, got 5" in first


def _ranks_disagree_on_a_native_group() -> None:
    os.environ["SYNCNORM_TRANSPORT"] = "native"
    net = syncnorm.convert(nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)}))
    net["ab"[dist.get_rank()]](torch.randn(3, 4))


def test_native_ranks_compare_names_at_first_calls():
    with pytest.raises(RankError) as caught:
        run_ranks(_ranks_disagree_on_a_native_group, timeout=30)
    assert caught.value.exceptions.keys() == {0, 1}
    for error in caught.value.exceptions.values():
        assert "rank 0: forward of a" in str(error)
        assert "rank 1: forward of b" in str(error)
