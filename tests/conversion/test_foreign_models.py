"""Models of timm, transformers, segmentation-models-pytorch and MONAI: converted, trained and reverted.

Skipped if the libraries are not installed (the extra ``foreign``). ``python tests/support/foreign_models.py`` prints
a table.
"""

import copy

import pytest
import torch
from foreign_models import MODELS, assert_step_matches, batch_norms, build, installed, samples
from torch import nn

import syncnorm

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own


def each(*names: str) -> pytest.MarkDecorator:
    absent = "the library is not installed: pip install '.[foreign]'"
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.skipif(not installed(n), reason=absent)) for n in names]
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small convolutions, which fp64 runs group by group
    yield
    torch.set_num_threads(threads)


def fingerprint(model: nn.Module) -> tuple[dict[str, type], dict[str, int]]:
    """The class of every module, and the identity of all parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: type(m) for n, m in model.named_modules()}, {n: id(t) for n, t in tensors.items()}


def evaluated(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


@each(*MODELS)
def test_every_batch_norm_is_synced_and_reverted(name):
    model = build(name)
    before, state, count = fingerprint(model), copy.deepcopy(model.state_dict()), batch_norms(model)
    x = samples(name, 1)
    want = evaluated(model, x)

    layers = syncnorm.describe(syncnorm.convert(model))
    assert sum(layer.synced for layer in layers) == count
    assert all(layer.note for layer in layers if not layer.synced)  # each with the reason
    assert torch.equal(evaluated(model, x), want)  # activations and attributes of the layers are kept

    syncnorm.revert(model)
    assert fingerprint(model) == before
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@each("timm resnet18", "transformers ResNet", "smp DeepLabV3Plus", "monai SegResNet, batch")
def test_a_fused_model_computes_the_same_and_is_reverted(name):
    plain, fused = build(name), build(name)
    before = fingerprint(fused)
    syncnorm.convert(fused, fuse=True)
    assert any("fused" in layer.note for layer in syncnorm.describe(fused))
    x = samples(name, 3)
    # In one process the norms are local, so that the original model is the reference.
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert fingerprint(syncnorm.revert(fused)) == before


@each(
    "timm resnet18",
    "timm efficientnet_b0",  # BatchNormAct2d: the activation is in the layer
    "transformers SegFormer",
    "transformers Wav2Vec2Conformer",  # BatchNorm1d, over (N, C, L)
    "smp FPN",
    "monai UNet, batch",
)
def test_a_step_on_two_ranks_matches_the_whole_batch(name):
    assert_step_matches(name)
