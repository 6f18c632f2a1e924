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


def two_architectures() -> list[nn.Module]:
    """Their norms have the same name and width."""
    return [
        syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        syncnorm.convert(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.BatchNorm1d(4))),
    ]


MODELS = [
    converted_twice, student_and_teacher, loaded_twice, original_and_loaded, built_synced, built_and_copied,
    two_architectures,
]  # fmt: skip


def _rank_runs_in_order(make: Callable[[], list[nn.Module]], swapped_at: int | None) -> list[str]:
    """The errors of each of three steps; in one of them rank 1 runs the two models in another order."""
    torch.manual_seed(0)
    models, by_step = make(), []
    for step in range(3):
        swap = step == swapped_at and dist.get_rank() == 1
        errors = []
        for model in models[::-1] if swap else models:
            try:
                model(torch.randn(3 + dist.get_rank(), 4))
            except syncnorm.SyncNormError as error:
                errors.append(str(error))
        by_step.append(" | ".join(errors))
    return by_step


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("swapped_at", [0, 1])
def test_another_order_on_one_rank(make, swapped_at):
    for errors in run_ranks(_rank_runs_in_order, args=(make, swapped_at), timeout=30):
        assert "called different layers" in errors[swapped_at]
        assert [text for step, text in enumerate(errors) if step != swapped_at] == ["", ""]  # training continues


@pytest.mark.parametrize("make", MODELS)
def test_the_same_order_on_all_ranks(make):
    assert run_ranks(_rank_runs_in_order, args=(make, None), timeout=30) == [["", "", ""]] * 2


def _rank_one_has_more_models() -> Tensor:
    """Rank 0 creates another model before, and copies of the model before and after its first forward."""
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
    syncnorm.convert(model)  # converting again keeps the model
    model(torch.randn(3, 4))
    return model[1].running_mean


def test_untrained_models_of_one_rank_are_no_disagreement():
    first, second = run_ranks(_rank_one_has_more_models, timeout=30)
    assert torch.equal(first, second)


def _rank_one_trains_a_copy(how: str) -> Tensor:
    torch.manual_seed(0)
    model = syncnorm.convert(build())
    if dist.get_rank() == 1:
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        gc.collect()
    model(torch.randn(3, 4))
    return model[1].running_mean


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_one_rank_trains_a_copy_instead_of_the_original(how):
    first, second = run_ranks(_rank_one_trains_a_copy, args=(how,), timeout=30)
    assert torch.equal(first, second)


def _rank_one_is_in_more_groups(built: bool) -> Tensor:
    """Rank 0 also has a layer over a group of its own, created before; the other rank has none."""
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
    first, second = run_ranks(_rank_one_is_in_more_groups, args=(built,), timeout=30)
    assert torch.equal(first, second)


def _rank_swaps(make: Callable[[], list[nn.Module]]) -> str:
    """The error of a forward that rank 1 runs for the models in reverse order."""
    models = make()
    try:
        for model in models if dist.get_rank() == 0 else models[::-1]:
            model(torch.randn(3, 4))
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (converted_twice, ["rank 0: forward of 1 (call 1", "rank 1: forward of 1 of model 2 (call 1"]),
        (built_synced, ["rank 1: forward of SyncBatchNorm no. 1 (call 1", "no. 2 in order of construction"]),
    ],
)
def test_an_error_says_which_model_or_layer(make, texts):
    for error in run_ranks(_rank_swaps, args=(make,)):
        for text in texts:
            assert text in error
