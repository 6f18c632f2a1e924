"""The cases of the self-test: each runs the layer on all ranks and compares it with fp64 on the whole batch.

Every rank draws the batch of all ranks from the same seed, takes its own rows, and computes the reference on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm._torch_versions import ONE_GRAPH
from syncnorm.comm.call import Call, observing
from syncnorm.errors import SyncNormError
from syncnorm.tools.selftest.case_context import Batch, CaseContext

# How long the ranks of a case wait for one another. Compiling takes long, and not the same time on all ranks.
CASE_TIMEOUT = timedelta(seconds=60)
_DDP_STEPS = 4
_DDP_LR = 0.1

Unless = Callable[[CaseContext], str | None]


@dataclass(frozen=True)
class Case:
    """One row of the self-test.

    Attributes:
        name: as printed.
        run: records its checks in the context; the case also fails if it raises.
        unless: why this rank cannot run the case, or None; if one cannot, no rank runs it. Does not communicate.
    """

    name: str
    run: Callable[[CaseContext], None]
    unless: Unless = lambda context: None


def single_rank(context: CaseContext) -> str | None:
    """For cases that need more than one rank."""
    return "a world of one rank" if context.world_size == 1 else None


def _unsupported(dtype: torch.dtype) -> Unless:
    """For cases that need ``dtype``: not every device has batch norm in half precision."""

    def reason(context: CaseContext) -> str | None:
        try:
            F.batch_norm(torch.ones(2, 1, dtype=dtype, device=context.device), None, None, training=True)
        except RuntimeError as error:
            return f"{context.device.type} has no {dtype}: {str(error).splitlines()[0]}"
        return None

    return reason


def _no_compiler(context: CaseContext) -> str | None:
    if not ONE_GRAPH:
        return "a synced layer breaks the graph before torch 2.13"
    try:
        # Whatever is missing, a compiler, its headers or Triton, is missing for this function as well.
        torch.compile(torch.sin)(torch.ones(3, device=context.device))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def _no_nccl(context: CaseContext) -> str | None:
    """For cases in which the host must not wait for the GPU: gloo copies tensors to the host."""
    if context.device.type != "cuda" or (context.backend != "nccl" and context.world_size > 1):
        return f"needs CUDA and NCCL, has {context.device.type} and {context.backend}"
    if os.environ.get("SYNCNORM_DEBUG", "") not in ("", "0"):
        return "SYNCNORM_DEBUG compares names, for which the host waits"
    return None


# One step of one layer


def step(context: CaseContext, batch: Batch, layout: torch.memory_format = torch.contiguous_format) -> None:
    """A forward and a backward of a layer; checks everything that they compute."""
    layer = batch.layer(context)
    x = batch.x(context).contiguous(memory_format=layout).requires_grad_()
    y = layer(x, batch.mask(context)) if batch.masked else layer(x)
    y.backward(batch.dy(context).contiguous(memory_format=layout))
    batch.check(context, y, x.grad, layer)
    context.check("memory format of the output", y.is_contiguous(memory_format=layout))


def _dtype(dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    return Case(
        f"forward and backward, {name}",
        lambda context: step(context, Batch.even(context, dtype=dtype)),
        _unsupported(dtype),
    )


def _channels_last(context: CaseContext) -> None:
    step(context, Batch.even(context), torch.channels_last)


def _uneven(context: CaseContext) -> None:
    step(context, Batch(tuple(1 + 3 * rank for rank in reversed(range(context.world_size)))))


def _empty_rank(context: CaseContext) -> None:
    step(context, Batch((*(3,) * (context.world_size - 1), 0)))


def _large_mean(context: CaseContext) -> None:
    # E[x^2] - E[x]^2 in fp32 would be 1e-4 off. A much larger mean would exceed the tolerance by its rounding alone.
    step(context, Batch.even(context, spatial=(2, 3), mean=30.0, std=1.0))


def _mask(context: CaseContext) -> None:
    step(context, Batch.even(context, masked=True))


def _large_counts(context: CaseContext) -> None:
    # On each rank, more values per channel than the largest fp16 number.
    step(context, Batch.even(context, dtype=torch.float16, rows=2, channels=2, spatial=(192, 192)))


# More than one step of one layer


def _ddp_steps(context: CaseContext) -> None:
    """SGD in DDP on uneven parts of each batch, and in one process, in fp64, on the whole batch."""
    rows = [3 + rank for rank in range(context.world_size)]
    single = _ddp_model().double()
    plain = syncnorm.convert(_ddp_model(), process_group=context.group).to(context.device)
    device_ids = [context.device] if context.device.type == "cuda" else None
    model = DistributedDataParallel(plain, device_ids=device_ids, process_group=context.group)
    for index in range(_DDP_STEPS):
        x, dy = (torch.randn(sum(rows), width, generator=torch.Generator().manual_seed(index)) for width in (6, 3))
        mine, dy_mine = (torch.split(whole, rows)[context.rank].to(context.device) for whole in (x, dy))
        # DDP averages gradients over the ranks; multiplied by the world size, the average is the sum.
        ours, reference = (model, mine, dy_mine * context.world_size), (single, x.double(), dy.double())
        for module, batch, cotangent in (ours, reference):
            optimizer = torch.optim.SGD(module.parameters(), _DDP_LR / sum(rows))
            optimizer.zero_grad()
            torch.autograd.backward(module(batch), cotangent)
            optimizer.step()
    want = single.state_dict()
    for name, value in plain.state_dict().items():
        # The rounding errors of each step enter the next.
        context.check_close(f"{name} after {_DDP_STEPS} steps", value, want[name], torch.float32, scale=_DDP_STEPS)
        context.check_same_on_all_ranks(name, value)


def _ddp_model() -> nn.Module:
    torch.manual_seed(0)
    # No convolution, which a GPU may compute in TF32, and no ReLU, whose gradient jumps if rounding changes a sign.
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def _checkpointing(context: CaseContext) -> None:
    """A layer whose forward is recomputed in the backward, by both of torch's implementations."""
    for reentrant in (False, True):
        batch = Batch.even(context)
        layer = batch.layer(context)
        x = batch.x(context).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(batch.dy(context))
        batch.check(context, y, x.grad, layer)


