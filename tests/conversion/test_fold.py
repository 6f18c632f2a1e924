"""Batch norms folded into the layer before them: the outputs stay the same, and only valid pairs are folded."""

import copy

import pytest
import torch
from models import BatchNormAct, BatchNormNamed, Net, Scale, without_bias
from torch import Tensor, nn
from torch.nn.utils import parametrize

import syncnorm
from syncnorm.errors import InputError


def trained(model: nn.Module) -> nn.Module:
    """``model`` in fp64, with parameters and statistics that differ from those of a new layer."""
    torch.manual_seed(0)
    for module in model.double().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 2)
    return model


def check(model: nn.Module, x: Tensor, *, folds: int) -> nn.Module:
    """Checks that ``folds`` norms are folded, that outputs are equal and that ``model`` does not change."""
    before = copy.deepcopy(model)
    folded = syncnorm.fold(model)
    assert not any(m.training for m in folded.modules())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, got), want in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert sum(isinstance(m, nn.Identity) for m in folded.modules()) == folds
    assert type(folded) is type(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    return folded


IMAGE = torch.randn(2, 4, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), IMAGE[..., 0]),
        (nn.Conv2d(4, 6, 3, bias=False, groups=2), nn.BatchNorm2d(6, affine=False), IMAGE),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), IMAGE.unsqueeze(-1).expand(2, 4, 8, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), IMAGE),
        (nn.Conv2d(4, 6, 3), syncnorm.SyncBatchNorm(6), IMAGE),
        (nn.Conv2d(4, 6, 3), BatchNormNamed(6), IMAGE),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), IMAGE[..., 0, 0]),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), IMAGE[..., 0, 0]),
        (nn.Linear(4, 6), without_bias(nn.BatchNorm1d(6)), IMAGE[..., 0, 0]),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("convert", [True, False])
def test_each_kind_of_layer(layer, norm, x, convert):
    model = trained(nn.Sequential(layer, norm, nn.ReLU()))
    check(syncnorm.convert(model) if convert else model, x, folds=1)


@pytest.mark.parametrize("convert", [True, False])
def test_a_model_that_is_not_a_sequence(convert):
    model = trained(Net())
    check(syncnorm.convert(model) if convert else model, IMAGE[:, :3], folds=2)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


def parametrized(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Scale())


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        (nn.Conv2d(4, 6, 3), BatchNormAct(6)),  # its activation would be lost
        (nn.Conv2d(4, 6, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6))),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (parametrized(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        (nn.Conv2d(4, 6, 3), parametrized(nn.BatchNorm2d(6))),
        (hooked(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        (nn.Conv2d(4, 6, 3), hooked(nn.BatchNorm2d(6))),
    ],
    ids=str,
)
@pytest.mark.parametrize("convert", [True, False])
def test_left_alone(layer, norm, convert):
    model = trained(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    parametrized_norm = parametrize.is_parametrized(norm)
    check(syncnorm.convert(model) if convert else model, IMAGE, folds=int(parametrized_norm))


class Forked(nn.Module):
    """Uses a convolution in another place than its norm."""

    def __init__(self, way: str, traced: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.way, self.traced = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), way, traced

    def forward(self, x: Tensor) -> Tensor:
        if not self.traced and x.sum() > 1e9:  # depends on data
            return x
        y = self.conv(x)
        if self.way == "output":
            return self.norm(y) + y
        if self.way == "layer":
            return self.conv(self.norm(y))
        if self.way == "weight":
            return self.norm(y) * self.conv.weight.sum()
        return self.norm(self.norm(y))


@pytest.mark.parametrize("way", ["output", "layer", "weight", "norm"])
def test_a_layer_with_another_use_is_left_alone(way):
    check(trained(Forked(way)), IMAGE, folds=0)


class Untraceable(nn.Module):
    """Has control flow that depends on data; one of its sequences uses a convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.twice = nn.Sequential(shared, nn.BatchNorm2d(4), shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.body(x)) if x.sum() < 1e9 else x


def test_without_a_trace_neighbors_in_a_sequence_are_folded_with_a_warning():
    model = syncnorm.convert(trained(Untraceable()))
    with pytest.warns(UserWarning, match="could not trace Untraceable with torch.fx .* in an nn.Sequential"):
        folded = check(model, IMAGE, folds=1)
    assert isinstance(folded.body[1], nn.Identity)
    with pytest.warns(UserWarning, match="could not trace Forked"):
        check(trained(Forked("norm", traced=False)), IMAGE, folds=0)


def test_a_folded_linear_layer_rejects_input_of_more_than_two_dimensions():
    model = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    model.eval()(x)  # channels in dimension 1, features last, both 6
    with pytest.raises(InputError, match=r"input of shape \(batch, features\); got shape \(2, 6, 4\)"):
        syncnorm.fold(model)(x)
