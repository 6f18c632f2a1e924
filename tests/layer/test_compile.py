"""``torch.compile(fullgraph=True)``: one graph, the results of eager mode, each collective once and in order."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DTYPES, Case, laid_out
from exchanges import recorded_exchanges
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from versions import one_graph

import syncnorm
from syncnorm import comm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

pytestmark = one_graph  # test_compile_breaks.py is for all versions
# Compilation takes seconds, and the ranks share the cores.
TIMEOUT_S = 100


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model: Any, backend: str = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def _rank_steps_of(case: Case, backend: str = "aot_eager") -> tuple[int, list[dict[str, Tensor]]]:
    """The number of graphs, and the results of each step of ``case``."""
    layer = case.layer()
    model, results = compiled(layer, backend), []
    for step in range(case.steps):
        inputs, grads = (t[dist.get_rank()] for t in case.batch(step))
        x = laid_out(inputs, case.layout).detach().requires_grad_()
        layer.zero_grad()
        y = model(x)
        y.backward(laid_out(grads, case.dy_layout))
        result = {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}
        results.append(result | {k: v.clone() for k, v in layer.named_buffers()})
    return graphs(), results


CASES = {
    "uneven": Case((3, 2), steps=3),
    "empty rank": Case((4, 0), steps=2),
    "bf16": Case((3, 2), dtype="bfloat16", steps=2),
    "channels_last": Case((3, 2), layout="channels_last", dy_layout="channels_last", steps=2),
    "average": Case((3, 2), momentum=None, steps=3),
    "no dimensions": Case((5, 4), spatial=(), steps=2),
}


def _rank_run_cases(cases: dict[str, Case]) -> dict[str, tuple[int, list[dict[str, Tensor]]]]:
    return {name: _rank_steps_of(case) for name, case in cases.items()}


def check_case(case: Case, ranks: list[tuple[int, list[dict[str, Tensor]]]]) -> None:
    assert [count for count, _ in ranks] == [1, 1]
    layer = case.layer()
    mean, var = torch.zeros(3), torch.ones(3)
    for step in range(case.steps):
        momentum = 1 / (step + 1) if case.momentum is None else case.momentum
        want = batch_norm_oracle(*case.batch(step), layer.weight, layer.bias, mean, var, momentum, layer.eps)
        mean, var = want.running_mean, want.running_var
        for rank, (_, results) in enumerate(ranks):
            got = results[step]
            assert_close(got["y"], want.outputs[rank], DTYPES[case.dtype])
            assert_close(got["dx"], want.grad_inputs[rank], DTYPES[case.dtype])
            assert_close(got["dw"], want.grad_weight[rank], torch.float32)
            assert_close(got["db"], want.grad_bias[rank], torch.float32)
            assert_close(got["running_mean"], mean, torch.float32)
            assert_close(got["running_var"], var, torch.float32)
            assert got["num_batches_tracked"] == step + 1


@pytest.mark.slow
def test_a_layer_in_one_graph_equals_the_whole_batch():
    ranks = run_ranks(_rank_run_cases, 2, (CASES,), TIMEOUT_S)
    for name, case in CASES.items():
        check_case(case, [rank[name] for rank in ranks])


@pytest.mark.slow
def test_a_layer_through_inductor():
    case = Case((3, 2), steps=2)
    check_case(case, run_ranks(_rank_steps_of, 2, (case, "inductor"), TIMEOUT_S))


def _rank_train(
    build: Callable[[], nn.Module], compiling: bool, rows: tuple[int, ...]
) -> tuple[int, dict[str, Tensor]]:
    """Three steps on this rank's part of each batch of 12: the number of graphs, and the final state."""
    model = syncnorm.convert(build()).double()
    step = compiled(model) if compiling else model
    for number in range(3):
        x = torch.randn(12, 3, 6, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        if dist.is_initialized():
            x = x.split(rows)[dist.get_rank()]
        model.zero_grad()
        step(x).square().sum().backward()
        for parameter in model.parameters():
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
            parameter.data -= 1e-3 * parameter.grad
    return graphs(), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("build", [models.net, models.net_with_activations])
def test_a_model_trains_like_one_process(build):
    """Includes a model whose layers have their own forward."""
    _, want = _rank_train(build, False, ())
    for count, state in run_ranks(_rank_train, 2, (build, True, (5, 7)), TIMEOUT_S):
        assert count == 1
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8)


