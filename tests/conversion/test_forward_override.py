"""Layers with their own forward: its calls of ``F.batch_norm`` are synchronized, or a warning names the layer."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from versions import one_graph

import syncnorm
from syncnorm._torch_versions import ONE_GRAPH
from syncnorm.testing import assert_close, run_ranks


def _rank_subclass_step(cls: type[nn.BatchNorm2d], rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    layer = syncnorm.convert(cls(3))
    x = subclass_batch(rows, 0)[rank].requires_grad_()
    y = layer(x)
    y.backward(subclass_batch(rows, 1)[rank])
    assert x.grad is not None
    return y.detach(), x.grad, layer.running_var


def subclass_batch(rows: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(sum(rows), 3, 4, 4, generator=generator).split(rows))


@pytest.mark.parametrize("cls", models.SUBCLASSES)
def test_subclasses_synchronize_their_calls_of_batch_norm(cls):
    rows = (4, 1)
    layer = cls(3).double()
    x = torch.cat(subclass_batch(rows, 0)).double().requires_grad_()
    y = layer(x)
    y.backward(torch.cat(subclass_batch(rows, 1)).double())
    for rank, (got_y, got_dx, got_var) in enumerate(run_ranks(_rank_subclass_step, 2, (cls, rows))):
        assert_close(got_y, y.detach().split(rows)[rank], torch.float32)
        assert_close(got_dx, x.grad.split(rows)[rank], torch.float32)
        assert_close(got_var, layer.running_var, torch.float32)


def _rank_own_in_training() -> list[str]:
    layer = syncnorm.convert(models.OwnInTraining(3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer(torch.randn(2, 3, 4, 4))
    return [str(w.message) for w in said]


def test_a_subclass_that_does_not_call_batch_norm_in_training_warns():
    for messages in run_ranks(_rank_own_in_training):
        assert len(messages) == 1
        assert messages[0].startswith("SyncOwnInTraining did not call F.batch_norm in training")


ROWS = (4, 1, 2)
CHANNELS, USED = 5, 3


class Slimmable(nn.BatchNorm2d):
    """Uses the first channels of its tensors, as many as the input has."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.size(1)
        return self.normalize(x, self.running_mean[:c], self.running_var[:c], self.weight[:c], self.bias[:c])

    def normalize(self, x: Tensor, *vectors: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, *vectors, self.training, 0.1, self.eps)


class SlimmableDetached(Slimmable):
    """Passes parts of tensors that are not views for autograd."""

    def forward(self, x: Tensor) -> Tensor:
        part = torch.arange(CHANNELS)[-x.size(1) :]
        mean, var = self.running_mean.data[-x.size(1) :], self.running_var.detach().narrow(0, int(part[0]), len(part))
        return self.normalize(x, mean, var, self.weight[part], self.bias[part])


class SlimmableReshaped(Slimmable):
    """Passes a row of a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.normalize(x, *(v.view(1, -1)[0, : x.size(1)] for v in vectors))


class Switchable(Slimmable):
    """Has separate statistics for each width."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.register_buffer("mean_of_few", torch.zeros(USED))
        self.register_buffer("var_of_few", torch.ones(USED))

    def forward(self, x: Tensor) -> Tensor:
        c = x.size(1)
        return self.normalize(x, self.mean_of_few, self.var_of_few, self.weight[:c], self.bias[:c])


class Around(nn.BatchNorm2d):
    """Uses the statistics of a child, which it never calls."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.bn = nn.BatchNorm2d(num_features)

    def chosen(self) -> nn.BatchNorm2d:
        return self.bn

    def forward(self, x: Tensor) -> Tensor:
        bn, c = self.chosen(), x.size(1)
        if self.training:
            bn.num_batches_tracked.add_(1)
        vectors = (bn.running_mean[:c], bn.running_var[:c], bn.weight[:c], bn.bias[:c])
        return F.batch_norm(x, *vectors, training=self.training, momentum=0.1, eps=bn.eps)


class AroundList(Around):
    """Has the child in a list."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.bn = nn.ModuleList(nn.BatchNorm2d(num_features) for _ in range(2))

    def chosen(self) -> nn.BatchNorm2d:
        return self.bn[1]


OVERRIDDEN = [Slimmable, SlimmableDetached, SlimmableReshaped, Switchable, Around, AroundList]


def model_of(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    layer = cls(CHANNELS)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(2, USED, 1), layer, nn.Tanh()).double()


