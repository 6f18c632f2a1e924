"""Conversion changes only the class of a layer, and ``revert`` restores it."""

import copy
import io
import pickle

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
from syncnorm.errors import InputError
from syncnorm.modules import Synced
from syncnorm.testing import assert_matches_single_process, run_ranks

PLAIN = {
    nn.BatchNorm1d: syncnorm.SyncBatchNorm1d,
    nn.BatchNorm2d: syncnorm.SyncBatchNorm2d,
    nn.BatchNorm3d: syncnorm.SyncBatchNorm3d,
}


def state(module: nn.Module) -> dict:
    """The attributes of an instance, tensors and hooks by identity, without the name that convert adds."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items() if k != "_sync_name"}


@pytest.mark.parametrize("cls", [*PLAIN, nn.SyncBatchNorm, *models.SUBCLASSES, nn.LazyBatchNorm2d])
def test_round_trip_keeps_everything_but_the_class(cls):
    layer = cls() if cls is nn.LazyBatchNorm2d else cls(4)
    layer.register_forward_hook(hook)
    layer.qconfig = "mine"
    layer.eval()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before, tensors = state(layer), [*layer.parameters(), *layer.buffers()]

    assert syncnorm.convert(layer) is layer
    assert isinstance(layer, Synced)
    if cls is not nn.SyncBatchNorm:  # DDP refuses its instances on CPU
        assert isinstance(layer, cls)
        assert state(layer) == before
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert all(a is b for a, b in zip(tensors, [*layer.parameters(), *layer.buffers()], strict=True))
    assert optimizer.param_groups[0]["params"][0] is layer.weight
    assert not layer.training

    assert syncnorm.revert(layer) is layer
    assert type(layer) is cls
    assert state(layer) == before
    assert "_sync_name" not in vars(layer)


def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + 1


@pytest.mark.parametrize(("plain", "synced"), PLAIN.items())
def test_the_synced_classes_of_torchs_own_layers(plain, synced):
    layer = syncnorm.convert(plain(4))
    assert type(layer) is synced
    assert syncnorm.convert(layer) is layer  # converting again changes nothing
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
    parametrize.remove_parametrizations(layer, "weight")  # restores the class that it has stored
    assert type(layer) is syncnorm.SyncBatchNorm2d
    parametrize.register_parametrization(layer, "bias", models.Scale())  # registered after the conversion
    syncnorm.revert(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("cls", [*PLAIN, nn.SyncBatchNorm, *models.SUBCLASSES])
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


def test_converting_to_plain_batch_norm():
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


def _rank_train_with_ddp(order: str) -> list[Tensor]:
    model = models.net()
    if order == "before":
        model = DistributedDataParallel(syncnorm.convert(model))
    else:
        model = syncnorm.convert(DistributedDataParallel(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 3, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


def test_before_and_after_ddp_is_the_same():
    before, after = (run_ranks(_rank_train_with_ddp, args=(order,)) for order in ("before", "after"))
    for rank in range(2):
        for a, b in zip(before[rank], after[rank], strict=True):
            assert torch.equal(a, b)


def _rank_torch_sync_batch_norm() -> tuple[Tensor, str, bool]:
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(3, momentum=1.0, process_group=group))
    DistributedDataParallel(syncnorm.convert(model))(torch.full((2, 3), float(dist.get_rank())))
    described = syncnorm.describe(model)[0].group
    mean = model[0].running_mean.clone()
    syncnorm.revert(model)
    return mean, described, model[0].process_group is group


def test_torchs_sync_batch_norm_keeps_its_group_and_runs_on_cpu():
    for mean, described, same in run_ranks(_rank_torch_sync_batch_norm):
        assert mean.tolist() == [0.5] * 3
        assert described == "ranks [0, 1]"
        assert same


def _rank_copies_with_a_group() -> tuple[bool, str, str]:
    model = syncnorm.convert(models.net(), group_size=2)
    twin = copy.deepcopy(model)
    same = twin.norm1.process_group is model.norm1.process_group
    loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(syncnorm.SyncNormError) as caught:
        loaded(torch.randn(2, 3, 4, 4))
    loaded.eval()(torch.randn(2, 3, 4, 4))
    syncnorm.convert(loaded.train(), group_size=2)(torch.randn(2, 3, 4, 4))
    return same, str(caught.value), syncnorm.describe(twin)[0].group


def test_a_copy_shares_the_group_and_a_pickle_needs_a_new_one():
    for same, message, group in run_ranks(_rank_copies_with_a_group):
        assert same
        assert "saved with a process group (ranks [0, 1])" in message
        assert "syncnorm.convert(model, process_group=...)" in message
        assert group == "ranks [0, 1]"


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, models.BatchNormAct])
def test_a_forward_replaced_on_the_instance_is_not_converted(cls):
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


def test_converting_from_any_norm():
    for cls in (nn.BatchNorm2d, models.BatchNormAct):
        model = nn.Sequential(cls(4))
        syncnorm.convert(syncnorm.convert(model), to="layer")
        assert not syncnorm.describe(model)[0].synced
        if cls is models.BatchNormAct:  # the same layer, so it can be converted back
            syncnorm.convert(model)
            assert syncnorm.describe(model)[0].synced
            assert "_num_groups" not in vars(model[0])
            assert type(syncnorm.convert(model, to="batch")[0]) is cls


def test_converting_an_fx_graph():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert syncnorm.describe(syncnorm.convert(graph))[0].synced
    assert graph(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def _rank_destroyed_group() -> tuple[str, str]:
    group = dist.new_group([0, 1])
    layer = syncnorm.convert(nn.BatchNorm1d(2), process_group=group)
    dist.destroy_process_group(group)
    with pytest.raises(syncnorm.SyncNormError) as caught:
        layer(torch.randn(2, 2))
    return str(caught.value), syncnorm.describe(layer)[0].group


def test_a_destroyed_group_raises():
    for rank, (message, group) in enumerate(run_ranks(_rank_destroyed_group)):
        assert message.startswith(f"rank {rank}: the process group of this layer was destroyed. Bind it to another")
        assert group == "destroyed"


class DerivedFromSynced(syncnorm.SyncBatchNorm1d):
    """A subclass of a synced layer."""


def _rank_revert_derived_classes() -> list[tuple[bool, str]]:
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded = fully_shard(syncnorm.convert(nn.BatchNorm1d(2), process_group=mesh), mesh=mesh)
    results = []
    for layer in (sharded, DerivedFromSynced(2, process_group=mesh)):
        with pytest.warns(UserWarning, match="syncnorm.revert left 1 layer") as caught:
            syncnorm.revert(layer)
        results.append((layer.process_group is mesh.get_group(), str(caught[0].message)))
    after = syncnorm.convert(fully_shard(nn.BatchNorm1d(2), mesh=mesh), process_group=mesh)
    syncnorm.revert(after)
    return [*results, (not isinstance(after, Synced), "revert before")]


def test_a_class_derived_from_a_synced_one_stays_synced_with_a_warning():
    """It used to lose its group silently, and to synchronize over all ranks."""
    for results in run_ranks(_rank_revert_derived_classes):
        for right, message in results:
            assert right
            assert "revert before" in message
