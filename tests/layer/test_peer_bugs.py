"""Bugs of other synchronized batch norms, by issue number where there is one."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case, check, laid_out
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks


def test_pytorch_36382_gradient_with_uneven_batches():
    """Averaging the ranks' sums gives small and large batches the same weight."""
    check(Case((9, 1), dtype="float64"))
    check(Case((1, 8, 3), dtype="float64"))


def test_pytorch_22192_running_var_differs_by_rank():
    """Each rank applied Bessel's correction with its own count."""
    case = Case((2, 7), momentum=1.0, spatial=())
    (first,), (second,) = check(case)
    assert torch.equal(first["buffers"]["running_var"], second["buffers"]["running_var"])


@pytest.mark.parametrize("layout", ["permuted", "sliced", "channels_last"])
def test_pytorch_62967_and_64039_permuted_input(layout):
    """The kernels treated a permuted input as contiguous."""
    check(Case((3, 2), layout=layout, spatial=(6, 5)))
    check(Case((3, 2), layout=layout, spatial=(6,)))
    check(Case((5, 4), layout=layout, spatial=()))


def _rank_relu_in_place(rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x, dy = (t[dist.get_rank()] for t in Case(rows).batch(0))
    x.requires_grad_()
    model = nn.Sequential(syncnorm.SyncBatchNorm2d(3), nn.ReLU(inplace=True))
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def test_relu_in_place_after_the_layer():
    """The backward read the layer's output, which the ReLU had overwritten."""
    rows = (3, 2)
    inputs, grads = Case(rows).batch(0)
    x = torch.cat(inputs).double().requires_grad_()
    y = F.relu(F.batch_norm(x, None, None, training=True))
    y.backward(torch.cat(grads).double())
    for rank, (got_y, got_dx) in enumerate(run_ranks(_rank_relu_in_place, 2, (rows,))):
        assert_close(got_y, y.split(rows)[rank].detach(), torch.float32)
        assert_close(got_dx, x.grad.split(rows)[rank], torch.float32)


def _rank_two_forwards(cases: tuple[Case, Case]) -> list[dict[str, Tensor]]:
    rank = dist.get_rank()
    layer = cases[0].layer()
    batches = [[t[rank] for t in case.batch(0)] for case in cases]
    inputs = [x.requires_grad_() for x, _ in batches]
    outputs = [layer(x) for x in inputs]
    torch.autograd.backward(outputs, [dy for _, dy in batches])
    return [{"y": y.detach(), "dx": x.grad} for x, y in zip(inputs, outputs, strict=True)]


def test_pytorch_66504_two_forwards_before_one_backward():
    cases = (Case((3, 2), seed=1), Case((2, 5), seed=2))
    results = run_ranks(_rank_two_forwards, 2, (cases,))
    weight, bias = cases[0].layer().weight, cases[0].layer().bias
    for turn, case in enumerate(cases):
        want = batch_norm_oracle(*case.batch(0), weight, bias, None, None, 0.1, 1e-5)
        for rank in range(2):
            assert_close(results[rank][turn]["y"], want.outputs[rank], torch.float32)
            assert_close(results[rank][turn]["dx"], want.grad_inputs[rank], torch.float32)


def shared_layer() -> bool:
    norm = nn.BatchNorm2d(3)
    model = syncnorm.convert(nn.ModuleDict({"a": norm, "b": norm}))
    return model["a"] is model["b"] is norm


def test_pytorch_187298_shared_layer_stays_one():
    """torch's converter turns one layer that is used in two places into two layers."""
    assert shared_layer()


def test_pytorch_41081_the_way_back():
    """torch's converter has no inverse, and its layer does not run on a CPU."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = model.state_dict()
    syncnorm.revert(syncnorm.convert(model))
    assert type(model[1]) is nn.BatchNorm2d
    assert model.state_dict().keys() == before.keys()
    assert not any("sync" in key for key in vars(model[1]))


def test_expanded_gradient_of_a_mean():
    """``y.mean().backward()`` sends an expanded gradient with strides of zero."""
    for layout in ("contiguous", "channels_last"):
        check(Case((3, 2), layout=layout, dy_layout="expanded"))
        assert laid_out(torch.ones(2, 3, 4, 5), "expanded").stride()[-1] == 0


def _rank_one_input_without_gradient() -> tuple[list[float], Tensor | None]:
    """Rank 1 has no rows and its input requires no gradient, as in a detection head without proposals."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, requires_grad=True)
    layer = syncnorm.SyncBatchNorm(3)
    layer(x if dist.get_rank() == 0 else x.detach()[:0]).pow(3).sum().backward()
    next_collective = torch.ones(6)  # as long as the packed sums, with which it would be matched
    dist.all_reduce(next_collective)
    return next_collective.tolist(), x.grad


def test_a_rank_whose_input_needs_no_gradient_takes_part_in_the_backward():
    """It skipped the all_reduce, so its next collective was added to the other rank's sums."""
    (first, dx), (second, _) = run_ranks(_rank_one_input_without_gradient, timeout=20)
    assert first == second == [2.0] * 6
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    F.batch_norm(x, None, None, training=True).pow(3).sum().backward()
    assert_close(dx, x.grad, torch.float32)


def _rank_frozen_parameters(frozen: tuple[str, ...]) -> dict[str, Tensor | None]:
    case = Case((3, 2))
    x, dy = (t[dist.get_rank()] for t in case.batch(0))
    layer = case.layer()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    y = layer(x.requires_grad_())
    with torch.no_grad():
        layer.bias.add_(1)  # the backward does not use its value
    y.backward(dy)
    return {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_frozen_parameters(frozen):
    case = Case((3, 2))
    layer = case.layer()
    want = batch_norm_oracle(*case.batch(0), layer.weight, layer.bias)
    for rank, grads in enumerate(run_ranks(_rank_frozen_parameters, 2, (frozen,))):
        assert all((grads[name] is None) == (name in frozen) for name in ("weight", "bias"))
        assert_close(grads["x"], want.grad_inputs[rank], torch.float32)


def test_the_first_batch_is_not_kept_alive():
    """Reading the locals of the calling frames, to detect nn.DataParallel, kept all of them alive."""

    def train(layer: nn.Module) -> bool:
        x = torch.randn(1000, 3)
        alive = weakref.ref(x)
        layer(x)
        del x
        gc.collect()
        return alive() is not None

    assert not train(nn.BatchNorm1d(3))
    assert not train(syncnorm.convert(nn.BatchNorm1d(3)))


def test_cumulative_average_without_running_statistics():
    """There is nothing to average, so num_batches_tracked is not needed."""
    layer = syncnorm.SyncBatchNorm(3, momentum=None, track_running_stats=False)
    assert layer(torch.randn(4, 3)).shape == (4, 3)
    check(Case((2, 3), momentum=None, track=False))
