"""Micro-batches that run in step: outputs, gradients and statistics of the whole batch of all ranks."""

import copy
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from residual import assert_same_step, data, one_step, resnet, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks
from syncnorm.training import run_in_step, whole_batch


def _rank_step(splits: tuple[int, ...], parts: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """One step of a rank with its micro-batches; DDP averages, so the cotangents are scaled by the world size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = syncnorm.convert(resnet(options.get("checkpointed")).double())
    x, dy = (t.split(splits)[rank].clone() for t in data(sum(splits)))
    x.requires_grad_()
    ddp = DistributedDataParallel(model)
    with whole_batch(ddp, parts[rank]):
        y = ddp(x)
    y.backward(dy * world)
    return state(model, x, y)


@pytest.mark.parametrize(
    ("splits", "parts", "options"),
    [
        ((6, 6), (3, 3), {}),
        ((5, 2), (3, 2), {}),  # uneven micro-batches, and a rank with fewer
        ((7, 0), (4, 4), {}),  # an empty rank
        ((3, 5, 2), (2, 1, 4), {}),  # undivided on one rank; more parts than samples on another
        ((6, 4), (3, 3), {"checkpointed": False}),
    ],
)
def test_a_residual_network_computes_the_step_of_the_whole_batch(splits, parts, options):
    reference = resnet().double()
    x, dy = data(sum(splits))
    x.requires_grad_()
    y = reference(x)
    y.backward(dy)
    expected = state(reference, x, y)
    ranks = run_ranks(_rank_step, len(splits), (splits, parts, options))
    assert_close(torch.cat([r["y"] for r in ranks]), expected["y"], torch.double)
    assert_close(torch.cat([r["dx"] for r in ranks]) / len(splits), expected["dx"], torch.double)
    for rank in ranks:
        for have, want in zip(rank["grads"], expected["grads"], strict=True):
            assert_close(have, want, torch.double)
        for name, want in expected["buffers"].items():
            assert_close(rank["buffers"][name].double(), want.double(), torch.double)


def _layer(dtype: torch.dtype) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    layer = syncnorm.SyncBatchNorm2d(4)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=generator)
        layer.bias.normal_(generator=generator)
        layer.running_mean.normal_(generator=generator)
    return layer.to(dtype)


def _samples(sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(4)

    def draw(n: int) -> Tensor:
        return torch.randn(n, 4, 3, 2, generator=generator, dtype=torch.double)

    return [[((draw(n) * 2 + 5).to(dtype), draw(n).to(dtype)) for n in rank] for rank in sizes]


def _rank_layer(sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype, layout: str) -> dict[str, Any]:
    layer = _layer(torch.float32 if dtype in (torch.half, torch.bfloat16) else dtype)
    pairs = _samples(sizes, dtype)[dist.get_rank()]
    inputs = [x.to(memory_format=getattr(torch, layout)).requires_grad_() for x, _ in pairs]
    outputs = run_in_step(layer, inputs)
    torch.autograd.backward(outputs, [dy for _, dy in pairs])
    assert all(y.is_contiguous(memory_format=getattr(torch, layout)) for y in outputs)
    return {
        "y": [y.detach() for y in outputs],
        "dx": [x.grad for x in inputs],
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "buffers": dict(layer.named_buffers()),
    }


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16, torch.half])
@pytest.mark.parametrize(
    "sizes",
    [
        ((2, 3),),
        ((1, 1, 1, 1),),
        ((4,), (1, 2)),
        ((0, 3, 1), (2, 0)),
        ((0, 0), (2, 5, 1, 2), (3,)),
    ],
    ids=str,
)
def test_the_layer_is_fp64_batch_norm_of_all_micro_batches_of_all_ranks(sizes, dtype, layout):
    layer, pairs = _layer(torch.double), _samples(sizes, dtype)
    flat = [pair for rank in pairs for pair in rank]
    oracle = batch_norm_oracle(
        [x for x, _ in flat], [dy for _, dy in flat],
        layer.weight.detach(), layer.bias.detach(), layer.running_mean, layer.running_var,
    )  # fmt: skip
    ranks = run_ranks(_rank_layer, len(sizes), (sizes, dtype, layout))
    first = 0
    for rank, own in zip(ranks, sizes, strict=True):
        part = slice(first, first + len(own))
        first += len(own)
        for key, expected in (("y", oracle.outputs), ("dx", oracle.grad_inputs)):
            for have, want in zip(rank[key], expected[part], strict=True):
                assert_close(have, want, dtype)
        stats = torch.float32 if dtype in (torch.half, torch.bfloat16) else dtype
        for key, of_parts in (("dw", oracle.grad_weight), ("db", oracle.grad_bias)):
            assert_close(rank[key], sum(of_parts[part], torch.zeros(4).double()), stats)
        assert_close(rank["buffers"]["running_mean"], oracle.running_mean, stats)
        assert_close(rank["buffers"]["running_var"], oracle.running_var, stats)
        assert rank["buffers"]["num_batches_tracked"] == 1


def test_masked_positions_do_not_count():
    layer = _layer(torch.double)
    reference = copy.deepcopy(layer)
    [pairs] = _samples(((2, 0, 3, 1),), torch.double)
    masks = [
        torch.rand(x.size(0), 3, 2, generator=torch.Generator().manual_seed(i)) < 0.6
        for i, (x, _) in enumerate(pairs)
    ]
    masks[3][:] = False
    inputs = [x.clone().requires_grad_() for x, _ in pairs]
    outputs = run_in_step(lambda i: layer(inputs[i], mask=masks[i]), range(4))
    torch.autograd.backward(outputs, [dy for _, dy in pairs])
    whole = torch.cat([x for x, _ in pairs]).requires_grad_()
    expected = reference(whole, mask=torch.cat(masks))
    expected.backward(torch.cat([dy for _, dy in pairs]))
    assert_close(torch.cat(outputs), expected, torch.double)
    assert_close(torch.cat([x.grad for x in inputs]), whole.grad, torch.double)
    assert_close(layer.weight.grad, reference.weight.grad, torch.double)
    assert_close(layer.running_var, reference.running_var, torch.double)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 20])
def test_one_process_without_a_process_group(parts):
    model = syncnorm.convert(resnet().double())
    assert_same_step(one_step(model, whole_batch(model, parts)), one_step(resnet().double(), nullcontext()))


def test_autocast_and_grad_mode_hold_in_micro_batches():
    model = syncnorm.convert(resnet())
    have = one_step(model, whole_batch(model, 3), autocast=True)
    want = one_step(resnet(), nullcontext(), autocast=True)
    assert have["y"].dtype == torch.bfloat16
    assert_close(have["y"], want["y"].double(), torch.bfloat16)
    for name, buffer in want["buffers"].items():
        assert_close(have["buffers"][name].double(), buffer.double(), torch.bfloat16)
    with torch.no_grad(), whole_batch(model, 3):
        assert not model(data(6, torch.float)[0]).requires_grad
    with torch.inference_mode(), whole_batch(model.eval(), 3):
        assert model(data(6, torch.float)[0]).is_inference()


def test_frozen_layers_stay_frozen_and_do_not_wait():
    def frozen(model: nn.Sequential) -> nn.Sequential:
        for module in (model[1], model[4].bn2):
            module.eval().requires_grad_(False)
        return model

    model = frozen(syncnorm.convert(resnet().double()))
    assert_same_step(one_step(model, whole_batch(model, 3)), one_step(frozen(resnet().double()), nullcontext()))


def test_a_layer_with_its_own_forward_counts_the_batch_once():
    model = syncnorm.convert(resnet(norm=models.BatchNormAct).double())
    have = one_step(model, whole_batch(model, 3))
    assert_same_step(have, one_step(resnet(norm=models.BatchNormAct).double(), nullcontext()))
    assert model[1].num_batches_tracked == 1


def test_a_copy_in_eval_mode_is_evaluated_with_the_statistics_of_the_whole_batch():
    model = syncnorm.convert(resnet().double())
    one_step(model, whole_batch(model, 3))
    average = copy.deepcopy(model).eval()
    reference = resnet().double()
    one_step(reference, nullcontext())
    x, _ = data(4)
    assert_close(average(x), reference.eval()(x), torch.double)


class Noisy(nn.Module):
    """Draws random numbers between two layers, in a checkpoint."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        self.first, self.second, self.checkpointed = nn.BatchNorm1d(4), nn.BatchNorm1d(4), checkpointed

    def block(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def test_each_micro_batch_has_a_random_stream_that_a_checkpoint_finds_again():
    found = []
    for checkpointed in (False, True):
        model = syncnorm.convert(Noisy(checkpointed))
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(12, 4, generator=generator).requires_grad_()
        torch.manual_seed(6)
        with whole_batch(model, 3):
            y = model(x)
        after = torch.rand(1)
        y.backward(torch.randn(12, 4, generator=generator))
        found.append((y.detach(), x.grad, after))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)
    drawn = run_in_step(lambda _: torch.rand(3), range(3))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 3


def test_compiled_code_runs_in_eager_mode():
    model = syncnorm.convert(resnet().double())
    model[3] = torch.compile(model[3], backend="eager")
    compiled = torch.compile(model, backend="eager")
    have = one_step(model, whole_batch(compiled, 3))
    have["buffers"] = {name.replace("_orig_mod.", ""): buffer for name, buffer in have["buffers"].items()}
    assert_same_step(have, one_step(resnet().double(), nullcontext()))


def test_without_synchronization_the_batch_of_this_rank_is_still_whole():
    layer = syncnorm.convert(nn.BatchNorm1d(4).double())
    x = torch.randn(6, 4, dtype=torch.double) + 3
    with syncnorm.no_sync_stats():
        outputs = run_in_step(layer, x.split(2))
    assert_close(torch.cat(outputs), F.batch_norm(x, None, None, training=True), torch.double)
    assert layer.num_batches_tracked == 0
