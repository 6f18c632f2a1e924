"""What ``describe`` calls synced is synced: with parts of buffers, with a child's; bypassed layers are named."""

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import batch_norm as imported
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.comm import process_groups
from syncnorm.conversion import calls
from syncnorm.testing import assert_close, run_ranks

ROWS = (4, 1, 2)
CHANNELS, USED = 5, 3


class Slimmable(nn.BatchNorm2d):
    """The first channels of its own, as many as the input has."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.size(1)
        return self.normalize(x, self.running_mean[:c], self.running_var[:c], self.weight[:c], self.bias[:c])

    def normalize(self, x: Tensor, *vectors: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, *vectors, self.training, 0.1, self.eps)


class SlimmableDetached(Slimmable):
    """Parts of tensors that autograd does not know as views."""

    def forward(self, x: Tensor) -> Tensor:
        part = torch.arange(CHANNELS)[-x.size(1) :]
        mean, var = self.running_mean.data[-x.size(1) :], self.running_var.detach().narrow(0, int(part[0]), len(part))
        return self.normalize(x, mean, var, self.weight[part], self.bias[part])


class SlimmableReshaped(Slimmable):
    """A row of a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.normalize(x, *(v.view(1, -1)[0, : x.size(1)] for v in vectors))


class Switchable(Slimmable):
    """Statistics of their own for each width."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.register_buffer("mean_of_few", torch.zeros(USED))
        self.register_buffer("var_of_few", torch.ones(USED))

    def forward(self, x: Tensor) -> Tensor:
        c = x.size(1)
        return self.normalize(x, self.mean_of_few, self.var_of_few, self.weight[:c], self.bias[:c])


class Around(nn.BatchNorm2d):
    """The statistics of a child, which is never called."""

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
    """The child is one of several."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.bn = nn.ModuleList(nn.BatchNorm2d(num_features) for _ in range(2))

    def chosen(self) -> nn.BatchNorm2d:
        return self.bn[1]


FOLLOWED = [Slimmable, SlimmableDetached, SlimmableReshaped, Switchable, Around, AroundList]


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


def mine(whole: Tensor) -> Tensor:
    return whole.split(ROWS)[dist.get_rank()]


def trained(cls: type[nn.Module], how: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = syncnorm.convert(model_of(cls))
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        results = train(call, mine, again=how == "checkpointed")
    return {
        "results": results,
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
        "synced": [layer.synced for layer in syncnorm.describe(model)],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def judge(cls: type[nn.Module], ranks: Sequence[dict[str, Any]]) -> None:
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
@pytest.mark.parametrize("cls", FOLLOWED)
def test_parts_of_buffers_and_a_childs_are_synced(cls, how):
    judge(cls, run_ranks(trained, len(ROWS), (cls, how)))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Slimmable, Around, AroundList])
def test_in_one_graph(cls):
    ranks = run_ranks(trained, len(ROWS), (cls, "compiled"), timeout=100)
    judge(cls, ranks)
    assert [got["graphs"] for got in ranks] == [1] * len(ROWS)


def flatten(layers: Sequence[nn.Module]) -> None:
    """Gives buffers one storage a kind, of which each is a part."""
    for name in ("running_mean", "running_var"):
        rows = torch.stack([getattr(layer, name) for layer in layers])
        for layer, row in zip(layers, rows, strict=True):
            setattr(layer, name, row)


def groups_of_both(flattened: bool) -> tuple[list[float], list[float]]:
    """Running means of a layer over all ranks, then of one whose child is alone; of two channels one is used."""
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
    for rank, (whole, around) in enumerate(run_ranks(groups_of_both, args=(flattened,))):
        assert whole == pytest.approx([0.05, 0])
        assert around == pytest.approx([0, 0, 0.1 * rank, 0])


def test_fake_tensors_have_no_address():
    with FakeTensorMode():
        layer = syncnorm.convert(Slimmable(CHANNELS))
        assert layer(torch.randn(4, USED, 2, 2)).shape == (4, USED, 2, 2)
    assert syncnorm.describe(layer)[0].synced


class Copying(Slimmable):
    """Statistics that are no part of any buffer."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = self.normalize(x, mean, var, self.weight, self.bias)
        self.running_mean.copy_(mean)
        return y


class CopyingToo(Copying):
    """One call that can be followed, one that cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().normalize(x, self.running_mean, self.running_var, self.weight, self.bias))


