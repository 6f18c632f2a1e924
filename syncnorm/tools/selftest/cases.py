"""The cases of the self-test: each runs the layer on all ranks, and holds it against fp64 on the whole batch.

Every rank draws the batch of all ranks from one seed, takes its rows, and computes the reference itself, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import syncnorm
from syncnorm.errors import SyncNormError
from syncnorm.tools.selftest import cuda, models
from syncnorm.tools.selftest.batch import Batch
from syncnorm.tools.selftest.case_context import Trial

Unless = Callable[[Trial], str | None]


@dataclass(frozen=True)
class Case:
    """One row of the self-test.

    Attributes:
        name: in a few words.
        run: writes into the trial what it measures; an exception fails the case.
        unless: says why this rank cannot run it; if one cannot, none does. Communicates nothing.
    """

    name: str
    run: Callable[[Trial], None]
    unless: Unless = lambda trial: None


def alone(trial: Trial) -> str | None:
    """Whether there is nobody to sync with."""
    return "a world of one rank" if trial.world_size == 1 else None


def _without(dtype: torch.dtype) -> Unless:
    def reason(trial: Trial) -> str | None:
        try:
            F.batch_norm(torch.ones(2, 1, dtype=dtype, device=trial.device), None, None, training=True)
        except RuntimeError as error:
            return f"{trial.device.type} has no {dtype}: {str(error).splitlines()[0]}"
        return None

    return reason


def _no_compiler(trial: Trial) -> str | None:
    try:
        # Whatever is missing, a compiler, its headers or Triton, is missing for this as well.
        torch.compile(torch.sin)(torch.ones(3, device=trial.device))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def _step(trial: Trial, batch: Batch, layout: torch.memory_format = torch.contiguous_format) -> None:
    """A forward and a backward of a layer, everything that comes out of it compared."""
    layer = batch.layer(trial)
    x = batch.x(trial).contiguous(memory_format=layout).requires_grad_()
    y = layer(x, batch.mask(trial)) if batch.masked else layer(x)
    y.backward(batch.dy(trial).contiguous(memory_format=layout))
    batch.compare(trial, y, x.grad, layer)
    trial.exact("memory format of the output", y.is_contiguous(memory_format=layout))


def _dtype(dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    return Case(
        f"forward and backward, {name}", lambda trial: _step(trial, Batch.even(trial, dtype=dtype)), _without(dtype)
    )


def _channels_last(trial: Trial) -> None:
    _step(trial, Batch.even(trial), torch.channels_last)


def _uneven(trial: Trial) -> None:
    _step(trial, Batch(tuple(1 + 3 * rank for rank in reversed(range(trial.world_size)))))


def _empty_rank(trial: Trial) -> None:
    _step(trial, Batch((*(3,) * (trial.world_size - 1), 0)))


def _large_mean(trial: Trial) -> None:
    # E[x^2] - E[x]^2 in fp32 would be 1e-4 off. With a much larger mean its own rounding is more than is allowed.
    _step(trial, Batch.even(trial, spatial=(2, 3), mean=30.0, std=1.0))


def _mask(trial: Trial) -> None:
    _step(trial, Batch.even(trial, masked=True))


def _large_counts(trial: Trial) -> None:
    # More values a channel than fp16 can count, on each rank.
    _step(trial, Batch.even(trial, dtype=torch.float16, rows=2, channels=2, spatial=(192, 192)))


def _disagreement(trial: Trial) -> None:
    # On CPU tensors whatever the device is: on a GPU the check is the device's, and ends the process's use of it.
    from torch import distributed as dist

    group = dist.new_group(backend="gloo", timeout=models.PATIENCE)
    channels = 4 + (trial.rank == trial.world_size - 1)
    try:
        syncnorm.SyncBatchNorm(channels, process_group=group)(torch.randn(3, channels))
    except SyncNormError as error:
        trial.exact("an error that names the layers", "called different layers" in str(error))
    else:
        trial.exact("an error at all", False)
    finally:
        dist.destroy_process_group(group)


def _round_trip(trial: Trial) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(trial.device)
    classes = [type(module) for module in model.modules()]
    parameters, state = list(model.parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 2, 6, 6, device=trial.device)
    want = model.eval()(x)
    converted = syncnorm.convert(model, process_group=trial.group)
    synced = [m for m in converted.modules() if isinstance(m, syncnorm.SyncBatchNorm | nn.BatchNorm2d)]
    trial.exact("the class of the converted layer", type(synced[0]) is not nn.BatchNorm2d)
    trial.exact("the converted model in evaluation", torch.equal(converted(x), want))
    reverted = syncnorm.revert(converted)
    trial.exact("the classes after revert", [type(module) for module in reverted.modules()] == classes)
    same = all(a is b for a, b in zip(reverted.parameters(), parameters, strict=True))
    trial.exact("the parameters after revert", same)
    trial.exact("the state after revert", all(torch.equal(v, state[k]) for k, v in reverted.state_dict().items()))


CASES = (
    _dtype(torch.float32),
    _dtype(torch.float64),
    _dtype(torch.bfloat16),
    _dtype(torch.float16),
    Case("channels_last", _channels_last),
    Case("uneven ranks", _uneven, alone),
    Case("an empty rank", _empty_rank, alone),
    Case("mean >> std", _large_mean),
    Case("a mask", _mask),
    Case("more than 65,504 values, fp16", _large_counts, _without(torch.float16)),
    Case("steps of DDP = one process", models.training_steps),
    Case("activation checkpointing", models.checkpointing),
    Case("gradient penalty", models.gradient_penalty),
    Case("eval communicates nothing", models.evaluation_is_silent),
    Case("convert and revert", _round_trip),
    Case("ranks that disagree all raise", _disagreement, alone),
    Case("torch.compile, fullgraph", models.compiled, _no_compiler),
    Case("no host sync", cuda.no_host_sync, cuda.not_on_nccl),
    Case("CUDA graph", cuda.graph, cuda.not_on_nccl),
)