def batch(seed: int, channels: int = 2) -> Tensor:
    return torch.randn(sum(ROWS), channels, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(model: Callable[[Tensor], Tensor], part: Callable[[Tensor], Tensor], again: bool = False) -> list[Tensor]:
    """Outputs and input gradients of two steps."""
    results = []
    for step in range(2):
        x = part(batch(step)).clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.backward(part(batch(10 + step, USED)))
        results += [y.detach(), x.grad]
    return results


def part_of_rank(whole: Tensor) -> Tensor:
    return whole.split(ROWS)[dist.get_rank()]


def _rank_train(cls: type[nn.Module], how: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = syncnorm.convert(model_of(cls))
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        results = train(call, part_of_rank, again=how == "checkpointed")
    return {
        "results": results,
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
        "synced": [layer.synced for layer in syncnorm.describe(model)],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def check(cls: type[nn.Module], ranks: Sequence[dict[str, Any]]) -> None:
    model = model_of(cls)
    want = train(model, lambda whole: whole)
    for i, tensor in enumerate(want):
        for got, expected in zip(ranks, tensor.split(ROWS), strict=True):
            assert_close(got["results"][i], expected, torch.float64)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert_close(sum(got["gradients"][name] for got in ranks), gradient, torch.float64)
    for got in ranks:
        assert got["gradients"].keys() == gradients.keys()
        for name, buffer in model.named_buffers():
            assert_close(got["buffers"][name], buffer, torch.float64)
        assert all(got["synced"])


@pytest.mark.parametrize("how", ["eager", "checkpointed"])
@pytest.mark.parametrize("cls", OVERRIDDEN)
def test_parts_of_buffers_and_buffers_of_a_child_are_synced(cls, how):
    check(cls, run_ranks(_rank_train, len(ROWS), (cls, how)))


@one_graph
@pytest.mark.slow
@pytest.mark.parametrize("cls", [Slimmable, Around, AroundList])
def test_compiles_to_one_graph(cls):
    ranks = run_ranks(_rank_train, len(ROWS), (cls, "compiled"), timeout=100)
    check(cls, ranks)
    assert [got["graphs"] for got in ranks] == [1] * len(ROWS)


def flatten(layers: Sequence[nn.Module]) -> None:
    """Makes the buffers of each name rows of one tensor."""
    for name in ("running_mean", "running_var"):
        rows = torch.stack([getattr(layer, name) for layer in layers])
        for layer, row in zip(layers, rows, strict=True):
            setattr(layer, name, row)


def _rank_child_with_a_group(flattened: bool) -> tuple[list[float], list[float]]:
    """Running means of a layer over all ranks, and of one whose child has a group of one rank; uses one channel."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    whole, around = Slimmable(2), Around(2)
    if flattened:
        flatten([whole, around, around.bn])
    syncnorm.convert(whole)
    syncnorm.convert(around).bn.process_group = alone
    means = []
    for layer in (whole, around):
        layer(torch.full((2, 1, 2, 2), float(dist.get_rank())))
        named = dict(layer.named_buffers())
        means.append([value for n, b in named.items() if n.endswith("running_mean") for value in b.tolist()])
    return tuple(means)


@pytest.mark.parametrize("flattened", [False, True])
def test_a_child_is_synced_over_its_own_group(flattened):
    for rank, (whole, around) in enumerate(run_ranks(_rank_child_with_a_group, args=(flattened,))):
        assert whole == pytest.approx([0.05, 0])
        assert around == pytest.approx([0, 0, 0.1 * rank, 0])


def test_fake_tensors_without_an_address():
    with FakeTensorMode():
        layer = syncnorm.convert(Slimmable(CHANNELS))
        assert layer(torch.randn(4, USED, 2, 2)).shape == (4, USED, 2, 2)
    assert syncnorm.describe(layer)[0].synced


class Copying(Slimmable):
    """Passes copies of its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = self.normalize(x, mean, var, self.weight, self.bias)
        self.running_mean.copy_(mean)
        return y


class CopyingToo(Copying):
    """One call with its own statistics, and one with copies."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().normalize(x, self.running_mean, self.running_var, self.weight, self.bias))


def _rank_warnings_and_description(cls: type[nn.Module], compiled: bool) -> tuple[list[str], list[Any], bool]:
    torch._dynamo.reset()
    model = syncnorm.convert(nn.Sequential(cls(3)))
    call = torch.compile(model, fullgraph=ONE_GRAPH, backend="eager") if compiled else model
    before = syncnorm.describe(model)[0].synced
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            call(torch.randn(2, 3, 4, 4))
    return [str(w.message) for w in said if "syncnorm" in str(w.message)], syncnorm.describe(model), before


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cls", [Copying, CopyingToo])
def test_statistics_of_no_layer_warn_once(cls, compiled):
    for messages, (row,), before in run_ranks(_rank_warnings_and_description, 2, (cls, compiled), timeout=100):
        assert before
        assert len(messages) == 1
        assert messages[0].startswith(
            f"Sync{cls.__name__} calls F.batch_norm in training with statistics that belong"
        )
        assert "(0)" in messages[0]
        assert (row.synced, row.group) == (False, "-")
        assert "belong to no synced layer: call the layer, or syncnorm.functional.sync_batch_norm" in row.note


def test_a_child_that_was_reverted_by_itself_is_not_synced():
    layer = syncnorm.convert(Around(3))
    syncnorm.revert(layer.bn)
    with pytest.warns(UserWarning, match="belong to no synced layer"):
        layer(torch.randn(2, 3, 4, 4))
    assert [row.synced for row in syncnorm.describe(layer)] == [False, False]


@pytest.mark.parametrize("cls", [Slimmable, SlimmableDetached, Switchable])
def test_group_norm_accepts_parts_of_buffers(cls):
    layer = syncnorm.convert(cls(CHANNELS), to="group", num_groups=1)
    x = torch.randn(2, USED, 4, 4)
    torch.testing.assert_close(layer(x), F.group_norm(x, 1))
