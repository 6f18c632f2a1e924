"""Measures the memory and the time of a training step on a batch that is divided into micro-batches.

Each way runs in a process of its own. ``activations`` is the largest memory in a step beyond what is there between
steps: on a GPU by torch's allocator; on a CPU by the resident set of the process, to some MiB; on a simulated device,
which is the CPU, by the tensors that are in use and not in host memory.

    python tests/long/accumulation_memory.py
    python tests/long/accumulation_memory.py --device simulated --width 16 --batch 64 --side 64
    python tests/long/accumulation_memory.py --device cuda --width 64 --batch 128 --side 128
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.tools.common.nets import ResNet18, build_resnet18
from syncnorm.training import whole_batch

sys.path.append(str(Path(__file__).parents[1] / "support"))  # where pytest finds it by itself
from simulated_device import simulated_device

WAYS = {
    "whole batch": "the batch undivided",
    "accumulation": "plain batch norm, each micro-batch by its own statistics",
    "accumulate=K": "syncnorm.convert(model, accumulate=K)",
    "whole_batch": "offload=False: everything stays on the device",
    "whole_batch, offload": "activations in host memory",
    "whole_batch, checkpoint": "offload=False, torch.utils.checkpoint for each residual block",
}


class Checkpointed(nn.Module):
    """Runs a block again in the backward."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # type: ignore[no-any-return]


def build(way: str, options: argparse.Namespace) -> ResNet18:
    model = build_resnet18(options.width)
    if way.endswith("checkpoint"):
        for name, child in list(model.named_modules()):
            if type(child).__name__ == "ResidualBlock":
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, Checkpointed(child))
    if way == "accumulate=K":
        model = syncnorm.convert(model, accumulate=options.micro_batches)
    elif way.startswith("whole_batch"):
        model = syncnorm.convert(model)
    return model


def step(
    way: str, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, options: argparse.Namespace
) -> None:
    y = torch.arange(x.size(0), device=x.device) % 10
    optimizer.zero_grad()
    parts = options.micro_batches if way.startswith("accum") else 1
    for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
        divided: Any = nullcontext()
        if way.startswith("whole_batch"):
            divided = whole_batch(model, options.micro_batches, offload=way.endswith("offload"))
        with divided:
            output = model(x_part)
        F.cross_entropy(output, y_part, reduction="sum").div(x.size(0)).backward()
    optimizer.step()


class Memory(NamedTuple):
    """Functions that begin a new peak, and that return the bytes in use and those of the peak."""

    begin: Callable[[], Any]
    used: Callable[[], int]
    peak: Callable[[], int]


@contextmanager
def memory_of(device: str) -> Iterator[Memory]:
    if device == "cuda":
        yield Memory(torch.cuda.reset_peak_memory_stats, torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)
    elif device == "simulated":
        with simulated_device() as simulated:
            yield Memory(simulated.begin_peak, lambda: simulated.used, lambda: simulated.peak)
    else:
        forget_peak = partial(Path("/proc/self/clear_refs").write_text, "5")
        yield Memory(forget_peak, partial(_resident, "VmRSS"), partial(_resident, "VmHWM"))


def _resident(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 2**10


def measure(way: str, memory: Memory, options: argparse.Namespace) -> str:
    device = "cuda" if options.device == "cuda" else "cpu"
    torch.manual_seed(0)
    model = build(way, options).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x = torch.randn(options.batch, 3, options.side, options.side, device=device)
    peaks, seconds = [], []
    for _ in range(options.steps + 1):
        memory.begin()
        used, begin = memory.used(), time.perf_counter()
        step(way, model, optimizer, x, options)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        peaks.append((memory.peak() - used) / 2**20)
    return f"{median(peaks[1:]):8.0f} MiB {median(seconds[1:]) * 1e3:8.0f} ms   {way}: {WAYS[way]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "simulated", "cuda"])
    parser.add_argument("--width", type=int, default=32, help="channels of the first block")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        with memory_of(options.device) as memory:
            print(measure(options.way, memory, options))
        return
    print(f"ResNet-18 of width {options.width}, {options.batch} images of {options.side} pixels, fp32, "
          f"{options.micro_batches} micro-batches, {options.device}, torch {torch.__version__}")  # fmt: skip
    print(" activations         step")
    for way in WAYS:
        if way.endswith("offload") and options.device == "cpu":
            continue  # they are there already
        # Freed tensors are returned to the system at once, so that the resident set is what is in use.
        allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", way], check=True, env=os.environ | allocator
        )


if __name__ == "__main__":
    main()
