"""Ranks that make different calls get a clear error on all of them; a dead rank is named; no_sync_stats."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.functional import sync_batch_norm
from syncnorm.testing import RankError, assert_close, run_ranks


def pair(width: int = 4) -> nn.ModuleDict:
    return syncnorm.convert(nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(width)}))


def _rank_other_order() -> None:
    layers = pair()
    for name in "ab" if dist.get_rank() == 0 else "ba":
        layers[name](torch.randn(3, 4))


def _rank_skips_a_layer() -> None:
    layers = pair()
    x = torch.randn(3, 4, requires_grad=True)
    y = layers["a"](x)
    if dist.get_rank() == 0:
        y = layers["b"](y)
    y.backward(torch.randn(3, 4))


def _rank_wider_layer() -> None:
    layers = pair(4 if dist.get_rank() == 0 else 4096)  # more than fits into a frame
    layers["a"](torch.randn(3, 4))
    layers["b"](torch.randn(3, layers["b"].num_features))


def _rank_other_dtype() -> None:
    dtype = torch.float32 if dist.get_rank() == 0 else torch.float64
    syncnorm.SyncBatchNorm(4, dtype=dtype)(torch.randn(3, 4, dtype=dtype))


def _rank_other_eps() -> None:
    syncnorm.SyncBatchNorm(4, eps=1e-5 if dist.get_rank() == 0 else 1e-3)(torch.randn(3, 4))


def _rank_other_backward_order() -> None:
    layer = syncnorm.SyncBatchNorm(4)
    outputs = [layer(torch.randn(3, 4, requires_grad=True)) for _ in range(2)]
    for y in outputs if dist.get_rank() == 0 else reversed(outputs):
        y.backward(torch.randn(3, 4))


def _rank_extra_forward() -> None:
    layers = pair()
    if dist.get_rank() == 0:
        layers["a"](torch.randn(3, 4))
    layers["b"](layers["a"](torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (_rank_other_order, ["rank 0: forward of a (call 1 of the group; 4 ch", "rank 1: forward of b (call 1"]),
        (_rank_skips_a_layer, ["rank 0: forward of b (call 2", "rank 1: backward of a (call 1"]),
        (_rank_wider_layer, ["rank 0: forward of b (call 2 of the group; 4 ch", "group; 4096 ch"]),
        (_rank_other_dtype, ["rank 0: forward of SyncBatchNorm no. 1", "float32 statistics", "float64 statistics"]),
        (_rank_other_eps, ["eps 1e-05", "eps 0.001"]),
        (_rank_other_backward_order, ["rank 0: backward of SyncBatchNorm no. 1 (call 1", "no. 1 (call 2"]),
        (_rank_extra_forward, ["rank 0: forward of a (call 2", "rank 1: forward of b (call 2"]),
    ],
)  # fmt: skip
def test_every_rank_raises_with_the_calls_of_all(function, texts):
    with pytest.raises(RankError) as caught:
        run_ranks(function, timeout=30)
    assert caught.value.exceptions.keys() == {0, 1}
    for rank, error in caught.value.exceptions.items():
        assert isinstance(error, syncnorm.SyncNormError)
        assert str(error).startswith(f"rank {rank}: ranks that share statistics called different layers:")
        for text in texts:
            assert text in str(error)


def _rank_continues_after_an_error() -> Tensor:
    layers = pair()
    with pytest.raises(syncnorm.SyncNormError):
        layers["ab"[dist.get_rank()]](torch.randn(3, 4))
    with pytest.raises(syncnorm.SyncNormError):
        layers["a"](torch.randn(3, 4 + dist.get_rank()))
    layers["b"](torch.full((2, 4), float(dist.get_rank())))
    assert (layers["a"].num_batches_tracked, layers["b"].num_batches_tracked) == (0, 1)
    return layers["b"].running_mean


def test_after_an_error_the_group_is_usable_and_the_buffers_are_unchanged():
    for mean in run_ranks(_rank_continues_after_an_error, timeout=30):
        assert_close(mean, torch.full((4,), 0.05, dtype=torch.float64), torch.float32)


def _rank_one_dies() -> None:
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)))
    layer(torch.randn(3, 4))
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    layer(torch.randn(3, 4))


def test_a_rank_that_dies_is_named():
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_one_dies, 3, timeout=60)
    assert time.monotonic() - started < 30  # less than the timeout of the group
    for rank in (0, 1):
        message = str(caught.value.exceptions[rank])
        assert f"rank {rank}: forward of 0 (call 2 of the group; 4 channels" in message
        assert "waiting for ranks [2]" in message


def _rank_no_sync_stats_on_rank_0() -> dict[str, Tensor]:
    layer = syncnorm.SyncBatchNorm1d(4)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    if dist.get_rank() == 0:
        x = torch.randn(5, 4, requires_grad=True)
        dy = torch.randn(5, 4)
        with syncnorm.no_sync_stats():
            y = layer(x)
            functional = sync_batch_norm(x, None, None, training=True)
        y.backward(dy)
        z = x.detach().double().requires_grad_()
        want = nn.functional.batch_norm(z, None, None, training=True)
        want.backward(dy.double())
        assert_close(y.detach(), want.detach(), torch.float32)
        assert_close(functional.detach(), want.detach(), torch.float32)
        assert_close(x.grad, z.grad, torch.float32)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    layer(torch.full((2, 4), float(dist.get_rank())))  # all ranks together again
    return layer.running_mean


def test_no_sync_stats():
    for mean in run_ranks(_rank_no_sync_stats_on_rank_0, timeout=30):
        assert_close(mean, torch.full((4,), 0.05, dtype=torch.float64), torch.float32)
