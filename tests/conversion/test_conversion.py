"""Conversion changes the class and nothing else, and the way back restores it."""

import copy
import io
import pickle
import warnings

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize as parametrize
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.conversion import classes
from syncnorm.errors import InputError
from syncnorm.modules import Synced
from syncnorm.testing import assert_close, assert_matches_single_process, run_ranks

PLAIN = {
    nn.BatchNorm1d: syncnorm.SyncBatchNorm1d,
    nn.BatchNorm2d: syncnorm.SyncBatchNorm2d,
    nn.BatchNorm3d: syncnorm.SyncBatchNorm3d,
}
SUBCLASSES = [
    models.BatchNormAct,
    models.BatchNormPlusOne,
    models.BatchNormTorchCall,
    models.BatchNormAliased,
    models.BatchNormKeywords,
    models.BatchNormWithFrozenChild,
    models.BatchNormOwnPickle,
    models.BatchNormWithGroup,
    models.BatchNormNamed,
]


def state(module: nn.Module) -> dict:
    """All that an instance holds, by identity where it is a tensor or a hook; but for the name that convert noted."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items() if k != "_sync_name"}


@pytest.mark.parametrize("cls", [*PLAIN, nn.SyncBatchNorm, *SUBCLASSES, nn.LazyBatchNorm2d])
def test_round_trip_keeps_everything_but_the_class(cls):
    layer = cls() if cls is nn.LazyBatchNorm2d else cls(4)
    layer.register_forward_hook(hook)
    layer.qconfig = "mine"
    layer.eval()
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    before, tensors = state(layer), [*layer.parameters(), *layer.buffers()]

    assert syncnorm.convert(layer) is layer
    assert isinstance(layer, Synced)
    if cls is not nn.SyncBatchNorm:  # of which DDP refuses instances on CPU
        assert isinstance(layer, cls)
        assert state(layer) == before
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert all(a is b for a, b in zip(tensors, [*layer.parameters(), *layer.buffers()], strict=True))
    assert optimiser.param_groups[0]["params"][0] is layer.weight
    assert not layer.training

    assert syncnorm.revert(layer) is layer
    assert type(layer) is cls
    assert state(layer) == before
    assert "_sync_name" not in vars(layer)


def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + 1


@pytest.mark.parametrize(("plain", "synced"), PLAIN.items())
def test_torchs_own_classes_become_ours(plain, synced):
    layer = syncnorm.convert(plain(4))
    assert type(layer) is synced
    assert syncnorm.convert(layer) is layer  # twice is once
    assert type(layer) is synced


def test_a_lazy_layer_becomes_the_synced_class_at_its_first_forward():
    model = syncnorm.convert(nn.Sequential(nn.LazyBatchNorm2d()))
    model(torch.randn(2, 5, 3, 3))
    assert type(model[0]) is syncnorm.SyncBatchNorm2d
    assert model[0].num_features == 5
    assert type(syncnorm.revert(model)[0]) is nn.BatchNorm2d


def test_a_parametrized_layer_keeps_its_parametrization():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", models.Scale())
    syncnorm.convert(layer)
    assert isinstance(layer, syncnorm.SyncBatchNorm2d)
    assert torch.equal(layer.weight, torch.full((4,), 2.0))
    assert type(copy.deepcopy(layer)) is type(layer)
    syncnorm.revert(layer)
    assert not isinstance(layer, Synced)
    assert torch.equal(layer.weight, torch.full((4,), 2.0))

    syncnorm.convert(layer)
    parametrize.remove_parametrizations(layer, "weight")  # sets the class by its own book-keeping
    assert type(layer) is syncnorm.SyncBatchNorm2d
    parametrize.register_parametrization(layer, "bias", models.Scale())  # and after converting
    syncnorm.revert(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("cls", [*PLAIN, nn.SyncBatchNorm, *SUBCLASSES])
def test_made_classes_pickle_and_deepcopy(cls):
    layer = syncnorm.convert(cls(4)).eval()
    x = torch.randn(2, 4, *{nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 3, 3)}.get(cls, (3, 3)))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        assert type(syncnorm.revert(twin)) is cls


def test_what_cannot_be_converted_is_left_alone_and_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather compile
        scripted = torch.jit.script(nn.BatchNorm2d(4))
    model = nn.Sequential(nn.BatchNorm2d(4), models.OwnArithmetic(4), scripted, nn.GroupNorm(2, 4))
    before = [type(m) for m in model]
    with pytest.warns(UserWarning, match=r"left 2 layer\(s\) .*: 1: .*F.batch_norm; 2: TorchScript") as said:
        syncnorm.convert(model)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert [type(m) for m in model][1:] == before[1:]
    assert str(syncnorm.describe(model)).splitlines() == [
        "layer  class                  synced  group                 note",
        "0      SyncBatchNorm2d        yes     no process group yet",
        f"1      OwnArithmetic          no      -                     left alone: {classes.NO_CALL}",
        "2      RecursiveScriptModule  no      -                     left alone: TorchScript, convert before "
        "torch.jit.script",
        "3      GroupNorm              no      -                     no batch statistics to sync",
    ]


def test_describe_before_and_without_norms():
    assert syncnorm.describe(nn.BatchNorm1d(3))[0].note == "convert() syncs it"
    assert str(syncnorm.describe(nn.Linear(2, 2))) == "no normalization layers"


class WrapperBatchNorm(nn.Module):
    """As transformers' PatchTSTBatchNorm: a batch norm between two transpositions."""

    def __init__(self):
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(4)


