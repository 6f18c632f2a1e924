"""Windows of micro-batches (``convert(accumulate=K)``), described by a `Windows` and compared with an fp64 oracle."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cases import DTYPES, laid_out, valid
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import assert_close, run_ranks


@dataclass(frozen=True)
class Windows:
    """What ranks run. The data follow from the numbers of rows and are the same in every process."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]  # of each rank, in each micro-batch, in each window
    size: int = 4  # as of convert
    dtype: str = "float64"
    layout: str = "contiguous"
    masked: bool = False
    affine: bool = True
    track: bool = True
    momentum: float | None = 0.1
    mean: float = 3.0

    @property
    def world_size(self) -> int:
        return len(self.rows[0][0])

    def layer(self) -> nn.BatchNorm2d:
        statistics = torch.float64 if self.dtype == "float64" else torch.float32
        layer = nn.BatchNorm2d(3, 1e-3, self.momentum, self.affine, self.track, dtype=statistics)
        if self.affine:
            torch.manual_seed(1)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias)
        return layer

    def micro_batch(self, window: int, number: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Input, output gradient and mask of each rank."""
        rows = self.rows[window][number]
        generator = torch.Generator().manual_seed(100 * window + number)
        shape = (sum(rows), 3, 4, 5)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + number) + self.mean * (number - 1)
        dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.6
        dtype = DTYPES[self.dtype]
        masks = mask.split(rows) if self.masked else [None] * len(rows)
        return list(zip(x.to(dtype).split(rows), dy.to(dtype).split(rows), masks, strict=True))


def run_windows(case: Windows) -> list[list[dict[str, Any]]]:
    """Runs the windows on this rank; an optimizer ends each, or ``end_window`` if there is nothing to optimize."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    layer = syncnorm.convert(case.layer(), accumulate=case.size)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0) if case.affine else None
    results = []
    for window in range(len(case.rows)):
        results.append([])
        for number in range(len(case.rows[window])):
            x, dy, mask = case.micro_batch(window, number)[rank]
            x = laid_out(x, case.layout).detach().requires_grad_()
            y = layer(x, mask)
            layer.zero_grad()
            y.backward(dy)
            results[-1].append(
                {"y": y.detach(), "dx": x.grad, "grads": [p.grad for p in layer.parameters()]}
                | {"buffers": {name: buffer.clone() for name, buffer in layer.named_buffers()}}
            )
        if optimizer is None:
            syncnorm.training.end_window(layer)
        else:
            optimizer.step()
    return results


def check(case: Windows) -> None:
    """Compares outputs, gradients and buffers of all ranks with the oracle, after each micro-batch."""
    ranks = run_ranks(run_windows, case.world_size, (case,))
    layer, dtype = case.layer().double(), DTYPES[case.dtype]
    sums = dtype if dtype == torch.float64 else torch.float32
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for window in range(len(case.rows)):
        earlier = torch.empty(0, 3, dtype=torch.float64)
        for number in range(len(case.rows[window])):
            got = [result[window][number] for result in ranks]
            of_ranks = case.micro_batch(window, number)
            inputs = [rows_of(x.double(), mask).requires_grad_() for x, _, mask in of_ranks]
            whole = torch.cat([earlier, *inputs])
            layer.load_state_dict(buffers, strict=False)
            outputs = inputs
            if len(whole) > 0:
                layer(whole.detach()[:, :, None, None])  # for its buffers
            if len(whole) > len(earlier):
                outputs = normalized(layer, inputs, whole.detach())
            for (_, dy, mask), x, y, result in zip(of_ranks, inputs, outputs, got, strict=True):
                leaves = [x, *(layer.parameters() if outputs is not inputs else [])]
                # The oracle of a rank: dx contains the sums over all ranks, gradients of parameters are its own.
                own = torch.autograd.grad(y, leaves, rows_of(dy.double(), mask), True, allow_unused=True)
                assert_close(rows_of(result["y"], mask), y.detach(), dtype)
                for gradient, want in zip(result["grads"], own[1:], strict=False):
                    assert_close(gradient, torch.zeros(3) if want is None else want, sums)
            total = sum(
                (y * rows_of(dy.double(), mask)).sum() for y, (_, dy, mask) in zip(outputs, of_ranks, strict=True)
            )
            for x, result, (_, _, mask) in zip(inputs, got, of_ranks, strict=True):
                want = torch.autograd.grad(total, x, retain_graph=True)[0]
                assert_close(rows_of(result["dx"], mask), want, dtype)
            for result in got:
                for name, buffer in layer.named_buffers():
                    assert_close(result["buffers"][name], buffer, sums)
                    assert torch.equal(result["buffers"][name], got[0]["buffers"][name]), name
            earlier = whole.detach()
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}


def normalized(layer: nn.BatchNorm2d, inputs: list[Tensor], whole: Tensor) -> list[Tensor]:
    """Inputs (values, C), normalized by the statistics of ``whole``, whose derivatives are those of these inputs.

    That is the derivative of the whole batch if earlier micro-batches change with the weights as this one does.
    """
    present, mean, var = torch.cat(inputs), whole.mean(0), whole.var(0, unbiased=False)
    own_mean, own_var = present.mean(0), (present - mean).square().mean(0)
    mean, var = mean + own_mean - own_mean.detach(), var + own_var - own_var.detach()
    weight = 1 if layer.weight is None else layer.weight
    bias = 0 if layer.bias is None else layer.bias
    return [(x - mean) * (var + layer.eps).rsqrt() * weight + bias for x in inputs]


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The values that count, as (values, C)."""
    return valid(x, torch.ones((), dtype=torch.bool) if mask is None else mask).detach()
