"""The norms without communication: what they compute, and how they replace a batch norm."""

import models
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import nn

import syncnorm
from syncnorm.conversion.baselines import GroupNorm, InstanceNorm, LayerNorm
from syncnorm.errors import InputError

X = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def converted(to, **options):
    bn = nn.BatchNorm2d(6, eps=1e-3, dtype=torch.float64).eval()
    nn.init.uniform_(bn.weight)
    nn.init.uniform_(bn.bias)
    return bn, syncnorm.convert(nn.Sequential(bn), to=to, **options)[0]


def test_group_norm():
    bn, norm = converted("group", num_groups=3)
    assert type(norm) is GroupNorm
    torch.testing.assert_close(norm(X), F.group_norm(X, 3, bn.weight, bn.bias, 1e-3))


def test_layer_norm_is_group_norm_with_one_group():
    bn, norm = converted("layer")
    assert type(norm) is LayerNorm
    plain = F.layer_norm(X, X.shape[1:], eps=1e-3)
    torch.testing.assert_close(norm(X), plain * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1))


def test_instance_norm_is_group_norm_with_a_group_for_each_channel():
    bn, norm = converted("instance")
    assert type(norm) is InstanceNorm
    torch.testing.assert_close(norm(X), F.instance_norm(X, weight=bn.weight, bias=bn.bias, eps=1e-3))


def test_instance_norm_of_one_value_raises():
    norm = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), to="instance")
    with pytest.raises(InputError, match=r"needs spatial dimensions, got input of shape \(2, 4\)"):
        norm(torch.randn(2, 4))


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_names_parameters_dtype_and_training_flag_are_kept(to):
    bn, norm = converted(to, **({"num_groups": 2} if to == "group" else {}))
    assert norm.weight is bn.weight
    assert norm.bias is bn.bias
    assert norm.weight.dtype == torch.float64
    assert norm.eps == bn.eps
    assert not norm.training
    model = models.net()
    names = [name for name, _ in model.named_parameters()]
    syncnorm.convert(model, to=to, **({"num_groups": 2} if to == "group" else {}))
    assert [name for name, _ in model.named_parameters()] == names
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4)


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, models.BatchNormNamed])
def test_all_kinds_of_batch_norm(cls):
    assert type(syncnorm.convert(nn.Sequential(cls(6)), to="layer")[0]) is LayerNorm
    assert type(syncnorm.convert(cls(6), to="layer")) is LayerNorm
    assert type(syncnorm.convert(syncnorm.convert(cls(6)), to="layer")) is LayerNorm


def test_without_affine_and_without_bias():
    norm = syncnorm.convert(nn.BatchNorm2d(6, affine=False), to="layer")
    assert norm.weight is None
    assert norm(X.float()).shape == X.shape
    norm = syncnorm.convert(models.without_bias(nn.BatchNorm2d(6)), to="layer")
    assert norm.weight is not None
    assert norm.bias is None
    assert norm(X.float()).shape == X.shape


def test_a_shared_layer_stays_shared():
    bn = nn.BatchNorm2d(6)
    model = syncnorm.convert(nn.ModuleDict({"a": bn, "b": nn.Sequential(bn)}), to="layer")
    assert type(model["a"]) is LayerNorm
    assert model["a"] is model["b"][0]


def test_a_parametrized_layer_keeps_its_parametrization():
    bn = nn.BatchNorm2d(6)
    parametrize.register_parametrization(bn, "weight", models.Scale())
    norm = syncnorm.convert(nn.Sequential(bn), to="layer")[0]
    assert isinstance(norm, LayerNorm)
    assert torch.equal(norm.weight, torch.full((6,), 2.0))
    torch.testing.assert_close(norm(X.float()), F.group_norm(X.float(), 1, torch.full((6,), 2.0), norm.bias))
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is LayerNorm


@pytest.mark.parametrize("train", [True, False])
def test_a_subclass_with_its_own_forward_runs_it_with_the_other_norm(train):
    model = nn.Sequential(models.BatchNormAct(6)).train(train)
    before = model[0]
    syncnorm.convert(model, to="group", num_groups=3)
    assert model[0] is before
    torch.testing.assert_close(model(X.float()), F.leaky_relu(F.group_norm(X.float(), 3), 0.1))
    assert syncnorm.describe(model)[0].note == "group norm (3) in place of its batch norm"
    assert type(syncnorm.revert(model)[0]) is models.BatchNormAct
    assert "_num_groups" not in vars(model[0])


def test_a_child_with_its_own_statistics_keeps_them():
    model = models.BatchNormWithFrozenChild(6)
    want = model.act(F.group_norm(X.float(), 3, model.weight, model.bias, model.eps))
    torch.testing.assert_close(syncnorm.convert(model, to="group", num_groups=3)(X.float()), want)


def test_instance_norm_of_one_value_in_a_subclass_raises():
    class WithRelu(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(InputError, match="needs spatial dimensions"):
        syncnorm.convert(WithRelu(4), to="instance")(torch.randn(2, 4))


def test_groups_that_do_not_divide_raise_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(12)))
    with pytest.raises(InputError) as caught:
        syncnorm.convert(model, to="group", num_groups=8)
    assert str(caught.value) == (
        "num_groups=8 does not divide the 12 channels of layer '1.0'; nearest divisors: 6 and 12"
    )
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(InputError, match=r"num_groups=32 does not divide the 8 .* nearest divisors: 8"):
        syncnorm.convert(model, to="group")


def test_a_lazy_layer_is_skipped_until_it_is_initialized():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.warns(UserWarning, match="lazy and not initialized yet"):
        syncnorm.convert(model, to="group")
    model(torch.randn(2, 6, 3, 3))
    assert type(syncnorm.convert(model, to="group", num_groups=2)[0]) is GroupNorm
