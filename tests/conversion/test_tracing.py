"""Synced layers are leaves for ``torch.fx``; ``torch.jit`` says what to do."""

import copy
import io
import pickle

import models
import pytest
import torch
import torch.distributed as dist
from shims.torchvision_operators import make_torchvision_importable
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import syncnorm
from syncnorm.modules import Synced
from syncnorm.testing import assert_matches_single_process, run_ranks

BUILDERS = [models.net, models.net_with_activations]


def calls_of_layers(graph: fx.GraphModule) -> list[str]:
    """The synced layers that the graph calls, in order."""
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return [name for name in called if isinstance(graph.get_submodule(name), Synced)]


def traced_plain() -> nn.Module:
    return fx.symbolic_trace(syncnorm.convert(models.net()))


def traced_fused() -> nn.Module:
    return fx.symbolic_trace(syncnorm.convert(models.net(), fuse=True))


def traced_with_own_forward() -> nn.Module:
    return fx.symbolic_trace(syncnorm.convert(models.net_with_activations()))


def traced_and_copied() -> nn.Module:
    return copy.deepcopy(traced_with_own_forward())


def traced_and_pickled() -> nn.Module:
    return pickle.loads(pickle.dumps(traced_plain()))


@pytest.mark.parametrize(
    "build", [traced_plain, traced_fused, traced_with_own_forward, traced_and_copied, traced_and_pickled]
)
def test_a_traced_model_trains_like_one_process_on_the_whole_batch(build):
    assert len(calls_of_layers(build())) == len(syncnorm.describe(build()))
    assert_matches_single_process(build, torch.randn(5, 3, 8, 8), steps=2, splits=(3, 2))


def test_hooks_run_when_the_graph_runs_and_not_when_it_is_traced():
    model, seen = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(2))), []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(output)
        return output + 1

    model[0].register_forward_hook(count)
    graph = fx.symbolic_trace(model)
    assert not seen
    graph(torch.randn(4, 2))
    assert len(seen) == 1


def test_arguments_of_the_layer_are_recorded():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncnorm.SyncBatchNorm1d(2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask, relu=True)

    model = Masked()
    x, mask = torch.randn(3, 2, 4), torch.rand(3, 4) > 0.3
    assert torch.equal(fx.symbolic_trace(model)(x, mask), model(x, mask))


def test_torchvisions_feature_extractor_names_the_layers():
    make_torchvision_importable()
    pytest.importorskip("torchvision")
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = syncnorm.convert(resnet18(num_classes=2))
    assert get_graph_node_names(model) == get_graph_node_names(syncnorm.revert(copy.deepcopy(model)))
    extractor = create_feature_extractor(model, ["layer1.0.bn1", "layer2"])
    assert extractor.layer1 is not None
    assert len(calls_of_layers(extractor)) == 10
    assert extractor(torch.randn(2, 3, 32, 32))["layer1.0.bn1"].shape == (2, 64, 8, 8)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of its imports
@pytest.mark.parametrize("build", BUILDERS)
def test_torchs_fusion_leaves_synced_layers_and_the_output_as_they_are(build):
    from torch.fx.experimental.optimization import fuse

    model, x = syncnorm.convert(build()), torch.randn(4, 3, 8, 8)
    model(3 * x + 1)
    model.eval()
    fused = fuse(model)
    assert len(calls_of_layers(fused)) == len(syncnorm.describe(model))
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fuse(syncnorm.revert(copy.deepcopy(model)))(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao.quantization
@pytest.mark.parametrize("aware", [False, True])
def test_quantization_after_convert_leaves_synced_layers_in_floating_point(aware):
    model, x = (
        syncnorm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())),
        torch.randn(4, 3, 8, 8),
    )
    mapping = (get_default_qat_qconfig_mapping if aware else get_default_qconfig_mapping)("fbgemm")
    want = copy.deepcopy(model)(x) if aware else model.eval()(x)
    prepared = (prepare_qat_fx if aware else prepare_fx)(model.train(aware), mapping, (x,))
    assert calls_of_layers(prepared) == ["1"]
    torch.testing.assert_close(prepared(x), want, rtol=0.1, atol=0.1)
    quantized = convert_fx(prepared.eval())
    assert calls_of_layers(quantized) == ["1"]
    torch.testing.assert_close(quantized(x), prepared(x), rtol=0.1, atol=0.1)


def _rank_jit_trace(build) -> tuple[list[str], bool]:
    model, x = syncnorm.convert(build()), torch.randn(4, 3, 8, 8)
    messages = []
    if dist.get_rank() == 0:  # the other rank waits for nothing
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(syncnorm.SyncNormError) as caught:
            torch.jit.trace(model, x)
        messages.append(str(caught.value))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        with syncnorm.no_sync_stats():
            torch.jit.trace(model, x, check_trace=False)
    model(x)  # the ranks still understand one another
    model.eval()
    traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return messages, torch.equal(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("build", BUILDERS)
def test_jit_trace_in_training_says_what_to_do_and_works_in_evaluation(build):
    (messages, same), (_, other_same) = run_ranks(_rank_jit_trace, args=(build,))
    assert "Trace model.eval(), or trace on this rank alone under `with syncnorm.no_sync_stats():`" in messages[0]
    assert messages[0].startswith("rank 0: torch.jit.trace")
    assert same
    assert other_same


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("build", BUILDERS)
def test_jit_script_asks_for_revert(build):
    model = syncnorm.convert(build())
    with pytest.raises(
        syncnorm.SyncNormError, match=r"torch.jit.script\(syncnorm.revert\(copy.deepcopy\(model\)\)\)"
    ):
        torch.jit.script(model)
    assert all(layer.synced for layer in syncnorm.describe(model))
    x = torch.randn(2, 3, 8, 8)
    if build is models.net:
        scripted = torch.jit.script(syncnorm.revert(copy.deepcopy(model)).eval())
        torch.testing.assert_close(scripted(x), model.eval()(x))
