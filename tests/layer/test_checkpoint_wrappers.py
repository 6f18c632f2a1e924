"""Checkpoint wrappers that change the layer between the two runs of a segment: the batch is counted exactly once."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

ROWS, STEPS = (3, 2, 0), 2


class Act(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x))


def untracked_without_grad(layer: Any, first: bool) -> None:
    """As in fairscale: the first run of a reentrant checkpoint, which has no autograd graph, does not track."""
    layer.track_running_stats = not first


def zero_momentum_first(layer: Any, first: bool) -> None:
    layer.momentum = 0.0 if first else 0.1


def zero_momentum_last(layer: Any, first: bool) -> None:
    layer.momentum = 0.1 if first else 0.0


def untracked_last(layer: Any, first: bool) -> None:
    layer.track_running_stats = first


def no_counter_first(layer: Any, first: bool) -> None:
    counter = layer.__dict__.setdefault("kept_counter", layer.num_batches_tracked)
    layer._buffers["num_batches_tracked"] = None if first else counter


def other_buffers_first(layer: Any, first: bool) -> None:
    """The first run updates copies of the running statistics; those of the layer stay unchanged."""
    kept = layer.__dict__.setdefault("kept_buffers", dict(layer._buffers))
    layer._buffers.update(
        {name: b.clone() if first else b for name, b in kept.items() if name != "num_batches_tracked"}
    )


WRAPPERS = [
    untracked_without_grad, zero_momentum_first, zero_momentum_last, untracked_last, other_buffers_first,
    no_counter_first,
]  # fmt: skip


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, dy = (torch.randn(sum(ROWS), 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x + step, dy


def _rank_steps(
    rows: tuple[int, ...], build: type[nn.Module], change: Callable[..., None], reentrant: bool
) -> list[Any]:
    """Trains a checkpointed layer that ``change`` alters between the two runs of each step."""
    rank = dist.get_rank() if len(rows) > 1 else 0
    layer = syncnorm.convert(build(4))
    runs = 0

    def run(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        change(layer, first=runs % 2 == 1)
        return layer(x)

    gradients = []
    for step in range(STEPS):
        x, dy = (part.split(rows)[rank].float() for part in data(step))
        x.requires_grad_()
        checkpoint(run, x, use_reentrant=reentrant).backward(dy)
        gradients.append(x.grad)
    assert runs == 2 * STEPS
    change(layer, first=change in (untracked_last, zero_momentum_last))
    return [*gradients, layer.running_mean, layer.running_var, layer.num_batches_tracked]


def check(rows: tuple[int, ...], results: list[list[Any]], own_forward: bool) -> None:
    running = torch.zeros(4), torch.ones(4)
    for step in range(STEPS):
        x, dy = data(step)
        if own_forward:
            whole = x.clone().requires_grad_()
            F.leaky_relu(F.batch_norm(whole, None, None, training=True)).backward(dy)
            expected = whole.grad
        else:
            expected = torch.cat(batch_norm_oracle([x], [dy]).grad_inputs)
        for rank, part in enumerate(expected.split(rows)):
            assert_close(results[rank][step], part, torch.float32)
        want = batch_norm_oracle([x], [dy], running_mean=running[0], running_var=running[1])
        running = want.running_mean, want.running_var
    for result in results:
        assert_close(result[STEPS], running[0], torch.float32)
        assert_close(result[STEPS + 1], running[1], torch.float32)
        assert result[STEPS + 2] == STEPS


@pytest.mark.parametrize(
    ("build", "change"),
    # A layer with its own forward may count in its own way, so its counter is not changed.
    [(nn.BatchNorm2d, change) for change in WRAPPERS] + [(Act, change) for change in WRAPPERS[:-1]],
)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [(5,), ROWS])
def test_the_second_run_does_what_the_first_did_not(rows, reentrant, change, build):
    results = run_ranks(_rank_steps, len(rows), (rows, build, change, reentrant), timeout=30)
    check(rows, results, build is Act)


def _rank_repeated(same_input: bool, reentrant: bool) -> list[Any]:
    """Two live segments, each of which runs one layer twice, untracked in the first run; rank 2 has no values."""
    rank = dist.get_rank()
    layer = syncnorm.convert(nn.Sequential(nn.BatchNorm2d(4))).double()

    def run(x: Tensor) -> Tensor:
        layer[0].track_running_stats = torch._C._current_graph_task_id() != -1
        y = layer(x)
        return y + layer(x if same_input else 2 * y.square())

    inputs = [data(i)[0].split(ROWS)[rank].requires_grad_() for i in range(2)]
    outputs = [checkpoint(run, x, use_reentrant=reentrant) for x in inputs]
    for i in (1, 0):
        outputs[i].backward(data(i)[1].split(ROWS)[rank])
    return [*(x.grad for x in inputs), layer[0].running_mean, layer[0].running_var, layer[0].num_batches_tracked]


@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_a_segment_runs_twice(same_input, reentrant):
    layer = nn.BatchNorm2d(4).double()
    gradients: dict[int, Tensor] = {}
    for i in (1, 0):  # running statistics are updated in the order of the second runs
        x = data(i)[0].requires_grad_()
        y = layer(x)
        y = y + layer(x if same_input else 2 * y.square())
        y.backward(data(i)[1])
        gradients[i] = x.grad
    for rank, (*dx, mean, var, count) in enumerate(run_ranks(_rank_repeated, 3, (same_input, reentrant), timeout=30)):
        for i in range(2):
            assert_close(dx[i], gradients[i].split(ROWS)[rank], torch.float64)
        assert_close(mean, layer.running_mean, torch.float64)
        assert_close(var, layer.running_var, torch.float64)
        assert count == 4


def _rank_two_statistics(reentrant: bool) -> list[Tensor]:
    """One input, two sets of running statistics, as in domain-specific or split batch norm."""
    rank = dist.get_rank()
    sets = [(torch.zeros(4).double(), torch.ones(4).double()) for _ in range(2)]

    def run(x: Tensor) -> Tensor:
        first, second = (
            syncnorm.functional.sync_batch_norm(x, *running, training=True, momentum=momentum)
            for running, momentum in zip(sets, (0.1, 0.3), strict=True)
        )
        return first + 2 * second

    x, dy = (part.split(ROWS)[rank] for part in data(0))
    checkpoint(run, x.requires_grad_(), use_reentrant=reentrant).backward(dy)
    return [x.grad, sets[0][0], sets[1][0]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_sets_of_statistics_for_one_input(reentrant):
    x, dy = data(0)
    want = batch_norm_oracle([x], [3 * dy])
    for rank, (dx, first, second) in enumerate(run_ranks(_rank_two_statistics, len(ROWS), (reentrant,), timeout=30)):
        assert_close(dx, want.grad_inputs[0].split(ROWS)[rank], torch.float64)
        assert_close(first, 0.1 * x.mean((0, 2, 3)), torch.float64)
        assert_close(second, 0.3 * x.mean((0, 2, 3)), torch.float64)


class Rectified(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def _rank_first_run_in_a_backward(build: type[nn.BatchNorm1d]) -> list[Any]:
    """A layer whose first run is in a backward, as in implicit layers, updates its running statistics."""
    layer = syncnorm.convert(build(3))

    class Runs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            with torch.no_grad():
                layer(ctx.saved_tensors[0])
            return dy

    x = torch.arange(12.0).view(4, 3).requires_grad_()
    Runs.apply(x).backward(torch.randn(4, 3))
    return [layer.running_mean, layer.num_batches_tracked]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("build", [nn.BatchNorm1d, Rectified])
def test_a_first_run_in_a_backward_counts(world_size, build):
    for mean, count in run_ranks(_rank_first_run_in_a_backward, world_size, (build,)):
        assert count == 1
        assert_close(mean, torch.tensor([0.45, 0.55, 0.65]), torch.float32)


def _rank_kept_alive(needs_grad: bool, frozen: bool) -> list[int]:
    """The number of records still alive after each step, under saved-tensor hooks that outlive it."""
    from syncnorm.layer import checkpointing

    layer = syncnorm.SyncBatchNorm(50)
    other = syncnorm.SyncBatchNorm(50)
    if frozen:
        layer.requires_grad_(False)
    alive: list[int] = []
    records: list[weakref.ref[Any]] = []
    keep = checkpointing.remember

    def noted(record: Any, *rest: Any) -> None:
        records.append(weakref.ref(record))
        keep(record, *rest)

    checkpointing.remember = noted
    try:
        for _ in range(6):
            with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
                y = other(layer(torch.randn(4, 50, requires_grad=needs_grad)))
            y.backward(torch.randn(4, 50))
            del y
            gc.collect()
            alive.append(sum(record() is not None for record in records))
    finally:
        checkpointing.remember = keep
    return alive


def _pack(x: Tensor) -> Tensor:
    return x


def _unpack(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(("needs_grad", "frozen"), [(True, False), (False, False), (False, True)])
def test_hooks_that_outlive_a_step_do_not_keep_its_records(needs_grad, frozen):
    for alive in run_ranks(_rank_kept_alive, args=(needs_grad, frozen)):
        assert alive[0] <= 2  # layers
        assert alive[1:] == [0] * 5


def _rank_graphs_outlive_their_hooks() -> list[Tensor]:
    """Hooks that recompute and are shared by several graphs: records of a graph that is still alive are kept."""
    layer = syncnorm.SyncBatchNorm(3).double()
    rank = dist.get_rank()
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + i)).double() for i in range(3)]
    handles: list[Tensor] = []

    def pack(x: Tensor) -> int:
        handles.append(x)
        return len(handles) - 1

    def unpack(handle: int) -> Tensor:
        x = handles[handle]
        if x.shape == (4, 3):
            with torch.no_grad():
                layer(x)
        return x

    outputs = []
    for x in inputs[:2]:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            outputs.append(layer(x.requires_grad_()))
    outputs[1].backward(torch.ones(4, 3, dtype=torch.float64))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs.append(layer(inputs[2].requires_grad_()))
    outputs[0].backward(torch.ones(4, 3, dtype=torch.float64))
    return [layer.num_batches_tracked, layer.running_mean]


def test_records_of_a_live_graph_are_kept_although_its_hooks_are_shared():
    results = run_ranks(_rank_graphs_outlive_their_hooks)
    want = torch.zeros(3).double()
    for i in range(3):
        parts = [
            torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + i)).double() for rank in (0, 1)
        ]
        want = 0.9 * want + 0.1 * torch.cat(parts).mean(0)
    for count, mean in results:
        assert count == 3
        assert_close(mean, want, torch.float64)
