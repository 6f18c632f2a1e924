"""Activation checkpointing: a recomputed layer neither communicates nor counts the batch a second time."""

import gc
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from exchanges import recorded_exchanges
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.layer import checkpointing
from syncnorm.layer.arguments import Sync
from syncnorm.layer.global_moments import global_moments
from syncnorm.testing import assert_close, run_ranks

SPLITS = (3, 5, 0)


def block(norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=2), norm(3))


def net(norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(block(norm), block(norm))


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(SPLITS), 3, 6, 6)
    return torch.randn(shape, generator=generator) + seed, torch.randn(shape, generator=generator)


def run(model: nn.Sequential, x: Tensor, kind: str) -> Tensor:
    """Runs both blocks: each as a segment, or nested in an outer segment."""
    if kind == "plain":
        return model(x)
    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "nested":
        return checkpoint(lambda x: checkpoint(model[1], checkpoint(model[0], x, **options), **options), x, **options)
    for segment in model:
        x = checkpoint(segment, x, **options)
    return x


def _rank_steps(kind: str, order: list[int], norm: type[nn.BatchNorm2d]) -> dict[str, Any]:
    """Two forwards, then their backwards in the given order."""
    rank = dist.get_rank()
    model = syncnorm.convert(net(norm)).double()
    inputs = [data(seed)[0].double().split(SPLITS)[rank].clone().requires_grad_() for seed in (0, 1)]
    with recorded_exchanges() as kinds:
        outputs = [run(model, x, kind) for x in inputs]
        for i in order:
            outputs[i].backward(data(i)[1].double().split(SPLITS)[rank])
    result = {
        "y": [y.detach() for y in outputs],
        "dx": [x.grad for x in inputs],
        "grads": [p.grad for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
        "calls": kinds,
    }
    del outputs, inputs
    gc.collect()
    result["kept"] = sum(len(refs) for refs in checkpointing._remembered.values())
    return result


@pytest.mark.parametrize("order", [[1, 0], [0, 1]])
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("reentrant", nn.BatchNorm2d),
        ("non-reentrant", nn.BatchNorm2d),
        ("nested", nn.BatchNorm2d),
        ("non-reentrant", models.BatchNormAct),
        ("reentrant", models.BatchNormAct),
    ],
)
def test_equals_the_whole_batch_without_checkpoints(kind, norm, order):
    ranks = run_ranks(_rank_steps, len(SPLITS), (kind, order, norm), timeout=60)
    model = net(norm).double()
    inputs = [data(seed)[0].double().requires_grad_() for seed in (0, 1)]
    outputs = [model(x) for x in inputs]
    for i in order:
        outputs[i].backward(data(i)[1].double())
    for i in (0, 1):
        assert_close(torch.cat([r["y"][i] for r in ranks]), outputs[i].detach(), torch.float64)
        assert_close(torch.cat([r["dx"][i] for r in ranks]), inputs[i].grad, torch.float64)
    for got, parameter in zip(zip(*(r["grads"] for r in ranks), strict=True), model.parameters(), strict=True):
        assert_close(sum(got), parameter.grad, torch.float64)
    for r in ranks:
        for name, buffer in model.named_buffers():
            assert_close(r["buffers"][name], buffer, torch.float64)
        assert r["calls"].count("FORWARD") == r["calls"].count("BACKWARD") == 8  # 4 layers, twice
        assert r["kept"] == 0


def _rank_frozen_and_unsynced(kind: str) -> tuple[list[str], int, Tensor]:
    """A segment whose parameters are frozen; then a segment that runs on rank 0 only."""
    model = syncnorm.convert(net())
    model[0].requires_grad_(False)
    x = torch.randn(4, 3, 6, 6, requires_grad=kind == "reentrant")
    with recorded_exchanges() as kinds:
        run(model, x, kind).backward(torch.randn(4, 3, 6, 6))
        if dist.get_rank() == 0:
            with syncnorm.no_sync_stats():
                y = run(model, x, kind)
            y.backward(torch.randn_like(y))
    return kinds, int(model[1][1].num_batches_tracked), model[0][1].running_mean


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_frozen_segments_and_segments_on_one_rank(kind):
    results = run_ranks(_rank_frozen_and_unsynced, args=(kind,), timeout=30)
    for calls, tracked, mean in results:
        assert calls.count("FORWARD") == 4
        assert tracked == 1
        assert torch.equal(mean, results[0][2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_process_also_counts_a_batch_once(reentrant):
    layer = syncnorm.SyncBatchNorm1d(3)
    plain = nn.BatchNorm1d(3)
    x, dy = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
    z = x.detach().requires_grad_()
    plain(z).backward(dy)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_var, plain.running_var)
    torch.testing.assert_close(x.grad, z.grad)


def _rank_equal_inputs_on_rank_0() -> str:
    layer = syncnorm.SyncBatchNorm1d(3)
    x = torch.ones(4, 3) * torch.arange(4).view(4, 1)
    inputs = [(x + (dist.get_rank() * i)).requires_grad_() for i in range(2)]
    outputs = [checkpoint(layer, x, use_reentrant=False) for x in inputs]
    try:
        outputs[1].backward(torch.randn(4, 3))
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


def test_indistinguishable_segments_are_an_error():
    assert "cannot tell which of 2 checkpointed forwards" in run_ranks(_rank_equal_inputs_on_rank_0, timeout=30)[0]


@pytest.mark.parametrize("count", [4, "of a mask"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_on_a_gpu_segments_are_recognized_without_reading_values(reentrant, count):
    """The meta device stands for the GPU: its tensors have no values, and reading one raises."""
    used: list[checkpointing.ForwardStatistics] = []
    on_device = torch.tensor(4, device="meta")

    def segment(x: Tensor) -> Tensor:
        sync = Sync(None, "layer", checkpointing.graph_owners())
        mean, invstd = (torch.empty(3, device="meta") for _ in range(2))
        used.append(global_moments((mean, invstd, count if count == 4 else on_device), 1e-5, sync)[0])
        return x.sin().sin()

    inputs = [torch.empty(4, 3, device="meta", requires_grad=True) for _ in range(3)]
    outputs = [
        checkpoint(segment, x, use_reentrant=reentrant, preserve_rng_state=False, determinism_check="none")
        for x in inputs
    ]
    for i in (1, 2, 0):
        outputs[i].sum().backward()
    assert len({id(record) for record in used[:3]}) == 3
    assert [id(record) for record in used[3:]] == [id(used[i]) for i in (1, 2, 0)]
