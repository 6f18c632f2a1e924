"""Bad input raises an error on every rank that says what to do, and leaves the buffers unchanged."""

import re
from datetime import timedelta

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm import functional
from syncnorm.errors import InputError
from syncnorm.testing import RankError, run_ranks

BAD_INPUTS = {
    "channels": (torch.randn(2, 5, 4, 4), "expected 3 channels in dimension 1, got 5: input of shape (2, 5, 4, 4)"),
    "no channels": (torch.randn(2, 0, 4, 4), "expected 3 channels in dimension 1, got 0"),
    "one dimension": (torch.randn(3), "expected at least 2 dimensions (batch, channels, ...), got shape (3,)"),
    "integers": (torch.ones(2, 3, 4, 4, dtype=torch.int64), "expected a floating-point input, got torch.int64"),
}


def feed(layer: nn.Module, x: Tensor, **kwargs: Tensor) -> tuple[str, bool]:
    """The message of the error that the layer raises, and whether the buffers are unchanged."""
    before = {k: v.clone() for k, v in layer.named_buffers()}
    with pytest.raises(InputError) as caught:
        layer(x, **kwargs)
    assert isinstance(caught.value, ValueError | syncnorm.SyncNormError)
    return str(caught.value), all(torch.equal(v, before[k]) for k, v in layer.named_buffers())


def _rank_feed_everywhere(x: Tensor) -> tuple[str, bool]:
    return feed(syncnorm.SyncBatchNorm(3), x)


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_on_every_rank(kind):
    x, message = BAD_INPUTS[kind]
    for rank, (got, untouched) in enumerate(run_ranks(_rank_feed_everywhere, args=(x,), timeout=20)):
        assert got.startswith(f"rank {rank}: {message}")
        assert untouched
    assert feed(syncnorm.SyncBatchNorm(3), x)[0].startswith(message)  # and without any group
    assert feed(syncnorm.SyncBatchNorm(3).eval(), x)[0].startswith(message)


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (syncnorm.SyncBatchNorm1d, (2, 3, 4, 4)),
        (syncnorm.SyncBatchNorm2d, (2, 3, 4)),
        (syncnorm.SyncBatchNorm3d, (2, 3, 4, 4)),
    ],
    ids=["1d", "2d", "3d"],
)
def test_dimensions_as_torch_checks_them(cls, shape):
    layer = cls(3)  # not in the list above: ranks that import this file would have layers that other ranks lack
    with pytest.raises(ValueError, match=rf"expected .*D input \(got {len(shape)}D input\)"):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0


def _rank_one_value(splits: tuple[int, ...]) -> tuple[str, bool]:
    return feed(syncnorm.SyncBatchNorm(3), torch.randn(splits[dist.get_rank()], 3))


def test_fewer_than_two_values_over_all_ranks():
    for rank, (got, untouched) in enumerate(run_ranks(_rank_one_value, 3, ((0, 1, 0),))):
        assert got.startswith(f"rank {rank}: expected more than 1 value per channel over all ranks in training, got")
        assert untouched
    message, untouched = feed(syncnorm.SyncBatchNorm(3), torch.randn(1, 3))
    assert message == "expected more than 1 value per channel, got input of shape (1, 3)"
    assert untouched


def _rank_outside_the_group() -> str:
    group = dist.new_group([0, 1])
    layer = syncnorm.SyncBatchNorm(3, process_group=group)
    x = torch.randn(2, 3)
    if dist.get_rank() < 2:
        layer(x)
        return ""
    return feed(layer, x)[0]


def test_rank_outside_the_group():
    assert run_ranks(_rank_outside_the_group, 3)[2].startswith("rank 2 is not a member of the process group")


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 4, 4), torch.ones(2, 4, 5, dtype=torch.bool), torch.ones(1, 2, 4, 4, dtype=torch.bool)],
    ids=["float", "shape", "dimensions"],
)
def test_mask_of_the_wrong_kind(mask):
    message, untouched = feed(syncnorm.SyncBatchNorm(3), torch.randn(2, 3, 4, 4), mask=mask)
    assert "expected a boolean mask that broadcasts to (batch, *spatial) = (2, 4, 4)" in message
    assert untouched


def test_vectors_of_the_wrong_length():
    x, three, four = torch.randn(2, 3), torch.zeros(3), torch.zeros(4)
    with pytest.raises(InputError, match=re.escape("expected weight to have one value for each of 3 channels")):
        syncnorm.functional.sync_batch_norm(x, three, three, four, three, training=True)
    with pytest.raises(InputError, match="come together"):
        syncnorm.functional.sync_batch_norm(x, three, None, training=True)


@pytest.mark.parametrize("group", ["world", 3, object()], ids=["str", "int", "object"])
def test_invalid_process_group(group):
    with pytest.raises(InputError, match="process_group must be a ProcessGroup, a 1-D DeviceMesh or None"):
        syncnorm.SyncBatchNorm(3, process_group=group)


def _rank_mesh_of_two_dimensions() -> None:
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(InputError, match="DeviceMesh of 2 dimensions"):
        syncnorm.SyncBatchNorm(3, process_group=mesh)


def test_mesh_of_two_dimensions():
    run_ranks(_rank_mesh_of_two_dimensions)


def _rank_fails_before_the_collective() -> None:
    channels = 3 if dist.get_rank() == 0 else 4
    syncnorm.SyncBatchNorm(3)(torch.randn(2, channels))


def test_an_error_on_one_rank_reaches_the_others():
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_fails_before_the_collective, timeout=20)
    assert isinstance(caught.value.exceptions[1], InputError)
    message = str(caught.value.exceptions[0])
    assert isinstance(caught.value.exceptions[0], syncnorm.SyncNormError)
    assert message.startswith(
        "rank 0: rank 1 did not take part in forward of SyncBatchNorm no. 1 (call 1 of the group; 3 channels, "
    )
    assert "its own input was invalid: rank 1: expected 3 channels in dimension 1, got 4" in message


def _rank_own_forward_with_bad_input() -> tuple[str, bool]:
    layer = syncnorm.convert(models.BatchNormAct(3))
    return feed(layer, torch.randn(2, 5, 4, 4))


def test_bad_input_to_a_layer_with_its_own_forward():
    for _, untouched in run_ranks(_rank_own_forward_with_bad_input, timeout=20):
        assert untouched


def _rank_forwards_alone() -> str:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(syncnorm.SyncNormError) as caught:
        functional.sync_batch_norm(
            torch.randn(2, 3), None, None, training=True, process_group=group, layer_name="norm"
        )
    return str(caught.value)


def test_a_rank_that_never_calls_the_layer():
    message, _ = run_ranks(_rank_forwards_alone, timeout=30)
    assert "rank 0: forward of norm" in message
    assert "could not connect to ranks [0, 1]: not all ranks came to their first synced layer" in message
