"""Times a training step of a layer on a GPU without the host: replays of a CUDA graph, in one NCCL rank.

``syncnorm bench layer --device cuda`` times a step as a user meets it, host included, which takes longer than the GPU
unless the tensors are large. This shows what the GPU itself does in that time, and what a model that is captured, or
whose host runs ahead, would see. The rank synchronizes with itself, so collectives are launched, and nothing waits
for another GPU.

    python tests/long/gpu_step.py
"""

import math
import sys
from collections.abc import Callable
from statistics import geometric_mean, median

import torch
from torch import nn

from syncnorm.modules import SyncBatchNorm2d
from syncnorm.tools.bench.contenders import TORCH
from syncnorm.tools.bench.layers import make_inputs, measure_memory
from syncnorm.tools.bench.shapes import CUDA_SHAPES, DTYPES
from syncnorm.tools.bench.single_process import single_process_world

REPLAYS, REPETITIONS = 3, 9
MAX_SETS = 8  # of inputs; more would be a long graph
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "syncnorm": SyncBatchNorm2d,
    "torch": lambda channels: TORCH.build(4, channels),  # torch.nn.SyncBatchNorm
    "local": nn.BatchNorm2d,
}


def capture(layer: nn.Module, inputs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.CUDAGraph:
    """A graph of a forward and a backward on each of ``inputs`` in turn."""

    def steps() -> None:
        for x, dy in inputs:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / REPLAYS


def main() -> None:
    """Prints a row per shape, memory format and dtype, and means of the ratios."""
    device = torch.device("cuda", torch.cuda.current_device())
    ratios: dict[tuple[str, str], list[float]] = {}
    with single_process_world("nccl", 1, "cuda") as ranks:
        bandwidth = measure_memory(ranks).copy_bandwidth
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {bandwidth / 1e9:,.0f} GB/s")
        print(f"{'shape':15} {'':4} {'':4} {'syncnorm':>9} {'torch':>9} {'local':>9}  /torch  /local  copy share")
        for shape in CUDA_SHAPES:
            for memory_format, short in (("contiguous", "NCHW"), ("channels_last", "NHWC")):
                for dtype in DTYPES:
                    inputs = make_inputs(shape, memory_format, dtype, device, seed=0)[
                        :8
                    ]  # more would be a long graph
                    graphs = {name: capture(build(shape[1]).to(device), inputs) for name, build in LAYERS.items()}
                    turns = [
                        {n: microseconds(g) / len(inputs) for n, g in graphs.items()} for _ in range(REPETITIONS)
                    ]
                    times = {name: median(turn[name] for turn in turns) for name in LAYERS}
                    to = {n: median(turn["syncnorm"] / turn[n] for turn in turns) for n in ("torch", "local")}
                    for name, ratio in to.items():
                        ratios.setdefault((dtype, name), []).append(ratio)
                    share = 8 * math.prod(shape) * DTYPES[dtype].itemsize / times["syncnorm"] / 1e-6 / bandwidth
                    columns = "".join(f"{times[name]:10.1f}" for name in LAYERS)
                    print(
                        f"{'x'.join(map(str, shape)):15} {short} {dtype}{columns}    {to['torch']:.2f}    "
                        f"{to['local']:.2f}        {share:.2f}",
                        flush=True,
                    )
                    del graphs, inputs
    for (dtype, name), values in ratios.items():
        mean = geometric_mean(values)
        print(f"syncnorm / {name}, {dtype}: geometric mean {mean:.2f}, {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    sys.exit(main())
