"""Modules that call ``F.batch_norm`` themselves are found by their code, and their layers do not count as synced."""

import copy
import functools
import pickle
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import batch_norm as imported

import syncnorm
from syncnorm._torch_versions import ONE_GRAPH
from syncnorm.conversion.batch_norm_calls import calls_batch_norm
from syncnorm.testing import run_ranks


class Parent(nn.Module):
    """Calls ``F.batch_norm`` with the statistics of its child."""

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
def test_a_layer_whose_parent_calls_batch_norm_does_not_count_as_synced(cls):
    model = nn.Sequential(nn.BatchNorm1d(3), cls())
    with pytest.warns(UserWarning, match=r"found 1 layer\(s\) that may be bypassed: 1\.bn") as said:
        syncnorm.convert(model)
    assert len(said) == 1
    assert said[0].filename == __file__
    model(torch.randn(4, 3))
    other, inside = syncnorm.describe(model)
    assert other.synced
    assert (inside.synced, inside.group) == (False, "-")
    assert inside.note == (
        f"{cls.__name__}.forward calls F.batch_norm itself: call the layer, or syncnorm.functional.sync_batch_norm"
    )
    syncnorm.revert(model)
    assert syncnorm.describe(model)[1].note == "convert() syncs it"


class Calling(nn.Module):
    """Has a child named batch_norm, but does not call the function."""

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
def test_calling_a_child_named_batch_norm_is_not_a_call_of_the_function(cls):
    assert not calls_batch_norm(cls)
    model = syncnorm.convert(cls())  # a warning would be an error
    assert syncnorm.describe(model)[0].synced
    model(torch.randn(4, 3))


class CallingBoth(Parent):
    """Calls its child, and ``F.batch_norm`` for another purpose."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.batch_norm(x, None, None, training=True))


def _rank_describe_around_forwards(compiled: bool) -> list[bool]:
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"found 1 layer\(s\) that may be bypassed: bn"):
        model = syncnorm.convert(CallingBoth())
    call = torch.compile(model, fullgraph=ONE_GRAPH, backend="eager") if compiled else model
    synced = [syncnorm.describe(model)[0].synced]
    for training in (False, True):
        call.train(training)
        call(torch.randn(4, 3))
        synced.append(syncnorm.describe(model)[0].synced)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    return [*synced, *(syncnorm.describe(twin)[0].synced for twin in twins)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_counts_as_synced_once_it_has_run_in_training(compiled):
    for synced in run_ranks(_rank_describe_around_forwards, 2, (compiled,), timeout=100):
        assert synced == [False, False, True, True, True]


def test_a_layer_inside_an_overridden_one_is_not_bypassed():
    layer = models.BatchNormAct(3)
    layer.bn = Parent()
    assert all(row.synced for row in syncnorm.describe(syncnorm.convert(layer)))
