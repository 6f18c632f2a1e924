"""How micro-batches run in step: threads and their state, errors, what is refused, and what is left behind."""

import contextvars
import copy
import gc
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from residual import data, resnet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.errors import InputError, SyncNormError
from syncnorm.layer import micro_batches
from syncnorm.testing import run_ranks
from syncnorm.training import run_in_step, whole_batch


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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, as in a program in the foreground; a shell has those in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
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