def test_describe_names_the_layer_and_not_its_wrapper():
    assert [layer.name for layer in syncnorm.describe(WrapperBatchNorm())] == ["batchnorm"]


def test_the_way_to_plain_batch_norm():
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4), models.BatchNormAct(4)))
    syncnorm.convert(model, to="batch")
    assert [type(m).__name__ for m in model] == ["BatchNorm2d", "BatchNorm", "BatchNormAct"]
    assert model[1](torch.randn(2, 4, 3)).shape == (2, 4, 3)
    assert type(syncnorm.convert(model)[1]) is syncnorm.SyncBatchNorm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "rms"}, "to='rms' must be"),
        ({"to": "group", "group_size": 2}, "synchronizes nothing"),
        ({"to": "group", "num_groups": 0}, "num_groups=0 must be positive"),
        ({"num_groups": 4}, "requires to='group'"),
        ({"process_group": 1, "group_size": 2}, "not both"),
        ({"process_group": 1}, "process_group must be"),
        ({"group_size": 2}, "call torch.distributed.init_process_group first"),
    ],
    ids=str,
)
def test_wrong_options_change_nothing(options, message):
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(syncnorm.SyncNormError, match=message):
        syncnorm.convert(model, **options)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(InputError, match=r"expects an nn.Module, got list"):
        syncnorm.convert([model])


@pytest.mark.parametrize("build", [models.net, models.net_with_activations])
def test_converted_models_train_like_one_process_on_the_whole_batch(build):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(7, 3, 6, 6, generator=generator) for _ in range(2)]
    assert_matches_single_process(build, batches, world_size=2, steps=2, splits=(5, 2))


