"""Statistics over the micro-batches of a window, against fp64 autograd on the concatenated window."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from exchanges import recorded_exchanges
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from versions import one_graph
from windows import Windows, check

import syncnorm
from syncnorm.errors import InputError
from syncnorm.testing import assert_close, run_ranks
from syncnorm.training import end_window


@pytest.mark.parametrize(
    "case",
    [
        Windows((((4,),),), size=1),
        Windows((((4,), (3,), (5,), (2,)), ((2,), (6,)))),
        Windows((((4, 3), (1, 5)), ((2, 2), (3, 1))), size=2),
        Windows((((2, 3, 1), (0, 4, 2), (1, 1, 1), (3, 0, 0)), ((2, 2, 2),))),
        Windows((((0, 0), (3, 2), (0, 0), (1, 0)), ((0, 0),), ((2, 1),))),  # empty on all ranks
        Windows((((4, 3), (2, 5), (1, 1)),), masked=True),
        Windows((((4,), (3,)), ((5,), (2,))), masked=True, momentum=None),
        Windows((((4, 3), (2, 5)), ((1, 1), (2, 2), (2, 3))), momentum=None),
        Windows((((4, 3), (2, 5)), ((1, 1), (2, 2))), affine=False),
        Windows((((4, 3), (2, 5)), ((1, 1), (2, 2))), track=False),
        Windows((((4, 3), (2, 5), (3, 3)),), dtype="float32"),
        Windows((((4,), (2,), (3,)), ((3,),)), dtype="float32", layout="channels_last"),
        Windows((((4, 3), (2, 5), (3, 3)),), dtype="float32", mean=8.0),
        Windows((((4, 3), (2, 5)),), dtype="bfloat16", layout="channels_last"),
        Windows((((4,), (2,)),), dtype="float16"),
    ],
    ids=str,
)
def test_equals_autograd_on_the_window(case):
    check(case)


@pytest.mark.parametrize("forward", ["gather", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_over_native_collectives(monkeypatch, forward, masked):
    monkeypatch.setenv("SYNCNORM_TRANSPORT", "native")
    monkeypatch.setenv("SYNCNORM_FORWARD", forward)
    check(Windows((((4, 3), (0, 0), (2, 5)), ((1, 1), (2, 2))), dtype="float32", masked=masked))


def one_value(numbers: int) -> Tensor:
    return torch.arange(3.0 * numbers).view(numbers, 3)


def test_the_count_is_that_of_the_window():
    layer = syncnorm.convert(nn.BatchNorm1d(3), accumulate=3)
    with pytest.raises(InputError, match="more than 1 value per channel"):
        layer(one_value(1))
    for rows in (2, 1):
        layer(one_value(rows)).sum().backward()
    assert layer.num_batches_tracked == 1
    assert layer._sync_window.count == 3


class Siamese(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x) * self.norm(2 * x + 1), self.unused(x)


def test_a_micro_batch_is_not_a_call():
    model = syncnorm.convert(Siamese(), accumulate=2)
    plain = nn.BatchNorm1d(3)
    numbers, tracked = [], []
    batches = [torch.randn(4, 3) for _ in range(4)]
    for x in batches:
        out, unused = model(x)  # stays alive in the next forward, as a variable of a training loop does
        out.square().sum().backward()
        numbers.append((model.norm._sync_window._micro_batches, model.unused._sync_window._micro_batches))
        tracked.append(int(model.norm.num_batches_tracked))
    assert numbers == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert tracked == [1, 1, 2, 2]
    for pair in (batches[:2], batches[2:]):
        plain(torch.cat([v for x in pair for v in (x, 2 * x + 1)]))
    torch.testing.assert_close(model.norm.running_var, plain.running_var)
    assert unused.requires_grad


@pytest.mark.parametrize("kind", ["no_grad", "no parameters that require it", "dropped graphs"])
def test_forwards_without_backwards_do_not_pool_for_ever(kind):
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), accumulate=2)
    model.requires_grad_(kind != "no parameters that require it")
    counts = []
    for _ in range(5):
        with torch.set_grad_enabled(kind != "no_grad"):
            model(torch.randn(4, 3))
        counts.append(model[0]._sync_window.count)
    assert counts == [4, 8, 4, 8, 4]


def test_other_modes_leave_the_window_alone():
    layer = syncnorm.convert(nn.BatchNorm1d(3), accumulate=4)
    layer(torch.randn(4, 3)).sum().backward()
    x = torch.randn(5, 3)
    with syncnorm.no_sync_stats():
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
    layer.eval()(x)
    syncnorm.training.recalibrate(layer, [x])
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    assert layer._sync_window.count == 4
    layer.train()(x)
    assert layer._sync_window.count == 9


def test_buffers_that_were_loaded_in_a_window_are_updated_from_what_was_loaded():
    layer, plain = syncnorm.convert(nn.BatchNorm1d(3), accumulate=4), nn.BatchNorm1d(3)
    x, z = torch.randn(4, 3), torch.randn(5, 3)
    layer(x).sum().backward()
    state = {"running_mean": torch.full((3,), 7.0), "running_var": torch.full((3,), 9.0)}
    for each in (layer, plain):
        each.load_state_dict(state | {"num_batches_tracked": torch.tensor(20)}, strict=False)
    layer(z)
    plain(torch.cat([x, z]))
    assert all(torch.allclose(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_with_its_own_forward(momentum):
    class OwnCount(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked.add_(1)
            factor = self.momentum or 1 / float(self.num_batches_tracked)
            mean, var = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps).relu()

    layer = syncnorm.convert(OwnCount(3, momentum=momentum), accumulate=3)
    plain = nn.BatchNorm1d(3, momentum=momentum)
    for window in range(3):
        batches = [torch.randn(4, 3) + window for _ in range(3 if window < 2 else 2)]
        for x in batches:
            y = layer(x)
            y.sum().backward()
        torch.testing.assert_close(y, plain(torch.cat(batches))[-4:].relu())
        assert all(torch.allclose(a, b) for a, b in zip(layer.buffers(), plain.buffers(), strict=True))


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), models.BatchNormAct(3))


def _rank_checkpointed(kind: str) -> dict[str, Any]:
    model = syncnorm.convert(block(), accumulate=3).double()
    gradients = []
    with recorded_exchanges() as kinds:
        for number in range(5):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64)
            x = x.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
            y = model(x) if kind == "plain" else checkpoint(model, x, use_reentrant=kind == "reentrant")
            y.square().sum().backward()
            gradients.append(x.grad)
    parameters = [p.grad for p in model.parameters()]
    return {"gradients": [*gradients, *parameters], "buffers": [*model.buffers()], "calls": kinds}


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(kind):
    for plain, ours in zip(*(run_ranks(_rank_checkpointed, 2, (k,)) for k in ("plain", kind)), strict=True):
        for key in ("gradients", "buffers"):
            for a, b in zip(ours[key], plain[key], strict=True):
                torch.testing.assert_close(a, b)
        assert ours["calls"] == plain["calls"]


def _rank_out_of_step(cause: str) -> str:
    layer = syncnorm.convert(nn.BatchNorm1d(3), accumulate=3)
    try:
        for number in range(3):
            layer(torch.randn(4, 3)).sum().backward()
            if number == 1 and dist.get_rank() == 1:
                if cause == "step":
                    torch.optim.SGD(layer.parameters(), 0.1).step()
                else:
                    end_window(layer)
    except syncnorm.SyncNormError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("transport", ["auto", "native"])
@pytest.mark.parametrize("cause", ["step", "end_window"])
def test_ranks_at_different_micro_batches_raise_everywhere(monkeypatch, cause, transport):
    monkeypatch.setenv("SYNCNORM_TRANSPORT", transport)
    for message in run_ranks(_rank_out_of_step, 2, (cause,), timeout=30):
        assert "micro-batch 3 of its window" in message
        assert "micro-batch 1 of its window" in message
        assert "optimizer steps" in message


def _rank_skips_a_bad_batch() -> tuple[int, list[int]]:
    layer = syncnorm.convert(nn.BatchNorm1d(3), accumulate=3)
    failed, numbers = 0, []
    for number in range(4):
        x = torch.randn(4, 3) if (number, dist.get_rank()) != (1, 1) else torch.randn(4, 2)
        try:
            layer(x).sum().backward()
        except syncnorm.SyncNormError:
            failed += 1
        numbers.append(layer._sync_window._micro_batches)
    return failed, numbers


def test_ranks_stay_in_step_when_one_of_them_refuses_its_input():
    assert run_ranks(_rank_skips_a_bad_batch, 2) == [(1, [1, 1, 2, 3])] * 2


def test_no_second_derivative_and_no_transforms():
    layer = syncnorm.convert(nn.BatchNorm1d(3), accumulate=2)
    x = torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match=r"no second derivative .* accumulate=1"):
        dx.square().sum().backward()
    with pytest.raises(InputError, match=r"torch\.func.* accumulate=1"):
        torch.func.grad(lambda x: layer(x).square().sum())(torch.randn(4, 3))


def test_copies_and_pickles_have_windows_of_their_own():
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), accumulate=4)
    model(torch.randn(4, 3)).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(5, 3)).sum().backward()
        assert (model[0]._sync_window.count, other[0]._sync_window.count) == (4, 5)
        torch.optim.SGD(other.parameters(), 0.1).step()
        assert (model[0]._sync_window.count, other[0]._sync_window.count) == (4, 0)
    assert model.state_dict().keys() == nn.Sequential(nn.BatchNorm1d(3)).state_dict().keys()


def test_convert_again_revert_and_describe():
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), accumulate=4)
    assert "4 micro-batches" in str(syncnorm.describe(model))
    window = model[0]._sync_window
    assert syncnorm.convert(model)[0]._sync_window is window
    assert syncnorm.convert(model, accumulate=2)[0]._sync_window.size == 2
    assert syncnorm.convert(model, accumulate=1)[0]._sync_window is None
    syncnorm.convert(model, accumulate=2)
    assert vars(syncnorm.revert(model)[0]).keys() == vars(nn.BatchNorm1d(3)).keys()


@pytest.mark.parametrize("accumulate", [0, -1, 2.5, True, "2"])
def test_a_wrong_number_is_refused_before_anything_changes(accumulate):
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="accumulate="):
        syncnorm.convert(model, accumulate=accumulate)
    with pytest.raises(InputError, match="requires to='sync'"):
        syncnorm.convert(model, to="group", num_groups=3, accumulate=2)
    assert type(model[0]) is nn.BatchNorm1d


def _gone(build: Callable[[], tuple[nn.Module, Tensor]]) -> bool:
    model, y = build()
    refs = [weakref.ref(model), weakref.ref(model[0]), weakref.ref(y.grad_fn)]
    gc.disable()
    try:
        del model, y
        return all(ref() is None for ref in refs)
    finally:
        gc.enable()


def test_a_window_keeps_neither_graphs_nor_models_alive():
    def build() -> tuple[nn.Module, Tensor]:
        model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), accumulate=4)
        model(torch.randn(4, 3))
        return model, model(torch.randn(4, 3))

    assert _gone(build)


def _rank_compiled() -> list[list[Tensor]]:
    results = []
    for compiled in (False, dist.get_rank() == 0):
        model = syncnorm.convert(block(), accumulate=2)
        model[4] = nn.Identity()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        for number in range(3):
            x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(number + 10 * dist.get_rank()))
            forward(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    return results


def test_compiled_and_eager_ranks_meet():
    for eager, compiled in run_ranks(_rank_compiled, 2, timeout=100):
        for a, b in zip(eager, compiled, strict=True):
            assert_close(a, b.double(), torch.float32)


@one_graph
def test_one_graph_is_refused():
    torch.compiler.reset()
    model = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), accumulate=2)
    with pytest.raises(Exception, match="graph"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(4, 3))
    with pytest.raises(InputError, match="no graph can hold"):
        torch.export.export(model, (torch.randn(4, 3),), strict=False)
    torch.compile(model.eval(), fullgraph=True, backend="eager")(torch.randn(4, 3))
