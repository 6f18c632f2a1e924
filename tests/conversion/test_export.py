"""A reverted or folded model leaves through torch.export and ONNX with the outputs of the synced one."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import BatchNormAct, Net
from torch import Tensor, nn

import syncnorm

Away = Callable[[nn.Module], nn.Module]


def trained(norm: type[nn.BatchNorm2d]) -> tuple[nn.Module, Tensor, Tensor]:
    """A synced model after a step of training, an input, and what the model makes of it in evaluation."""
    torch.manual_seed(0)
    model, x = syncnorm.convert(Net(norm)), torch.randn(4, 3, 8, 8)
    model(x * 3 + 1)
    with torch.no_grad():
        return model, x, model.eval()(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct])
@pytest.mark.parametrize("away", [syncnorm.revert, syncnorm.fold])
def test_torch_export(norm, away: Away):
    model, x, want = trained(norm)
    exported = torch.export.export(away(model), (x,))
    torch.testing.assert_close(exported.module()(x), want)
    assert not any("syncnorm" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct])
@pytest.mark.parametrize("away", [syncnorm.revert, syncnorm.fold])
def test_onnx(norm, away: Away, tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, want = trained(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(away(model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
