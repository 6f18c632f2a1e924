"""How many kernels a step on a GPU launches: ceilings, without a GPU.

The step runs on CPU tensors in torch's fake process group of eight ranks. Launches of Triton's kernels are counted
where they would be made; a dispatch mode sees every other operator, and counts those that launch a kernel on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules import _functions as torchs
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import syncnorm
from syncnorm.comm import gather
from syncnorm.layer import device_step
from syncnorm.layer.kernels import launch, triton_backward, triton_forward, triton_sums

# Views, and memory that is not written.
LAUNCHES_NOTHING = {
    "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand",
    "is_same_size", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
# The host waits for the GPU.
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero"}


@dataclass
class Counted(TorchDispatchMode):
    """What a block has launched."""

    kernels: list[str] = field(default_factory=list)
    collectives: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            self.collectives.append(name)
        elif name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.waits.append(name)
        elif name not in LAUNCHES_NOTHING:
            self.kernels.append(name)
        return func(*args, **(kwargs or {}))


counting: list[Counted] = []


@contextmanager
def counted() -> Iterator[Counted]:
    """Counts what the block launches."""
    with Counted() as found:
        counting.append(found)
        try:
            yield found
        finally:
            counting.pop()


def note(kernel: str) -> None:
    for found in counting:
        found.kernels.append(kernel)


@pytest.fixture(autouse=True)
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (triton_forward, triton_backward, triton_sums):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *args: note(kernel.fn.__name__))
    monkeypatch.setattr(launch, "passes_available", lambda device: True)
    device_step.works_on.cache_clear()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()
    device_step.works_on.cache_clear()


FORWARD = ["_moments_kernel", "_merge_kernel", "_normalize_kernel"]
BACKWARD = ["_sums_kernel", "_finish_kernel"]


@dataclass
class Case:
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    momentum: float | None = 0.1
    layout: torch.memory_format = torch.contiguous_format
    relu: bool = False
    shortcut: bool = False
    mask: tuple[int, ...] | None = None
    more_forward: int = 0


CASES = {
    "plain": Case(),
    "NHWC": Case(layout=torch.channels_last),
    "ReLU": Case(relu=True),
    "shortcut": Case(shortcut=True),
    "shortcut and ReLU": Case(relu=True, shortcut=True),
    "shortcut and ReLU, NHWC": Case(relu=True, shortcut=True, layout=torch.channels_last),
    "bf16": Case(torch.bfloat16),
    "bf16 parameters": Case(torch.bfloat16, torch.bfloat16),
    "fp16 parameters": Case(torch.float16, torch.float16, relu=True),
    "average": Case(momentum=None),
    "mask": Case(mask=(4, 6, 6)),
    "mask, ReLU, NHWC": Case(mask=(4, 6, 6), relu=True, layout=torch.channels_last),
    "mask that is broadcast": Case(mask=(4, 1, 6), more_forward=1),
}


def tensors(case: Case) -> tuple[Any, Tensor, Tensor | None, Tensor | None, Tensor]:
    """The layer, x, shortcut, mask, dy."""
    layer = syncnorm.SyncBatchNorm2d(8, momentum=case.momentum, dtype=case.parameters)
    x, shortcut, dy = (torch.randn(4, 8, 6, 6).to(case.dtype).contiguous(memory_format=case.layout) for _ in range(3))
    mask = None if case.mask is None else torch.ones(case.mask, dtype=torch.bool)
    return layer, x.requires_grad_(), shortcut.requires_grad_() if case.shortcut else None, mask, dy


@pytest.mark.parametrize("name", CASES)
def test_a_step(name):
    case = CASES[name]
    layer, x, shortcut, mask, dy = tensors(case)
    layer(x, mask, residual=shortcut, relu=case.relu).backward(dy)  # allocates what is kept for all steps
    x.grad = None
    layer.zero_grad()
    with counted() as forward:
        y = layer(x, mask, residual=shortcut, relu=case.relu)
    leaves = [x, layer.weight, layer.bias, *([shortcut] if case.shortcut else [])]
    with counted() as backward:
        gradients = torch.autograd.grad(y, leaves, dy)
    assert [k for k in forward.kernels if k in FORWARD] == FORWARD
    assert len(forward.kernels) == 3 + case.more_forward, forward.kernels
    assert backward.kernels == BACKWARD
    assert forward.collectives == ["_allgather_base_"]
    assert backward.collectives == ["allreduce_"]
    assert forward.waits == backward.waits == []
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)


def test_a_forward_that_sums_instead_of_gathering(monkeypatch):
    monkeypatch.setenv("SYNCNORM_FORWARD", "sum")
    layer, x, _, _, dy = tensors(Case())
    layer(x).backward(dy)
    with counted() as forward:
        layer(x)
    assert forward.kernels == ["_moments_kernel", "_merge_sums_kernel", "_normalize_kernel"]
    assert forward.collectives == ["allreduce_"]
    assert forward.waits == []


@pytest.mark.parametrize("mask", [None, (4, 6, 6)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_only_normalizes(reentrant, mask):
    layer, x, _, mask, dy = tensors(Case(mask=mask))
    checkpoint(layer, x, mask, use_reentrant=reentrant).backward(dy)
    with counted() as forward:
        y = checkpoint(layer, x, mask, use_reentrant=reentrant)
    with counted() as backward:
        torch.autograd.backward(y, dy)
    assert [k for k in forward.kernels if k.endswith("_kernel")] == FORWARD
    assert [k for k in backward.kernels if k.endswith("_kernel")] == ["_normalize_kernel", *BACKWARD]
    assert len(forward.collectives) == len(backward.collectives) == 1
    assert forward.waits == backward.waits == []


def test_an_empty_rank():
    layer, x, _, _, _ = tensors(Case())
    x = x.detach()[:0].requires_grad_()
    layer(x).backward(x)
    with counted() as forward:
        y = layer(x)
    dy = torch.zeros_like(y)
    with counted() as backward:
        torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    # It also checks on the device that the whole batch has more than one value.
    assert forward.kernels == ["_moments_kernel", "sum", "ne", "_assert_async", "_merge_kernel"]
    assert backward.kernels == BACKWARD
    assert len(forward.collectives) == len(backward.collectives) == 1
    assert forward.waits == backward.waits == []


def test_without_triton_the_generic_passes_run(monkeypatch):
    monkeypatch.setattr(launch, "passes_available", lambda device: False)
    layer, x, shortcut, mask, dy = tensors(Case(relu=True, shortcut=True, mask=(4, 6, 6)))
    with counted() as step:
        layer(x, mask, residual=shortcut, relu=True).backward(dy)
    assert not [k for k in step.kernels if k.endswith("_kernel")]
    assert len(step.collectives) == 2


def test_a_triton_that_fails_is_noticed_before_the_first_collective(monkeypatch):
    def fail(kernel: Any, grid: Any, *args: Any) -> None:
        raise launch.TritonFailed("no C compiler")

    monkeypatch.setattr(triton_forward, "launch", fail)
    layer, x, _, _, dy = tensors(Case())
    with counted() as step:
        layer(x).backward(dy)
    assert len(step.collectives) == 2
    assert x.grad is not None


def stand_ins(x: Tensor) -> dict[str, Callable[..., Any]]:
    """torch's CUDA operators, of which each is one launch."""

    def vectors(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(x.size(1)) for _ in range(count))

    return {
        "batch_norm_stats": lambda *args: vectors(2),
        "batch_norm_gather_stats_with_counts": lambda *args: vectors(2),
        "batch_norm_elemt": lambda x, *args: torch.empty_like(x),
        "batch_norm_backward_reduce": lambda *args: vectors(4),
        "batch_norm_backward_elemt": lambda dy, *args: torch.empty_like(dy),
    }


def test_torchs_own_layer_launches_more_kernels(monkeypatch):
    layer, x, _, _, dy = tensors(Case())
    for name, stand_in in stand_ins(x).items():

        def one_launch(*args: Any, name: str = name, stand_in: Any = stand_in) -> Any:
            note(name)
            return stand_in(*args)

        monkeypatch.setattr(torch, name, one_launch)
    # torch gathers into (1, W * n), and the fake group divides dimension 0 among the ranks.
    of_rows = gather.all_gather_single
    monkeypatch.setattr(dist, of_rows.__name__, lambda rows, row, group, **_: of_rows(rows.view(-1), row, group))
    running = torch.zeros(8), torch.ones(8)
    with counted() as forward:
        y = torchs.SyncBatchNorm.apply(x, layer.weight, layer.bias, *running, 1e-5, 0.1, dist.group.WORLD, 8)
    with counted() as backward:
        y.backward(dy)
    assert len(forward.kernels) > 3
    assert len(forward.waits) >= 1
    assert len(backward.kernels) >= 3
