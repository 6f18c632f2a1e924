"""Cases of the self-test that need more than one step of one layer."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.tools.selftest.batch import Batch
from syncnorm.tools.selftest.case_context import Trial

# How long ranks of a case wait for one that does not come. Compiling takes its time, and not the same on all.
PATIENCE = timedelta(seconds=60)
STEPS = 4
LR = 0.1


def _model() -> nn.Module:
    torch.manual_seed(0)
    # No convolution, which a GPU may compute in TF32, and no kink, where rounding decides on which side a value is.
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def training_steps(trial: Trial) -> None:
    """SGD in DDP on uneven parts of each batch, and in one process, in fp64, on the whole."""
    rows = [3 + rank for rank in range(trial.world_size)]
    single = _model().double()
    plain = syncnorm.convert(_model(), process_group=trial.group).to(trial.device)
    device_ids = [trial.device] if trial.device.type == "cuda" else None
    model = DistributedDataParallel(plain, device_ids=device_ids, process_group=trial.group)
    for step in range(STEPS):
        x, dy = (torch.randn(sum(rows), width, generator=torch.Generator().manual_seed(step)) for width in (6, 3))
        mine, dy_mine = (torch.split(whole, rows)[trial.rank].to(trial.device) for whole in (x, dy))
        # DDP averages gradients over the ranks: scaled, the average is the sum.
        ours, reference = (model, mine, dy_mine * trial.world_size), (single, x.double(), dy.double())
        for module, batch, cotangent in (ours, reference):
            optimizer = torch.optim.SGD(module.parameters(), LR / sum(rows))
            optimizer.zero_grad()
            torch.autograd.backward(module(batch), cotangent)
            optimizer.step()
    want = single.state_dict()
    for name, value in plain.state_dict().items():
        # Rounding of one step goes into the next.
        trial.close(f"{name} after {STEPS} steps", value, want[name], torch.float32, scale=STEPS)
        trial.same_on_all_ranks(name, value)


def checkpointing(trial: Trial) -> None:
    """A layer that is computed again in the backward, by both of torch's implementations."""
    for reentrant in (False, True):
        batch = Batch.even(trial)
        layer = batch.layer(trial)
        x = batch.x(trial).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(batch.dy(trial))
        batch.compare(trial, y, x.grad, layer)


def gradient_penalty(trial: Trial) -> None:
    """The gradient of the squared norm of a gradient, with respect to the input and the weight."""
    batch = Batch.even(trial)
    layer = batch.layer(trial)
    x = batch.x(trial).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, batch.dy(trial), create_graph=True)
    dx.square().sum().backward()  # type: ignore[no-untyped-call]
    whole_x, whole_dy, _ = (drawn.double() for drawn in batch.drawn)
    parameter = layer.get_parameter("weight")
    weight = parameter.detach().cpu().double().requires_grad_()
    whole_x.requires_grad_()
    y = F.batch_norm(whole_x, None, None, weight, training=True)
    (whole_dx,) = torch.autograd.grad(y, whole_x, whole_dy, create_graph=True)
    want_x, want_weight = torch.autograd.grad(whole_dx.square().sum(), (whole_x, weight))
    trial.close("gradient of the penalty at the input", x.grad, batch.split(want_x)[trial.rank], batch.dtype)
    # Each rank has its share of the weight's; DDP would add them up. The whole is compared by its sum over the ranks.
    total = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.cpu().double()
    torch.distributed.all_reduce(total, group=trial.control)
    trial.close("gradient of the penalty at the weight", total, want_weight, batch.dtype, scale=10)


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the collectives that pass torch's dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def evaluation_is_silent(trial: Trial) -> None:
    """Forward and backward in evaluation issue no collective; in training the same layer does."""
    batch = Batch.even(trial)
    layer = batch.layer(trial)
    seen = {}
    for training in (True, False):
        with _Collectives() as counter:  # type: ignore[no-untyped-call]
            layer.train(training)(batch.x(trial).requires_grad_()).backward(batch.dy(trial))
        seen[training] = counter.calls
    trial.exact(f"no collective in evaluation ({seen[False]} seen)", seen[False] == 0)
    trial.exact("collectives in training", (seen[True] > 0) == (trial.world_size > 1))


def compiled(trial: Trial) -> None:
    """The layer and what follows it as one graph."""
    batch = Batch.even(trial)
    layer = batch.layer(trial)
    x = batch.x(trial).requires_grad_()
    torch.compiler.reset()
    try:
        y = torch.compile(partial(_layer_and_more, layer), fullgraph=True)(x)
        torch.autograd.backward(y * 0.5, batch.dy(trial))
    finally:
        torch.compiler.reset()
    batch.compare(trial, y * 0.5, x.grad, layer)


def _layer_and_more(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x) * 2
    return y