def _gradient_penalty(context: CaseContext) -> None:
    """The gradient of the squared norm of a gradient, with respect to the input and the weight."""
    batch = Batch.even(context)
    layer = batch.layer(context)
    x = batch.x(context).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, batch.dy(context), create_graph=True)
    dx.square().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    whole_x, whole_dy, _ = (drawn.double() for drawn in batch.drawn)
    parameter = layer.get_parameter("weight")
    weight = parameter.detach().cpu().double().requires_grad_()
    whole_x.requires_grad_()
    y = F.batch_norm(whole_x, None, None, weight, training=True)
    (whole_dx,) = torch.autograd.grad(y, whole_x, whole_dy, create_graph=True)
    want_x, want_weight = torch.autograd.grad(whole_dx.square().sum(), (whole_x, weight))
    what = "gradient of the penalty at the"
    context.check_close(f"{what} input", x.grad, batch.split(want_x)[context.rank], batch.dtype)
    # Each rank has its own part of the weight's gradient, which DDP would add up. Their sum is compared.
    total = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.cpu().double()
    dist.all_reduce(total, group=context.control)
    context.check_close(f"{what} weight", total, want_weight, batch.dtype, scale=10)


class _CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the collectives that pass torch's dispatcher, and the exchanges of frames, which need not."""

    calls = 0

    def count(self, call: Call, seconds: float) -> None:
        """Counts an exchange."""
        self.calls += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def _silent_evaluation(context: CaseContext) -> None:
    """A forward and a backward issue no collective in evaluation mode, and do so in training mode."""
    batch = Batch.even(context)
    layer = batch.layer(context)
    calls = {}
    for training in (True, False):
        with _CountCollectives() as counter, observing(counter.count):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            layer.train(training)(batch.x(context).requires_grad_()).backward(batch.dy(context))
        calls[training] = counter.calls
    context.check(f"no collective in evaluation ({calls[False]} seen)", calls[False] == 0)
    context.check("collectives in training", (calls[True] > 0) == (context.world_size > 1))