def subclass_step(cls: type[nn.BatchNorm2d], rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
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


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclasses_sync_what_they_pass_to_batch_norm(cls):
    rows = (4, 1)
    layer = cls(3).double()
    x = torch.cat(subclass_batch(rows, 0)).double().requires_grad_()
    y = layer(x)
    y.backward(torch.cat(subclass_batch(rows, 1)).double())
    for rank, (got_y, got_dx, got_var) in enumerate(run_ranks(subclass_step, 2, (cls, rows))):
        assert_close(got_y, y.detach().split(rows)[rank], torch.float32)
        assert_close(got_dx, x.grad.split(rows)[rank], torch.float32)
        assert_close(got_var, layer.running_var, torch.float32)


def own_in_training() -> list[str]:
    layer = syncnorm.convert(models.OwnInTraining(3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer(torch.randn(2, 3, 4, 4))
    return [str(w.message) for w in said]


def test_a_subclass_that_does_not_call_batch_norm_in_training_says_so():
    for messages in run_ranks(own_in_training):
        assert len(messages) == 1
        assert messages[0].startswith("SyncOwnInTraining did not call F.batch_norm in training")


def after_ddp(order: str) -> list[Tensor]:
    model = models.net()
    if order == "before":
        model = DistributedDataParallel(syncnorm.convert(model))
    else:
        model = syncnorm.convert(DistributedDataParallel(model))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(3, 3, 6, 6, generator=generator)).square().sum().backward()
        optimiser.step()
    return [*model.parameters(), *model.buffers()]


def test_before_and_after_ddp_is_the_same():
    before, after = run_ranks(after_ddp, args=("before",)), run_ranks(after_ddp, args=("after",))
    for rank in range(2):
        for a, b in zip(before[rank], after[rank], strict=True):
            assert torch.equal(a, b)


def torch_sync_batch_norm() -> tuple[Tensor, str, bool]:
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(3, momentum=1.0, process_group=group))
    DistributedDataParallel(syncnorm.convert(model))(torch.full((2, 3), float(dist.get_rank())))
    described = syncnorm.describe(model)[0].group
    mean = model[0].running_mean.clone()
    syncnorm.revert(model)
    return mean, described, model[0].process_group is group


def test_torchs_sync_batch_norm_keeps_its_group_and_runs_on_cpu():
    for mean, described, same in run_ranks(torch_sync_batch_norm):
        assert mean.tolist() == [0.5] * 3
        assert described == "ranks [0, 1]"
        assert same


def copies_with_a_group() -> tuple[bool, str, str]:
    model = syncnorm.convert(models.net(), group_size=2)
    twin = copy.deepcopy(model)
    same = twin.norm1.process_group is model.norm1.process_group
    loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(syncnorm.SyncNormError) as caught:
        loaded(torch.randn(2, 3, 4, 4))
    loaded.eval()(torch.randn(2, 3, 4, 4))
    syncnorm.convert(loaded.train(), group_size=2)(torch.randn(2, 3, 4, 4))
    return same, str(caught.value), syncnorm.describe(twin)[0].group


def test_a_copy_shares_the_group_and_a_pickle_asks_for_it():
    for same, message, group in run_ranks(copies_with_a_group):
        assert same
        assert "saved with a process group (ranks [0, 1])" in message
        assert "syncnorm.convert(model, process_group=...)" in message
        assert group == "ranks [0, 1]"


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, models.BatchNormAct])
def test_a_forward_replaced_on_the_instance_is_not_called_synced(cls):
    model = nn.Sequential(cls(3))
    add_hook_to_module(model[0], ModelHook())
    for to in ("sync", "group"):
        with pytest.warns(UserWarning, match=r"0: its forward was replaced on the instance"):
            syncnorm.convert(model, to=to, **({"num_groups": 3} if to == "group" else {}))
        assert type(model[0]) is cls
    assert "its forward was replaced" in syncnorm.describe(model)[0].note

    model = syncnorm.convert(nn.Sequential(cls(3)))
    add_hook_to_module(model[0], ModelHook())
    with pytest.warns(UserWarning, match=r"syncnorm.revert left 1 layer.* its forward was replaced"):
        syncnorm.revert(model)
    assert syncnorm.describe(model)[0].synced
    remove_hook_from_module(model[0])
    assert type(syncnorm.revert(model)[0]) is cls


def test_all_norms_lead_to_all_norms():
    for cls in (nn.BatchNorm2d, models.BatchNormAct):
        model = nn.Sequential(cls(4))
        syncnorm.convert(syncnorm.convert(model), to="layer")
        assert not syncnorm.describe(model)[0].synced
        if cls is models.BatchNormAct:  # the very layer, whose way back is open
            syncnorm.convert(model)
            assert syncnorm.describe(model)[0].synced
            assert "_num_groups" not in vars(model[0])
            assert type(syncnorm.convert(model, to="batch")[0]) is cls


def test_fx_before_converting():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert syncnorm.describe(syncnorm.convert(graph))[0].synced
    assert graph(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def destroyed_group() -> tuple[str, str]:
    group = dist.new_group([0, 1])
    layer = syncnorm.convert(nn.BatchNorm1d(2), process_group=group)
    dist.destroy_process_group(group)
    with pytest.raises(syncnorm.SyncNormError) as caught:
        layer(torch.randn(2, 2))
    return str(caught.value), syncnorm.describe(layer)[0].group


def test_a_destroyed_group_is_named():
    for rank, (message, group) in enumerate(run_ranks(destroyed_group)):
        assert message.startswith(f"rank {rank}: the process group of this layer was destroyed. Bind it to another")
        assert group == "destroyed"


class Mine(syncnorm.SyncBatchNorm1d):
    """A subclass of a synced layer."""


def revert_what_stays_synced() -> list[tuple[bool, str]]:
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded = fully_shard(syncnorm.convert(nn.BatchNorm1d(2), process_group=mesh), mesh=mesh)
    told = []
    for layer in (sharded, Mine(2, process_group=mesh)):
        with pytest.warns(UserWarning, match="syncnorm.revert left 1 layer") as caught:
            syncnorm.revert(layer)
        told.append((layer.process_group is mesh.get_group(), str(caught[0].message)))
    after = syncnorm.convert(fully_shard(nn.BatchNorm1d(2), mesh=mesh), process_group=mesh)
    syncnorm.revert(after)
    return [*told, (not isinstance(after, Synced), "revert before")]


def test_a_class_made_from_a_synced_one_says_that_it_stays_synced():
    """It lost its group without a word, and went on over all ranks."""
    for told in run_ranks(revert_what_stays_synced):
        for right, message in told:
            assert right
            assert "revert before" in message
