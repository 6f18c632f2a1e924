"""Data parallelism around the model of an arm, and local BN whose statistics are recalibrated for a test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm._torch_versions import ddp_without_buffers
from syncnorm.errors import InputError
from syncnorm.tools.common.data_parallel import data_parallel
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.compare.arms import Arm
from syncnorm.tools.compare.parity import WithoutDropout
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.steps import WholeStep, has_forward
from syncnorm.training import recalibrate

# Per rank and test; Wu and Johnson (2021) find that 1,000 to 10,000 samples are enough.
RECALIBRATION_BATCHES = 50


def wrap(arm: Arm, model: nn.Module, problem: Problem, ranks: Ranks) -> nn.Module:
    """``model`` as the training step of ``arm`` calls it.

    Raises:
        InputError: the arm does not fit the step.

    Collective: all ranks if the arm uses DDP.
    """
    if arm.recalibrated and problem.trains_by_itself:
        raise InputError(
            f"recalibration needs a step that returns its loss, and {problem.step_name} trains by itself"
        )
    if arm.micro_batches > 1 and problem.trains_by_itself:
        raise InputError(f"micro-batches need a step that returns its loss, and {problem.step_name} trains by itself")
    if arm.parallelism == "single":
        return model
    if arm.parallelism == "dp":
        if problem.step is not None:
            raise InputError(
                f"DataParallel splits the tensor that a model is called with, and the step {problem.step_name} calls "
                f"the model in its own way"
            )
        return data_parallel(model, ranks.world_size, ranks.device)
    if problem.trains_by_itself:
        return _wrap_networks(model, ranks.device)
    module = model if problem.step is None else WholeStep(model, problem.loss_of)
    return _ddp(module, ranks.device, find_unused_parameters=problem.unused_parameters)


def _wrap_networks(model: nn.Module, device: torch.device) -> nn.Module:
    """The model for a step that trains by itself: each of its networks in a DDP of its own.

    The generator's step runs the discriminator without updating it, and the other way round, so parameters may stay
    without a gradient. The running statistics are not broadcast: a network may run several times before a backward,
    and each rank normalizes by its batches alone in training anyway. Rank 0's are tested.
    """

    def wrapped(network: nn.Module) -> nn.Module:
        if not any(p.requires_grad for p in network.parameters()):
            return network
        return _ddp(network, device, find_unused_parameters=True, **ddp_without_buffers())

    if has_forward(model):
        return wrapped(model)
    outer = copy.copy(model)
    outer._modules = {name: wrapped(child) for name, child in model._modules.items() if child is not None}
    return outer


def _ddp(module: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """DDP around ``module``, which is on ``device``. Collective: all ranks."""
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **options)


@contextmanager
def recalibrated(
    model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> Iterator[None]:
    """Running statistics of ``batches``, of all ranks, while the block runs; afterwards those of the training.

    Collective: all ranks, as `recalibrate`.
    """
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        with WithoutDropout():
            recalibrate(WholeStep(model, loss_of), ({"batch": batch} for batch in batches))
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])
