"""The layer benchmark: a forward and a backward of each peer, on each row of the shape table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from syncnorm.tools.bench.measure import WARM_UP, block_length, interleaved, warm_up
from syncnorm.tools.bench.memory import PASSES, cache_to_outgrow, input_sets
from syncnorm.tools.bench.peers import BASELINES, LOCAL, PEERS, Peer
from syncnorm.tools.bench.records import Row
from syncnorm.tools.bench.shapes import DTYPES, FORMATS, Shape
from syncnorm.tools.bench.statistics import timings
from syncnorm.tools.common.ranks import Ranks


@dataclass
class LayerStep:
    """A forward and a backward of ``layer`` on the next of ``inputs``, pairs of x and dy.

    Collective: those of the layer.
    """

    layer: nn.Module
    inputs: Sequence[tuple[Tensor, Tensor]]
    _parameters: list[nn.Parameter] = field(init=False)
    _after_backward: Callable[[], None] | None = field(init=False)
    _turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._parameters = list(self.layer.parameters())
        self._after_backward = getattr(self.layer, "after_backward", None)

    def __call__(self) -> None:
        """Leaves the gradients in ``x.grad`` and in the parameters'."""
        x, dy = self.inputs[self._turn]
        # Of the step before as well: its memory is then free for this step's, as in a training.
        self.inputs[self._turn - 1][0].grad = x.grad = None
        self._turn = (self._turn + 1) % len(self.inputs)
        for parameter in self._parameters:
            parameter.grad = None
        self.layer(x).backward(dy)
        if self._after_backward is not None:
            self._after_backward()


def make_inputs(
    shape: Shape, memory_format: str, dtype: str, device: torch.device, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x, which requires a gradient, and dy, in the same memory format; as many as outgrow the cache."""
    generator = torch.Generator(device).manual_seed(seed)

    def random() -> Tensor:
        x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        return x.contiguous(memory_format=FORMATS[memory_format])

    pair_bytes = 2 * math.prod(shape) * DTYPES[dtype].itemsize
    count = input_sets(pair_bytes, cache_to_outgrow(device))
    return [(random().requires_grad_(), random()) for _ in range(count)]


def measure_row(
    shape: Shape,
    memory_format: str,
    dtype: str,
    ranks: Ranks,
    repetitions: int,
    block_seconds: float,
    copy_bandwidth: float,
    peers: Sequence[Peer] = PEERS,
) -> Row:
    """Times the peers on one input, also in relation to what a copy of it takes. Collective: all ranks."""
    inputs = make_inputs(shape, memory_format, dtype, ranks.device, seed=ranks.rank)
    steps, not_run = _build(peers, shape, inputs, ranks.device)
    warm_up(steps)
    # The local layer may be far faster than those that wait for each other.
    rough = interleaved({name: step for name, step in steps.items() if name != LOCAL.name}, ranks, 1, WARM_UP)
    slowest = max(times[0] for times in rough.values())
    count = ranks.share(block_length(slowest, block_seconds))
    seconds = interleaved(steps, ranks, repetitions, count, before=steps)
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    timed = timings(seconds, BASELINES, not_run)
    shares = {t.name: PASSES * num_bytes / t.median / copy_bandwidth for t in timed if t.median is not None}
    return Row(shape, memory_format, dtype, num_bytes, count, timed, len(inputs), shares)


def _build(
    peers: Sequence[Peer], shape: Shape, inputs: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, LayerStep], dict[str, str]]:
    steps, not_run = {}, {}
    for peer in peers:
        step = LayerStep(peer.build(len(shape), shape[1]).to(device), inputs)
        try:
            step()
        except ValueError as error:  # torch's layer, on a CPU; on all ranks alike, and before it communicates
            not_run[peer.name] = str(error)
        else:
            steps[peer.name] = step
    return steps, not_run
