"""A reverted or folded model exports with torch.export and ONNX, and computes what the synced one does."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import BatchNormAct, Net
from torch import Tensor, nn

import syncnorm

Transform = Callable[[nn.Module], nn.Module]


def trained(norm: type[nn.BatchNorm2d]) -> tuple[nn.Module, Tensor, Tensor]:
    """A synced model after one training step, an input, and the model's output in evaluation mode."""
    torch.manual_seed(0)
    model, x = syncnorm.convert(Net(norm)), torch.randn(4, 3, 8, 8)
    model(x * 3 + 1)
    with torch.no_grad():
        return model, x, model.eval()(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct])
@pytest.mark.parametrize("transform", [syncnorm.revert, syncnorm.fold])
def test_torch_export(norm, transform: Transform):
    model, x, want = trained(norm)
    exported = torch.export.export(transform(model), (x,))
    torch.testing.assert_close(exported.module()(x), want)
    assert not any("syncnorm" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct])
@pytest.mark.parametrize("transform", [syncnorm.revert, syncnorm.fold])
def test_onnx(norm, transform: Transform, tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, want = trained(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(transform(model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