def lost(cls: type[nn.Module], compiled: bool) -> tuple[list[str], list[Any], bool]:
    torch._dynamo.reset()
    model = syncnorm.convert(nn.Sequential(cls(3)))
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    before = syncnorm.describe(model)[0].synced
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            call(torch.randn(2, 3, 4, 4))
    return [str(w.message) for w in said if "syncnorm" in str(w.message)], syncnorm.describe(model), before


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cls", [Copying, CopyingToo])
def test_statistics_of_no_layer_are_named_once(cls, compiled):
    for messages, (row,), before in run_ranks(lost, 2, (cls, compiled), timeout=100):
        assert before
        assert len(messages) == 1
        assert messages[0].startswith(
            f"Sync{cls.__name__} calls F.batch_norm in training with statistics that belong"
        )
        assert "(0)" in messages[0]
        assert (row.synced, row.group) == (False, "-")
        assert "belong to no synced layer: call the layer, or syncnorm.functional.sync_batch_norm" in row.note


def test_a_child_that_was_reverted_by_itself_is_not_followed():
    layer = syncnorm.convert(Around(3))
    syncnorm.revert(layer.bn)
    with pytest.warns(UserWarning, match="belong to no synced layer"):
        layer(torch.randn(2, 3, 4, 4))
    assert [row.synced for row in syncnorm.describe(layer)] == [False, False]


@pytest.mark.parametrize("cls", [Slimmable, SlimmableDetached, Switchable])
def test_parts_of_buffers_are_group_norms_too(cls):
    layer = syncnorm.convert(cls(CHANNELS), to="group", num_groups=1)
    x = torch.randn(2, USED, 4, 4)
    torch.testing.assert_close(layer(x), F.group_norm(x, 1))


class Parent(nn.Module):
    """Calls ``F.batch_norm`` with what its child holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=self.training)


class ByTorch(Parent):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return torch.batch_norm(x, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, False)


class ByLongName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)


class ByImport(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return imported(x, self.bn.running_mean, self.bn.running_var, training=True)


class ByLocalImport(Parent):
    def forward(self, x: Tensor) -> Tensor:
        import torch.nn.functional as functional

        return functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)


class ByLocalName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.functional import batch_norm as local

        return local(x, self.bn.running_mean, self.bn.running_var, training=True)


in_training = functools.partial(F.batch_norm, training=True)


class ByPartial(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return in_training(x, self.bn.running_mean, self.bn.running_var)


class ByMethod(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)

    def normalized(self, x: Tensor) -> Tensor:
        return Parent.forward(self, x)


class ByStaticMethod(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(self.bn, x)

    @staticmethod
    def normalized(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
        return (lambda: F.batch_norm(x, bn.running_mean, bn.running_var, training=True))()


def with_statistics_of(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, training=True)


class ByFunction(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return with_statistics_of(self.bn, x)


def in_a_closure() -> type[nn.Module]:
    functional = F

    class ByClosure(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    return ByClosure


class FromList(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(3))})

    def forward(self, x: Tensor) -> Tensor:
        return with_statistics_of(self.bn["a"][0], x)


BYPASSING = [
    Parent, ByTorch, ByLongName, ByImport, ByLocalImport, ByLocalName, ByPartial, ByMethod, ByStaticMethod,
    ByFunction, in_a_closure(), FromList,
]  # fmt: skip


@pytest.mark.parametrize("cls", BYPASSING)
def test_a_layer_whose_parent_calls_batch_norm_is_not_called_synced(cls):
    model = nn.Sequential(nn.BatchNorm1d(3), cls())
    with pytest.warns(UserWarning, match=r"found 1 layer\(s\) that may be bypassed: 1\.bn") as said:
        syncnorm.convert(model)
    assert len(said) == 1
    assert said[0].filename == __file__
    model(torch.randn(4, 3))
    beside, inside = syncnorm.describe(model)
    assert beside.synced
    assert (inside.synced, inside.group) == (False, "-")
    assert inside.note == (
        f"{cls.__name__}.forward calls F.batch_norm itself: call the layer, or syncnorm.functional.sync_batch_norm"
    )
    syncnorm.revert(model)
    assert syncnorm.describe(model)[1].note == "convert() syncs it"


class Calling(nn.Module):
    """Has a child called batch_norm, and no call of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batch_norm(x))


class CallingByArgument(Calling):
    def forward(self, x: Tensor, functional: Any = None) -> Tensor:
        return self.batch_norm(x) if functional is None else functional.batch_norm(F.relu(x))


class CallingResult(Calling):
    def forward(self, x: Tensor) -> Tensor:
        return chosen(self, F).batch_norm(x)


def chosen(first: Any, second: Any) -> Any:
    return first


class CallingShadowed(Calling):
    def forward(self, x: Tensor) -> Tensor:
        F = self
        return F.batch_norm(x)


@pytest.mark.parametrize("cls", [Calling, CallingByArgument, CallingResult, CallingShadowed])
def test_a_child_called_batch_norm_is_no_call_of_the_function(cls):
    assert not calls.loads_batch_norm(cls)
    model = syncnorm.convert(cls())  # a warning would be an error
    assert syncnorm.describe(model)[0].synced
    model(torch.randn(4, 3))


