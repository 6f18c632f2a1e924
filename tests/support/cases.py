"""Training steps of a layer on uneven ranks, described by a `Case` and compared with fp64 on the whole batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.modules import SyncBatchNorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Case:
    """The configuration of a step. The data follow from ``seed`` and are the same in every process."""

    splits: tuple[int, ...]  # rows of each rank
    channels: int = 3
    spatial: tuple[int, ...] = (4, 5)
    dtype: str = "float32"
    param_dtype: str | None = None  # None: fp32, or fp64 for fp64 input, as under mixed precision
    layout: str = "contiguous"  # of the input: contiguous, channels_last, permuted, sliced
    dy_layout: str = "contiguous"  # of the gradient: contiguous, channels_last, permuted, sliced, expanded
    affine: bool = True
    bias: bool = True
    track: bool = True
    momentum: float | None = 0.1
    mean: float = 3.0
    std: float = 2.0
    steps: int = 1
    seed: int = 0
    mask: str = ""  # positions, rows, places (the same in each row), lengths (along the first axis), or none

    def params(self) -> torch.dtype:
        if self.param_dtype is not None:
            return DTYPES[self.param_dtype]
        return torch.float64 if self.dtype == "float64" else torch.float32

    def batch(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and output gradients by rank, contiguous, in the input's dtype."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        shape = (sum(self.splits), self.channels, *self.spatial)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * self.std
        x += self.mean * torch.randn(self.channels, generator=generator, dtype=torch.float64).view(
            -1, *(1,) * len(self.spatial)
        )
        dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.dy_layout == "expanded":
            dy = dy[(..., *(slice(0, 1),) * len(self.spatial))].expand(shape)
        x, dy = x.to(DTYPES[self.dtype]), dy.to(DTYPES[self.dtype])
        return list(x.split(self.splits)), list(dy.split(self.splits))

    def masks(self, step: int) -> list[Tensor | None]:
        """The mask of each rank, True where a position counts; broadcasts over the other axes."""
        if not self.mask:
            return [None for _ in self.splits]
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        rows, ones = sum(self.splits), (1,) * len(self.spatial)
        if self.mask == "places":
            valid = torch.rand(1, *self.spatial, generator=generator) < 0.6
            return [valid for _ in self.splits]
        if self.mask == "lengths":
            lengths = torch.randint(0, self.spatial[0] + 1, (rows, 1), generator=generator)
            valid = (torch.arange(self.spatial[0]) < lengths).view(rows, self.spatial[0], *ones[1:])
        else:
            shape = (rows, *self.spatial) if self.mask == "positions" else (rows, *ones)
            valid = torch.rand(shape, generator=generator) < 0.6
        return list(valid.split(self.splits))

    def values(self, step: int) -> int:
        """Values per channel over all ranks."""
        masks = self.masks(step)
        return sum(
            torch.Size((rows, *self.spatial)).numel() if mask is None else int(mask.expand(rows, *self.spatial).sum())
            for rows, mask in zip(self.splits, masks, strict=True)
        )

    def layer(self) -> SyncBatchNorm:
        layer = SyncBatchNorm(
            self.channels,
            momentum=self.momentum,
            affine=self.affine,
            bias=self.bias,
            track_running_stats=self.track,
            dtype=self.params(),
        )
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return layer


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "channels_last" and x.dim() in (4, 5):
        fmt = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=fmt)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([x, x], dim=-1)[..., : x.size(-1)]
    if layout == "expanded":
        return x[(..., *(slice(0, 1),) * (x.dim() - 2))].expand(x.shape)
    return x.contiguous()


def run_case(case: Case) -> list[dict[str, Any]]:
    """Runs the steps of a case on this rank; returns the results of each step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    layer = case.layer()
    results = []
    for step in range(case.steps):
        inputs, grads = case.batch(step)
        x, mask = inputs[rank], case.masks(step)[rank]
        if mask is not None:  # padding must not affect the result
            x = x.masked_fill(~mask.unsqueeze(1), torch.nan)
        x = laid_out(x, case.layout).detach().requires_grad_()
        y = layer(x, mask=mask)
        layer.zero_grad()
        y.backward(laid_out(grads[rank], case.dy_layout))
        assert x.grad is not None
        results.append(
            {
                "y": y.detach(),
                "dx": x.grad,
                "dw": layer.weight.grad if case.affine else None,
                "db": layer.bias.grad if case.affine and case.bias else None,
                "buffers": {k: v.clone() for k, v in layer.named_buffers()},
                "formats": (y.stride(), x.grad.stride()),
            }
        )
    return results


def check(case: Case) -> list[list[dict[str, Any]]]:
    """Runs a case on its ranks and compares everything with fp64 ``F.batch_norm`` on the whole batch.

    Returns the results of each rank, for further checks.
    """
    ranks = run_ranks(run_case, len(case.splits), (case,))
    compare(case, ranks)
    return ranks


def compare(case: Case, ranks: list[list[dict[str, Any]]]) -> None:
    """Raises an AssertionError if the results of the ranks differ from those of the whole batch."""
    layer, dtype = case.layer(), DTYPES[case.dtype]
    # With fp32 parameters, sums over the batch are computed and stored in fp32 even for half-precision input.
    sums = torch.float64 if case.params() == dtype == torch.float64 else torch.float32
    if case.params() not in (torch.float64, torch.float32):
        sums = case.params()
    running = {k: v.double() for k, v in layer.named_buffers()}
    tracked = 0
    for step in range(case.steps):
        inputs, grads = case.batch(step)
        masks = case.masks(step)
        tracked += int(case.values(step) > 0)
        momentum = 1 / max(tracked, 1) if case.momentum is None else case.momentum
        want = batch_norm_oracle(
            [valid(x, mask) for x, mask in zip(inputs, masks, strict=True)],
            [valid(dy, mask) for dy, mask in zip(grads, masks, strict=True)],
            layer.weight,
            layer.bias,
            running.get("running_mean"),
            running.get("running_var"),
            momentum,
            layer.eps,
        )
        for rank, got in enumerate(result[step] for result in ranks):
            assert_close(valid(got["y"], masks[rank]), want.outputs[rank], dtype)
            assert_close(valid(got["dx"], masks[rank]), want.grad_inputs[rank], dtype)
            if masks[rank] is not None:
                padding = ~masks[rank].unsqueeze(1)
                assert not got["y"].masked_select(padding).any()
                assert not got["dx"].masked_select(padding).any()
            if case.affine:
                assert_close(got["dw"], want.grad_weight[rank], sums)
            if case.affine and case.bias:
                assert_close(got["db"], want.grad_bias[rank], sums)
            if case.track:
                assert_close(got["buffers"]["running_mean"], want.running_mean, sums)
                assert_close(got["buffers"]["running_var"], want.running_var, sums)
                assert got["buffers"]["num_batches_tracked"] == tracked
                for name, value in got["buffers"].items():  # bitwise equal on every rank
                    assert torch.equal(value, ranks[0][step]["buffers"][name]), name
        if case.track:
            running = {"running_mean": want.running_mean, "running_var": want.running_var}


def valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` without a mask; with one, the values at positions that count, as (positions, C)."""
    return x if mask is None else x.movedim(1, -1)[mask.expand(x.size(0), *x.shape[2:])]
