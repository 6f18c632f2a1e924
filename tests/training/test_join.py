"""Ranks with different numbers of batches in torch's Join, compared with one fp64 process on the same batches."""

import copy

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import comm
from syncnorm._torch_versions import DDP_BUFFERS
from syncnorm.testing import RankError, assert_close, run_ranks
from syncnorm.training import joinable

ROWS = 3
EPOCHS = 2


def batches(rank: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs of different sizes, and cotangents."""
    generator = torch.Generator().manual_seed(rank)
    rows = [ROWS + rank + step for step in range(steps)]
    return [(torch.randn(n, 3, 5, 5, generator=generator), torch.randn(n, 4, generator=generator)) for n in rows]


def _rank_train(steps: list[int], order: str, sync_buffers: bool = True) -> dict[str, Tensor]:
    rank = dist.get_rank()
    ddp = DistributedDataParallel(syncnorm.convert(models.net()), **{DDP_BUFFERS: sync_buffers})
    optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
    for _ in range(EPOCHS):
        joinables = [ddp, joinable(ddp)] if order == "ddp first" else [joinable(ddp), ddp]
        with Join(joinables):
            for x, dy in batches(rank, steps[rank]):
                optimizer.zero_grad()
                ddp(x).backward(dy)
                optimizer.step()
    return copy.deepcopy(ddp.module.state_dict())


def reference(steps: list[int]) -> dict[str, Tensor]:
    """One process in fp64, on the batches of the ranks that still have data; averages gradients as DDP does."""
    model = models.net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    data = [batches(rank, n) for rank, n in enumerate(steps)]
    for step in [*range(max(steps))] * EPOCHS:
        parts = [d[step] for d in data if len(d) > step]
        optimizer.zero_grad()
        model(torch.cat([x for x, _ in parts]).double()).backward(torch.cat([dy for _, dy in parts]).double())
        for parameter in model.parameters():
            parameter.grad /= len(steps)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("steps", "order"),
    [
        ([4, 2], "ddp first"),
        ([1, 4], "ddp last"),
        ([2, 2], "ddp first"),
        ([0, 3], "ddp first"),  # a rank without any data
        ([3, 1, 2], "ddp first"),
    ],
)
def test_ranks_end_with_equal_parameters_and_buffers(steps, order):
    want = reference(steps)
    states = run_ranks(_rank_train, len(steps), (steps, order))
    for state in states:
        for name, value in state.items():
            assert torch.equal(value, states[0][name]), name
            assert_close(value, want[name], torch.float32)


def test_without_ddps_broadcast_of_buffers():
    want = reference([3, 1])
    for state in run_ranks(_rank_train, 2, ([3, 1], "ddp first", False)):
        assert_close(state["norm1.running_var"], want["norm1.running_var"], torch.float32)
        assert state["norm2.num_batches_tracked"] == 3 * EPOCHS


def _rank_without_ddp() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    layer = syncnorm.SyncBatchNorm2d(3)
    member = joinable(layer)
    for _ in range(2):  # a second epoch with the same joinable
        with Join([member]):
            for x, _ in batches(rank, 3 - rank):
                layer(x)
    if rank == 0:  # outside of Join one rank may make a forward
        layer.eval()(torch.randn(2, 3, 5, 5))
    return layer.running_mean, layer.num_batches_tracked


def test_a_model_without_ddp_twice():
    layer = nn.BatchNorm2d(3).double()
    for _ in range(2):
        for step in range(3):
            layer(torch.cat([batches(r, 3 - r)[step][0] for r in range(2) if 3 - r > step]).double())
    for mean, tracked in run_ranks(_rank_without_ddp):
        assert tracked == 6
        assert_close(mean, layer.running_mean, torch.float32)


class Swapping(models.Net):
    """Runs its norms in another order from the second step, on one rank."""

    step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = self.conv1(x)
        norms = [self.norm1, self.norm2]
        if self.step > 1 and dist.get_rank() == 1:
            norms.reverse()
        for norm in norms:
            x = norm(x)
        return self.head(self.conv2(x).mean((2, 3)))


def _rank_two_disagree_while_one_has_joined() -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    ddp = DistributedDataParallel(syncnorm.convert(Swapping()))
    with Join([ddp, joinable(ddp)]):
        for x, dy in batches(rank, 1 if rank == 2 else 4):
            ddp(x).backward(dy)


def test_an_order_that_changes_on_one_rank_is_an_error_on_all():
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_two_disagree_while_one_has_joined, 3, timeout=40)
    assert caught.value.exceptions.keys() == {0, 1, 2}
    for rank, error in caught.value.exceptions.items():
        assert isinstance(error, syncnorm.SyncNormError), (rank, error)
        assert "rank 0: forward of norm1 (call 5 of the group; 6 channels" in str(error)
        assert "rank 1: forward of norm2 (call 5 of the group; 6 channels" in str(error)
        assert "rank 2: has no more data (Join)" in str(error)


def _rank_order_changes_everywhere() -> int:
    rank = dist.get_rank()
    layers = [syncnorm.convert(nn.BatchNorm2d(3)) for _ in range(2)]
    net = nn.ModuleList(layers)
    net.forward = lambda x, flip: net[not flip](net[flip](x))
    with Join([joinable(net)]):
        for step, (x, _) in enumerate(batches(rank, 4 - 2 * rank)):
            net(x, step % 2)
    return int(net[0].num_batches_tracked)


def test_the_order_of_layers_may_change_on_all_ranks():
    assert run_ranks(_rank_order_changes_everywhere) == [4, 4]


def _rank_returns_to_native_collectives() -> tuple[list[bool], dict[str, Tensor]]:
    net = syncnorm.convert(models.net(), transport="native")
    ddp = DistributedDataParallel(net)
    group, cpu = dist.group.WORLD, torch.device("cpu")
    in_frames = [comm.exchange_of(group, cpu) is not None]
    waiting = joinable(ddp)
    in_frames.append(comm.exchange_of(group, cpu) is not None)
    with Join([ddp, waiting]):
        for x, dy in batches(dist.get_rank(), 1 + dist.get_rank()):
            ddp(x).backward(dy)
            in_frames.append(comm.exchange_of(group, cpu) is not None)
    in_frames.append(comm.exchange_of(group, cpu) is not None)
    ddp(batches(0, 1)[0][0])
    return in_frames, net.state_dict()


def test_after_join_layers_use_native_collectives_again():
    results = run_ranks(_rank_returns_to_native_collectives)
    for rank, (in_frames, _) in enumerate(results):
        assert in_frames == [False, False] + [True] * (1 + rank) + [False]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name