def _rank_with_rank_0_compiled(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    return _rank_train(build, dist.get_rank() == 0, (5, 7))[1]


@pytest.mark.slow
def test_a_compiled_rank_and_an_eager_one_share_statistics():
    _, want = _rank_train(models.net, False, ())
    for state in run_ranks(_rank_with_rank_0_compiled, 2, (models.net,), TIMEOUT_S):
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8)


def _rank_batch_sizes(dynamic: bool | None) -> list[int]:
    """The number of graphs after each of several batch sizes."""
    layer = syncnorm.SyncBatchNorm2d(3)
    model, counts = compiled(layer, dynamic=dynamic), []
    for rows in (4, 6, 5, 8):
        model(torch.randn(rows + dist.get_rank(), 3, 13, 11)).sum().backward()
        counts.append(graphs())
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "expected"), [(None, [1, 2, 2, 2]), (True, [1, 1, 1, 1])])
def test_other_batch_sizes_recompile_at_most_once(dynamic, expected):
    assert run_ranks(_rank_batch_sizes, 2, (dynamic,), TIMEOUT_S) == [expected, expected]


class Unused(nn.Module):
    """Three layers; the output depends on one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (syncnorm.SyncBatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x + 1)
        with torch.no_grad():
            self.frozen(x + 2)
        return self.used(x)


def _rank_calls_of_a_step(backend: str) -> tuple[list[str], list[int]]:
    """The exchanges of the second step, and ``num_batches_tracked`` of all layers after it."""
    model = Unused()
    step = compiled(model, backend)
    x = torch.randn(4, 3, 5, 5)
    step(x).square().sum().backward()
    from syncnorm.comm import exchange

    calls, start = [], exchange.Exchange._begin

    def noted(self: Any, call: Any, *rest: Any, **options: Any) -> Any:
        calls.append(f"{call.kind.name} {call.number} {call.layer[-1]}")
        return start(self, call, *rest, **options)

    exchange.Exchange._begin = noted
    try:
        step(x).square().sum().backward()
    finally:
        exchange.Exchange._begin = start
    return calls, [int(m.num_batches_tracked) for m in model.children()]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_each_collective_runs_once_and_in_order_even_if_its_result_is_unused(backend):
    """Layers are numbered in the order of their first call."""
    want = ["FORWARD 5 1", "FORWARD 6 2", "FORWARD 7 3", "BACKWARD 7 3"]  # of the second step
    for calls, counts in run_ranks(_rank_calls_of_a_step, 2, (backend,), TIMEOUT_S):
        assert calls == want
        assert counts == [2, 2, 2]


def _rank_masked(rows: tuple[int, ...]) -> tuple[int, Tensor, Tensor]:
    layer = syncnorm.SyncBatchNorm1d(3)
    model = compiled(layer)
    for _ in range(2):
        x, mask = (t.split(rows)[dist.get_rank()] for t in masked_batch())
        x = x.clone().requires_grad_()
        y = model(x, mask=mask)
        y.square().square().sum().backward()
    return graphs(), y.detach(), x.grad


def masked_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    x = torch.randn(5, 3, 7, generator=generator)
    return x.masked_fill(~mask.unsqueeze(1), torch.nan), mask


def test_masks():
    x, mask = masked_batch()
    valid = x.double().transpose(1, 2)[mask].requires_grad_()
    F.batch_norm(valid, None, None, training=True).square().square().sum().backward()
    ranks = run_ranks(_rank_masked, 2, ((2, 3),), TIMEOUT_S)
    assert [count for count, *_ in ranks] == [1, 1]
    y, dx = (torch.cat([rank[i] for rank in ranks]).transpose(1, 2) for i in (1, 2))
    assert_close(y[mask], F.batch_norm(valid, None, None, training=True).detach(), torch.float32)
    assert_close(dx[mask], valid.grad, torch.float32)
    assert not y[~mask].any()
    assert not dx[~mask].any()


def _rank_without_syncing() -> list[Tensor]:
    layer = syncnorm.SyncBatchNorm2d(3)
    model = compiled(layer)
    model(torch.randn(4, 3, 5, 5))
    before = layer.running_mean.clone()
    if dist.get_rank() == 0:
        with syncnorm.no_sync_stats():
            model(torch.randn(4, 3, 5, 5))
    unchanged = bool(layer.running_mean.equal(before))
    model(torch.randn(4, 3, 5, 5))
    return [unchanged, not layer.running_mean.equal(before)]


def test_compiled_code_respects_no_sync_stats():
    assert run_ranks(_rank_without_syncing, 2, (), TIMEOUT_S) == [[True, True]] * 2


def _rank_checkpointed(reentrant: bool, compiling: bool) -> tuple[list[str], dict[str, Tensor]]:
    """Two forwards through a checkpointed layer, compiled or not, then both backwards."""
    torch._dynamo.reset()
    rank = dist.get_rank()
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm1d(3))).double()
    call = compiled(layer) if compiling else layer
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(7 * i + rank)).double() for i in range(2)]
    inputs = [x.requires_grad_() for x in inputs]
    with recorded_exchanges() as kinds:
        outputs = [checkpoint(call, x, use_reentrant=reentrant) for x in inputs]
        for i, y in enumerate(outputs):
            y.backward(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).double())
    return kinds, {"dx0": inputs[0].grad, "dx1": inputs[1].grad, **layer.state_dict(), "dw": layer[0].weight.grad}


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_compiled_code(reentrant):
    for eager, ours in zip(
        run_ranks(_rank_checkpointed, args=(reentrant, False), timeout=100),
        run_ranks(_rank_checkpointed, args=(reentrant, True), timeout=100),
        strict=True,
    ):
        assert ours[0].count("FORWARD") == ours[0].count("BACKWARD") == 2
        for name, value in eager[1].items():
            torch.testing.assert_close(ours[1][name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("valid", [None, torch.tensor(6)])
def test_the_fake_kernels_match_the_operators(dtype, valid):
    """A wrong dtype here raises no error at run time; memory would be misread."""
    from syncnorm.layer import compiled

    mean, invstd = torch.randn(4, dtype=dtype), torch.rand(4, dtype=dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        compiled.gather_moments, (mean, invstd, 6, valid, 1e-5, compiled.NO_GROUP, "a"), test_utils=checks
    )
    number = torch.tensor(1)
    torch.library.opcheck(compiled.reduce_sums, (mean, invstd, number, compiled.NO_GROUP, "a"), test_utils=checks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of inductor's imports
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (4096, 3)], ids=str)
def test_moments_in_one_read_for_means_far_from_zero(shape, compiling):
    """As ``corrected_moments``: the mean is right to its last place in fp32, and invstd hardly depends on it."""
    from syncnorm.layer import compiled as layer_compiled

    dims = [d for d in range(len(shape)) if d != 1]
    torch._dynamo.reset()
    found = layer_compiled.moments_in_one_read
    found = torch.compile(found, fullgraph=True, dynamic=False) if compiling else found
    for offset in (0.0, 1e2, 1e3, 1e4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
        mean, invstd = found(x, 1e-5)
        var, want = torch.var_mean(x.double(), dims, correction=0)
        torch.testing.assert_close(mean.double(), want, rtol=1.2e-7, atol=3e-6)
        torch.testing.assert_close(invstd.double(), (var + 1e-5).rsqrt(), rtol=2e-6, atol=0)


def test_a_backward_has_the_tag_of_its_number_also_if_only_the_device_knows_the_number():
    """So ranks with compiled and with eager layers agree on a GPU, too."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        device = torch.device("cpu")
        given = comm.Kind.BACKWARD, "a", 4, torch.float32, 0.0, dist.group.WORLD, device
        for number in (1, 77, 2**22):
            known, unknown = comm.native_call(*given, number), comm.native_call(*given)
            assert float(unknown.tag_of(torch.tensor(number))) == known.tag
            vectors = [torch.ones(4), torch.zeros(4)]
            with comm.reduce_sums(vectors, dist.group.WORLD, "a", torch.tensor(number)) as finish:
                assert torch.equal(
                    torch.stack(finish()), torch.stack(vectors)
                )  # the fake group returns what was sent
    finally:
        dist.destroy_process_group()