class CallingBoth(Parent):
    """Calls its child, and ``F.batch_norm`` for something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.batch_norm(x, None, None, training=True))


def seen_to_run(compiled: bool) -> list[bool]:
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"found 1 layer\(s\) that may be bypassed: bn"):
        model = syncnorm.convert(CallingBoth())
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    synced = [syncnorm.describe(model)[0].synced]
    for training in (False, True):
        call.train(training)
        call(torch.randn(4, 3))
        synced.append(syncnorm.describe(model)[0].synced)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    return [*synced, *(syncnorm.describe(twin)[0].synced for twin in twins)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_runs_in_training_is_synced_after_all(compiled):
    for synced in run_ranks(seen_to_run, 2, (compiled,), timeout=100):
        assert synced == [False, False, True, True, True]


def test_a_layer_inside_a_followed_one_is_not_bypassed():
    layer = Around(3)
    layer.bn = Parent()
    assert all(row.synced for row in syncnorm.describe(syncnorm.convert(layer)))


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process_groups._warn_under_a_launcher.cache_clear()
    yield
    process_groups._warn_under_a_launcher.cache_clear()


ALONE = r"WORLD_SIZE=2, but there is no process group: .* alone.*torch.distributed.init_process_group before"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), Slimmable(3)])
def test_a_rank_without_a_process_group_is_told_once(layer, launched, recwarn):
    model = syncnorm.convert(nn.Sequential(layer))
    assert syncnorm.describe(model)[0].group == "no process group yet"
    x = torch.randn(2, 3, 4, 4)
    model.eval()(x)
    with syncnorm.no_sync_stats():
        model.train()(x)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not [w for w in recwarn if "syncnorm" in w.filename or "WORLD_SIZE" in str(w.message)]
    with pytest.warns(UserWarning, match=ALONE):
        model(x)
    recwarn.clear()
    model(x)
    syncnorm.functional.sync_batch_norm(x, None, None, training=True)
    assert not recwarn


@pytest.mark.parametrize("world_size", ["", "1", "two"])
def test_one_rank_or_no_launcher_is_told_nothing(world_size, launched, monkeypatch, recwarn):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    syncnorm.SyncBatchNorm(3)(torch.randn(2, 3))
    assert not recwarn


def with_a_group() -> tuple[str, int]:
    process_groups._warn_under_a_launcher.cache_clear()  # run_ranks sets WORLD_SIZE
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.randn(2, 3))
    return syncnorm.describe(model)[0].group, len(said)


def test_with_a_process_group_nothing_is_said():
    assert run_ranks(with_a_group) == [("default", 0)] * 2


RESET = r"(?s)reset_running_stats inside syncnorm.no_sync_stats.*update_bn on all ranks.*training.recalibrate"


@pytest.mark.parametrize("build", [lambda: syncnorm.convert(nn.BatchNorm1d(3)), lambda: syncnorm.SyncBatchNorm1d(3)])
@pytest.mark.parametrize("reset", ["reset_running_stats", "reset_parameters"])
def test_running_statistics_are_not_reset_where_they_cannot_move(build, reset):
    layer = build()
    nn.init.uniform_(layer.weight)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
        getattr(layer, reset)()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    getattr(layer, reset)()
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.num_batches_tracked == 0


def update_on_one_rank() -> list[Tensor]:
    model = syncnorm.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model(torch.randn(4, 3))
    before = copy.deepcopy(model.state_dict())
    if dist.get_rank() == 0:
        with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
            update_bn([torch.randn(4, 3)], model)
    assert model[1].momentum == 0.1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        model[0].load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    batches = [torch.full((4, 3), float(dist.get_rank()))]
    update_bn(batches, model)  # what the message says to do
    of_all = model[1].running_mean.clone()
    if dist.get_rank() == 0:
        with syncnorm.no_sync_stats():
            syncnorm.training.recalibrate(model, batches)
    return [of_all, model[1].running_mean]


def test_update_bn_on_one_rank_raises_and_what_it_points_to_works():
    for rank, (of_all, mean) in enumerate(run_ranks(update_on_one_rank)):
        assert of_all.tolist() == [0.5] * 3
        assert mean.tolist() == [0.5 * rank] * 3


def test_layers_can_be_built_under_no_sync_stats():
    with syncnorm.no_sync_stats():
        for layer in (
            syncnorm.SyncBatchNorm(3),
            syncnorm.SyncBatchNorm1d(3),
            copy.deepcopy(syncnorm.SyncBatchNorm(3)),
        ):
            assert layer.running_var.tolist() == [1, 1, 1]
            assert not any("construction" in name for name in vars(layer))
        lazy = syncnorm.convert(nn.LazyBatchNorm1d())
        lazy(torch.randn(4, 3))
        assert lazy.running_mean.tolist() == [0, 0, 0]
    with syncnorm.no_sync_stats(), pytest.raises(syncnorm.SyncNormError, match=RESET):
        lazy.reset_running_stats()
