"""Micro-batches that run in step: outputs, gradients and statistics of the whole batch of all ranks."""

import contextvars
import copy
import gc
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.errors import InputError, SyncNormError
from syncnorm.layer import micro_batches
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks
from syncnorm.training import run_in_step, whole_batch


class Block(nn.Module):
    """A residual block, whose shortcut has a batch norm that runs beside the others."""

    def __init__(self, inputs: int, outputs: int, stride: int, checkpointed: bool | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.checkpointed)

    def block(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(checkpointed: bool | None = None, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(inplace=True),
        Block(6, 6, 1, checkpointed), Block(6, 8, 2, checkpointed), Block(8, 8, 1, checkpointed),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # weights of 1 and biases of 0 hide faults
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return net


def data(samples: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 12, 12, generator=generator, dtype=torch.double) * 2 + 3
    return x.to(dtype), torch.randn(samples, 5, generator=generator, dtype=torch.double).to(dtype)


def state(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    return {
        "y": y.detach(),
        "dx": x.grad,
        "grads": [p.grad for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
    }


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
    [pairs] = _samples(((2, 3, 1),), torch.double)
    masks = [
        torch.rand(x.size(0), 3, 2, generator=torch.Generator().manual_seed(i)) < 0.6
        for i, (x, _) in enumerate(pairs)
    ]
    masks[2][:] = False
    inputs = [x.clone().requires_grad_() for x, _ in pairs]
    outputs = run_in_step(lambda i: layer(inputs[i], mask=masks[i]), [0, 1, 2])
    torch.autograd.backward(outputs, [dy for _, dy in pairs])
    whole = torch.cat([x for x, _ in pairs]).requires_grad_()
    expected = reference(whole, mask=torch.cat(masks))
    expected.backward(torch.cat([dy for _, dy in pairs]))
    assert_close(torch.cat(outputs), expected, torch.double)
    assert_close(torch.cat([x.grad for x in inputs]), whole.grad, torch.double)
    assert_close(layer.weight.grad, reference.weight.grad, torch.double)
    assert_close(layer.running_var, reference.running_var, torch.double)


def one_step(model: nn.Module, context: Any, samples: int = 7, autocast: bool = False) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    x, dy = data(samples, dtype)
    x.requires_grad_()
    with context, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(x)
    y.float().backward(dy.float()) if autocast else y.backward(dy)
    return state(model, x, y)


def assert_same_step(have: dict[str, Any], want: dict[str, Any], dtype: torch.dtype = torch.double) -> None:
    for key in ("y", "dx"):
        assert_close(have[key], want[key].double(), dtype)
    for a, b in zip(have["grads"], want["grads"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b.double(), dtype)
    for name, buffer in want["buffers"].items():
        assert_close(have["buffers"][name].double(), buffer.double(), dtype)


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


def test_the_model_is_as_before_after_the_context():
    model = syncnorm.convert(resnet().double())
    with whole_batch(model, 2):
        assert "forward" in model.__dict__
    assert "forward" not in model.__dict__
    with pytest.raises(KeyError), whole_batch(model, 2):
        raise KeyError
    assert "forward" not in model.__dict__
    model.forward = forward = model.forward
    with whole_batch(model, 2):
        assert model.forward is not forward
    assert model.forward is forward


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


def test_a_reentrant_checkpoint_is_refused_in_the_backward():
    model = syncnorm.convert(resnet(checkpointed=True).double())
    x, dy = data(6)
    with whole_batch(model, 2):
        y = model(x.requires_grad_())
    with pytest.raises(SyncNormError, match="use_reentrant=False"):
        y.backward(dy)


def test_a_checkpoint_around_the_divided_model_is_refused():
    model = syncnorm.convert(resnet().double())
    x, dy = data(6)
    with whole_batch(model, 2, offload=False):  # whose hooks would be inside of the checkpoint's
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
        with pytest.raises(SyncNormError, match="inside of the model"):
            y.backward(dy)


def test_a_reentrant_checkpoint_around_the_divided_model_is_refused_in_the_forward():
    model = syncnorm.convert(resnet().double())
    x, _ = data(6)
    with whole_batch(model, 2), pytest.raises(SyncNormError, match="inside of the model"):
        checkpoint(model, x.requires_grad_(), use_reentrant=True)
    assert model[1].num_batches_tracked == 0


def test_a_loss_of_some_micro_batches_only_is_refused():
    layer = syncnorm.convert(nn.BatchNorm1d(4))
    x = torch.randn(8, 4, requires_grad=True)
    first, _ = run_in_step(layer, x.split(4))
    with pytest.raises(SyncNormError, match="Use all of them in one loss"):
        first.square().sum().backward()


def test_there_is_no_second_derivative():
    layer = syncnorm.convert(nn.BatchNorm1d(4))
    x = torch.randn(8, 4, requires_grad=True)
    loss = sum(y.pow(3).sum() for y in run_in_step(layer, x.split(4)))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_the_same_graph_gives_the_same_gradient_twice():
    layer = syncnorm.convert(nn.BatchNorm1d(4))
    x = torch.randn(8, 4, requires_grad=True)
    loss = sum(y.pow(3).sum() for y in run_in_step(layer, x.split(3)))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("number", [0, -1, 2.0, True, None, "2"])
def test_a_wrong_number_is_refused(number):
    with pytest.raises(InputError, match="positive integer"), whole_batch(syncnorm.convert(resnet()), number):
        pass


def test_layers_that_would_see_micro_batches_alone_are_refused():
    with pytest.raises(InputError, match=r"3\.bn1.*call syncnorm\.convert"), whole_batch(resnet(), 2):
        pass
    with pytest.raises(InputError, match="expects an nn"), whole_batch(resnet, 2):
        pass
    with whole_batch(resnet().eval(), 2):
        pass


class TwoWays(nn.Module):
    """Calls layers in an order that the data determines."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.a(x) if x.sum() == 0 else self.a(self.b(x))


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ((1.0, -1.0), r"micro-batch 0: a \(4 channels.*\n.*micro-batch 1: b \(4 channels"),
        ((0.0, 1.0), r"micro-batch 0: no further synced layer\n.*micro-batch 1: b \(4 channels"),
    ],
)
def test_micro_batches_that_call_different_layers_are_an_error(values, got):
    model = syncnorm.convert(TwoWays())
    before = copy.deepcopy(model.state_dict())
    x = torch.tensor(values).repeat_interleave(2)[:, None].repeat(1, 4)
    with pytest.raises(SyncNormError, match=got), whole_batch(model, 2):
        model(x)
    assert micro_batches.current() is None
    if values[0] > 0:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with whole_batch(model, 2):  # and the next one works
        model(torch.rand(4, 4))


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.next = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if x.size(0) == 1:
            raise ZeroDivisionError("out of order")
        return self.next(x)


def _rank_breaks() -> str:
    model = syncnorm.convert(Breaks())
    samples = 5 if dist.get_rank() else 6  # in 3 parts the last rank has one of a single sample
    try:
        with whole_batch(model, 3):
            model(torch.randn(samples, 4))
    except (ZeroDivisionError, SyncNormError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_in_one_micro_batch_is_raised_on_all_ranks():
    waiting, failed = run_ranks(_rank_breaks, 2)
    assert failed == "ZeroDivisionError: out of order"
    assert waiting.startswith("SyncNormError")
    assert "it raised ZeroDivisionError" in waiting
    assert "out of order" in waiting


def test_a_single_value_is_refused_and_changes_nothing():
    layer = syncnorm.convert(nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="more than 1 value per channel"):
        run_in_step(layer, [torch.zeros(0, 4), torch.randn(1, 4)])
    assert layer.num_batches_tracked == 0
    run_in_step(layer, [torch.randn(1, 4), torch.randn(1, 4)])
    assert layer.num_batches_tracked == 1


def test_no_micro_batches_and_nested_ones_are_refused():
    with pytest.raises(InputError, match="at least one"):
        run_in_step(nn.Identity(), [])
    with pytest.raises(InputError, match="cannot be divided again"):
        run_in_step(lambda _: run_in_step(nn.Identity(), [1, 2]), [1, 2])


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


def test_modes_of_the_calling_thread_hold():
    with torch.device("meta"):
        assert run_in_step(lambda _: torch.zeros(2).device.type, range(2)) == ["meta", "meta"]
    assert torch.zeros(2).device.type == "cpu"
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        run_in_step(lambda x: x * x, [torch.ones(1, requires_grad=True)] * 2, offload=False)
    assert len(packed) == 4


def test_a_backward_goes_through_one_micro_batch_after_the_other():
    seen: list[int] = []

    def function(index: int) -> Tensor:
        x = torch.randn(3, 4, requires_grad=True)
        for _ in range(2):
            x = layer(x)
            for _ in range(3):
                x = x * 2
                x.register_hook(lambda _: seen.append(index))
        return x

    layer = syncnorm.convert(nn.BatchNorm1d(4))
    torch.cat(run_in_step(function, range(3))).sum().backward()
    assert seen == [2, 2, 2, 1, 1, 1, 0, 0, 0] * 2


@pytest.mark.parametrize("offload", [False, True])
def test_a_graph_that_no_backward_uses_is_freed(offload):
    model = syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 4)))
    saved: list[StorageWeakRef] = []
    model[2].register_forward_hook(lambda *call: saved.append(StorageWeakRef(call[-1].untyped_storage())))
    with whole_batch(model, 2, offload=offload):
        y = model(torch.randn(6, 4))
    assert [output.expired() for output in saved] == [False, False]
    del y
    gc.collect()
    assert [output.expired() for output in saved] == [True, True]


@pytest.mark.parametrize("offload", [False, True])
def test_a_backward_after_the_weights_have_changed_is_refused(offload):
    model = syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with whole_batch(model, 2, offload=offload):
        y = model(torch.randn(6, 4, requires_grad=True))
    y.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_interrupt_of_the_waiting_thread_ends_all_micro_batches():
    layer, ended = syncnorm.convert(nn.BatchNorm1d(4)), []

    def function(x: Tensor) -> Tensor:
        try:
            y = layer(x)
            threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
            time.sleep(0.5)
            return layer(y)
        finally:
            ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_in_step(function, torch.randn(6, 4).split(2))
    assert len(ended) == 3
    assert len(run_in_step(layer, torch.randn(6, 4).split(2))) == 3  # and the next one works


def test_context_variables_of_the_caller_hold():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(3)
    assert run_in_step(lambda _: variable.get(), range(2)) == [3, 3]


def test_a_copy_made_in_the_context_is_a_model_of_its_own():
    model = syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    x = torch.randn(6, 4)
    with whole_batch(model, 2):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copied in copies:
        torch.testing.assert_close(copied(x), model(x))
        before = model[1].num_batches_tracked.item()
        with torch.no_grad():
            copied[0].weight.zero_()
        assert copied.train()(x).std() < 0.01  # by its own weights
        assert model[1].num_batches_tracked == before
        with whole_batch(copied, 2):
            copied(x)


def test_batch_norm_in_eval_mode_without_running_statistics_is_refused():
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))
    with whole_batch(model, 2):
        pass
    model.eval()
    with (
        pytest.raises(InputError, match="0 would see each micro-batch alone"),
        whole_batch(model, 2),
    ):
        pass


@dataclass
class Output:
    logits: Tensor


class Returns(nn.Module):
    """Returns what a function makes of its input and a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(1, 4)), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def test_outputs_that_are_no_tensors_of_samples():
    same = Returns(lambda x, weight: (x, weight, "text"))
    with whole_batch(same, 6):
        output, weight, text = same(torch.zeros(6, 4))
    assert output.shape == (6, 4)
    assert weight is same.weight
    assert text == "text"
    unknown = Returns(lambda x, _: Output(x))
    with whole_batch(unknown, 2), pytest.raises(InputError, match="outputs of type Output"):
        unknown(torch.zeros(6, 4))


def test_a_transform_of_torch_func_around_the_divided_model_is_refused():
    model = syncnorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (torch.randn(6, 4),)).sum()

    with whole_batch(model, 2), pytest.raises(InputError, match="transform inside of them"):
        torch.func.grad(loss)(dict(model.named_parameters()))


def test_threads_do_not_catch_up_with_the_nodes_of_a_whole_training():
    made = micro_batches._highest + 100_000
    micro_batches.count_nodes_to(made)
    assert torch._C._autograd._get_sequence_nr() >= made
    assert all(run_in_step(lambda _: torch._C._autograd._get_sequence_nr() < made, range(3)))
