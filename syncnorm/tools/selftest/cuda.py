"""Cases of the self-test that only GPUs with NCCL have: gloo takes tensors through the host."""

from __future__ import annotations

import os

import torch

from syncnorm.tools.selftest.batch import Batch
from syncnorm.tools.selftest.case_context import Trial


def not_on_nccl(trial: Trial) -> str | None:
    """Why the host has to wait here anyway."""
    if trial.device.type != "cuda" or (trial.backend != "nccl" and trial.world_size > 1):
        return f"needs CUDA and NCCL, has {trial.device.type} and {trial.backend}"
    if os.environ.get("SYNCNORM_DEBUG", "") not in ("", "0"):
        return "SYNCNORM_DEBUG compares names, for which the host waits"
    return None


def no_host_sync(trial: Trial) -> None:
    """A forward and a backward in which torch raises where the host would wait for the GPU."""
    batch = Batch.even(trial)
    layer, x, dy = batch.layer(trial), batch.x(trial).requires_grad_(), batch.dy(trial)
    layer(x).backward(dy)  # the first makes NCCL's connections, and compares names
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trial.exact("no host sync", True)


def graph(trial: Trial) -> None:
    """A forward and a backward captured once, replayed on other values."""
    batch = Batch.even(trial)
    layer, values, dy = batch.layer(trial), batch.x(trial), batch.dy(trial)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.zeros_like(values).requires_grad_()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(layer(x), x, dy)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        x.copy_(values)
    layer.load_state_dict(state)
    captured.replay()
    torch.cuda.synchronize()
    batch.compare(trial, y, dx, layer, weights=False)
