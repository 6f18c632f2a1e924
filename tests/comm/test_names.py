"""Several models with layers of the same names: a rank that runs them in another order than the others raises."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import run_ranks


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def converted_twice() -> list[nn.Module]:
    return [syncnorm.convert(build()) for _ in range(2)]


def student_and_teacher() -> list[nn.Module]:
    student = syncnorm.convert(build())
    return [student, copy.deepcopy(student)]


def loaded_twice() -> list[nn.Module]:
    data = pickle.dumps(syncnorm.convert(build()))
    return [pickle.loads(data) for _ in range(2)]


def original_and_loaded() -> list[nn.Module]:
    model = syncnorm.convert(build())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [model, torch.load(file, weights_only=False)]


def built_synced() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 4), syncnorm.SyncBatchNorm(4)) for _ in range(2)]


def built_and_copied() -> list[nn.Module]:
    model = nn.Sequential(nn.Linear(4, 4), syncnorm.SyncBatchNorm(4))
    return [model, copy.deepcopy(model)]


def of_two_architectures() -> list[nn.Module]:
    """Their norms have the same name and width."""
    return [
        syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        syncnorm.convert(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.BatchNorm1d(4))),
    ]


MODELS = [
    converted_twice, student_and_teacher, loaded_twice, original_and_loaded, built_synced, built_and_copied,
    of_two_architectures,
]  # fmt: skip


def run_in_order(make: Callable[[], list[nn.Module]], swapped_at: int | None) -> list[str]:
    """What each of three steps raised; in one of them rank 1 runs the two models in another order."""
    torch.manual_seed(0)
    models, told = make(), []
    for step in range(3):
        swap = step == swapped_at and dist.get_rank() == 1
        errors = []
        for model in models[::-1] if swap else models:
            try:
                model(torch.randn(3 + dist.get_rank(), 4))
            except syncnorm.SyncNormError as error:
                errors.append(str(error))
        told.append(" | ".join(errors))
    return told


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("swapped_at", [0, 1])
def test_another_order_on_one_rank(make, swapped_at):
    for told in run_ranks(run_in_order, args=(make, swapped_at), timeout=30):
        assert "called different layers" in told[swapped_at]
        assert [text for step, text in enumerate(told) if step != swapped_at] == ["", ""]  # and on they go


@pytest.mark.parametrize("make", MODELS)
def test_the_same_order_on_all_ranks(make):
    assert run_ranks(run_in_order, args=(make, None), timeout=30) == [["", "", ""]] * 2


def one_rank_has_more() -> Tensor:
    """Rank 0 makes a model to look at, before; a copy of the model after; and uses a copy of a copy in its place."""
    rank = dist.get_rank()
    if rank == 0:
        syncnorm.convert(build())
        gc.collect()
    torch.manual_seed(0)
    model = syncnorm.convert(build())
    kept = [copy.deepcopy(model)] if rank == 0 else []
    model(torch.randn(3, 4))
    if rank == 0:
        kept += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    syncnorm.convert(model)  # once more is the same model
    model(torch.randn(3, 4))
    return model[1].running_mean


def test_models_that_one_rank_makes_and_does_not_train_are_no_disagreement():
    first, second = run_ranks(one_rank_has_more, timeout=30)
    assert torch.equal(first, second)


def one_rank_trains_a_copy(how: str) -> Tensor:
    torch.manual_seed(0)
    model = syncnorm.convert(build())
    if dist.get_rank() == 1:
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        gc.collect()
    model(torch.randn(3, 4))
    return model[1].running_mean


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_in_the_place_of_the_original_on_one_rank(how):
    first, second = run_ranks(one_rank_trains_a_copy, args=(how,), timeout=30)
    assert torch.equal(first, second)


def one_rank_is_in_more_groups(built: bool) -> Tensor:
    """Rank 0 has a layer for itself alone as well, made before; the other ranks have none."""
    alone = dist.new_group([0])
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for group in ([alone] if dist.get_rank() == 0 else []) + [dist.group.WORLD]:
        own = syncnorm.SyncBatchNorm(4, process_group=group)
        layers.append(own if built else syncnorm.convert(build(), process_group=group))
    layers[-1](torch.randn(3, 4))
    copied = copy.deepcopy(layers[-1])
    copied(torch.randn(3, 4))
    return next(copied.buffers())


@pytest.mark.parametrize("built", [True, False])
def test_layers_of_other_groups_are_not_counted(built):
    first, second = run_ranks(one_rank_is_in_more_groups, args=(built,), timeout=30)
    assert torch.equal(first, second)


def names_in_errors() -> str:
    models = converted_twice()
    try:
        for model in models if dist.get_rank() == 0 else models[::-1]:
            model(torch.randn(3, 4))
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


def test_an_error_says_which_model():
    for told in run_ranks(names_in_errors):
        assert "rank 0: forward of 1 (call 1" in told
        assert "rank 1: forward of 1 of model 2 (call 1" in told


def built_in_errors() -> str:
    models = built_synced()
    try:
        for model in models if dist.get_rank() == 0 else models[::-1]:
            model(torch.randn(3, 4))
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


def test_an_error_says_which_built_layer():
    for told in run_ranks(built_in_errors):
        assert "rank 1: forward of SyncBatchNorm no. 1 (call 1" in told
        assert "no. 2 in order of construction" in told