def _round_trip(context: CaseContext) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(context.device)
    classes = [type(module) for module in model.modules()]
    parameters, state = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 2, 6, 6, device=context.device)
    want = model.eval()(x)
    converted = syncnorm.convert(model, process_group=context.group)
    synced = [m for m in converted.modules() if isinstance(m, syncnorm.SyncBatchNorm | nn.BatchNorm2d)]
    context.check("the class of the converted layer", type(synced[0]) is not nn.BatchNorm2d)
    context.check("the converted model in evaluation", torch.equal(converted(x), want))
    reverted = syncnorm.revert(converted)
    context.check("the classes after revert", [type(module) for module in reverted.modules()] == classes)
    same = all(a is b for a, b in zip(reverted.parameters(), parameters, strict=True))
    context.check("the parameters after revert", same)
    context.check("the state after revert", all(torch.equal(v, state[k]) for k, v in reverted.state_dict().items()))


def _disagreement(context: CaseContext) -> None:
    # With CPU tensors on every device: on a GPU the device itself checks, and a failed check ends the CUDA context.
    group = dist.new_group(backend="gloo", timeout=CASE_TIMEOUT)
    channels = 4 + (context.rank == context.world_size - 1)
    try:
        syncnorm.SyncBatchNorm(channels, process_group=group)(torch.randn(3, channels))
    except SyncNormError as error:
        context.check("an error that names the layers", "called different layers" in str(error))
    else:
        context.check("an error at all", False)
    finally:
        dist.destroy_process_group(group)


def _compiled(context: CaseContext) -> None:
    """The layer and the operations after it as one graph."""
    batch = Batch.even(context)
    layer = batch.layer(context)
    x = batch.x(context).requires_grad_()
    torch.compiler.reset()
    try:
        y = torch.compile(partial(_layer_and_more, layer), fullgraph=True)(x)
        torch.autograd.backward(y * 0.5, batch.dy(context))
    finally:
        torch.compiler.reset()
    batch.check(context, y * 0.5, x.grad, layer)


def _layer_and_more(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x) * 2
    return y


def _no_host_sync(context: CaseContext) -> None:
    """A forward and a backward in which torch raises if the host waits for the GPU."""
    batch = Batch.even(context)
    layer, x, dy = batch.layer(context), batch.x(context).requires_grad_(), batch.dy(context)
    layer(x).backward(dy)  # the first call connects the ranks and compares names
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    context.check("no host sync", True)


def _cuda_graph(context: CaseContext) -> None:
    """A forward and a backward captured once and replayed with other values."""
    batch = Batch.even(context)
    layer, values, dy = batch.layer(context), batch.x(context), batch.dy(context)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.zeros_like(values).requires_grad_()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(layer(x), x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        x.copy_(values)
    layer.load_state_dict(state)
    graph.replay()
    torch.cuda.synchronize()
    batch.check(context, y, dx, layer, parameters=False)


CASES = (
    _dtype(torch.float32),
    _dtype(torch.float64),
    _dtype(torch.bfloat16),
    _dtype(torch.float16),
    Case("channels_last", _channels_last),
    Case("uneven ranks", _uneven, single_rank),
    Case("an empty rank", _empty_rank, single_rank),
    Case("mean >> std", _large_mean),
    Case("a mask", _mask),
    Case("more than 65,504 values, fp16", _large_counts, _unsupported(torch.float16)),
    Case("steps of DDP = one process", _ddp_steps),
    Case("activation checkpointing", _checkpointing),
    Case("gradient penalty", _gradient_penalty),
    Case("eval communicates nothing", _silent_evaluation),
    Case("convert and revert", _round_trip),
    Case("ranks that disagree all raise", _disagreement, single_rank),
    Case("torch.compile, fullgraph", _compiled, _no_compiler),
    Case("no host sync", _no_host_sync, _no_nccl),
    Case("CUDA graph", _cuda_graph, _no_nccl),
)
