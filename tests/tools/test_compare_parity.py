"""Parity: the differences of an arm from the single process, on models with a known error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncnorm.tools.compare.parity import Recorder, WithoutDropout, measure_parity, steps_to_measure


def _snapshot(model, layers, x=None):
    recorder = Recorder(model, layers, (1, 1))
    x = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(1)) if x is None else x
    with recorder.recording():
        model(x).square().mean().backward()
    recorder.record_gradients()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return recorder.snapshot()


def _deep_model():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(1 if i == 0 else 3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(True)) for i in range(4)]
    return nn.Sequential(*blocks), [f"{i}.1" for i in range(4)]


@pytest.mark.parametrize("wrong", [0, 2])
def test_parity_finds_the_layer_with_a_wrong_eps(wrong):
    (right, layers), (planted, _) = _deep_model(), _deep_model()
    planted[wrong][1].eps = 1e-2
    found = measure_parity(1, _snapshot(planted, layers), _snapshot(right, layers), layers, 1)
    assert found.first_divergent_layer == layers[wrong]
    assert [layer.output.max_rel > 1e-3 for layer in found.layers[: wrong + 1]] == [False] * wrong + [True]
    assert not found.within_rounding


def test_parity_finds_the_one_entry_that_differs():
    (ours, layers), (reference, _) = _deep_model(), _deep_model()
    with torch.no_grad():
        ours[3][1].weight[1] += 0.25
        ours[1][1].running_mean[0] = -2.0
    momentum = 0.9
    found = measure_parity(7, _snapshot(ours, layers), _snapshot(reference, layers), layers, 1)
    by_layer = {layer.layer: layer for layer in found.layers}
    assert found.step == 7
    assert by_layer["3.1"].params.max_abs == pytest.approx(0.25, rel=0.1)  # one step has followed
    assert by_layer["1.1"].running_mean.max_abs == found.running_mean.max_abs == pytest.approx(2 * momentum)
    assert by_layer["0.1"].running_mean.max_abs == 0
    assert found.running_var.max_abs == 0
    assert by_layer["2.1"].output.max_rel == 0
    assert found.first_divergent_layer == "1.1"


def test_a_gradient_factor_is_explained_by_averaging_if_nothing_else_differs():
    (ours, layers), (reference, _), (local, _) = (_deep_model() for _ in range(3))
    whole, halved, turned = (_snapshot(model, layers) for model in (reference, ours, local))
    for tensor in halved.tensors["gradients"].values():
        tensor *= 0.5
    turned.tensors["gradients"] = {n: t.flip(0) * 0.5 for n, t in turned.tensors["gradients"].items()}
    found = measure_parity(1, halved, whole, layers, 2)
    assert found.gradient_factor == pytest.approx(0.5)
    assert found.note.startswith("gradients are 1/2 of those of single: the loss is a sum over samples")
    assert measure_parity(1, halved, whole, layers, 4).note is None
    assert measure_parity(1, turned, whole, layers, 2).note is None


def test_a_model_without_running_statistics_has_none_that_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    taken = _snapshot(model, ["1"], torch.randn(5, 3))
    assert measure_parity(1, taken, taken, ["1"], 2).within_rounding


def test_steps_of_parity():
    assert [steps_to_measure(last) for last in (1, 3, 10)] == [(1,), (1, 2, 3), (1, 2, 5, 10)]


def test_parity_is_measured_without_dropout():
    x = torch.ones(100)
    with WithoutDropout():
        for drop in (nn.Dropout(0.5), lambda x: F.dropout(x, 0.5), nn.AlphaDropout(0.5)):
            assert torch.equal(drop(x), x)
    assert not torch.equal(nn.Dropout(0.5)(x), x)
