"""The batch of all ranks that a case of the self-test runs on, and what the layer has to make of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import syncnorm
from syncnorm.testing.oracle import BatchNormReference, batch_norm_oracle
from syncnorm.tools.selftest.case_context import Trial

MOMENTUM = 0.3


@dataclass(frozen=True)
class Batch:
    """Rows of each rank, drawn alike on all ranks; the gradients that come back are random too.

    A sum's gradient, all ones, would make that of a batch norm's input zero, and any backward look right.
    """

    rows: tuple[int, ...]
    channels: int = 5
    spatial: tuple[int, ...] = (6, 7)
    dtype: torch.dtype = torch.float32
    mean: float = 3.0
    std: float = 2.0
    masked: bool = False

    @classmethod
    def even(cls, trial: Trial, rows: int = 4, **rest: object) -> Batch:
        """As many rows on each rank."""
        return cls((rows,) * trial.world_size, **rest)  # type: ignore[arg-type]

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Of parameters, their gradients and running statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, gradient of the output, and mask, of all ranks; on the CPU."""
        generator = torch.Generator().manual_seed(0)
        shape = (sum(self.rows), self.channels, *self.spatial)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        valid = torch.rand(shape[0], *self.spatial, generator=generator) < 0.6
        return (x * self.std + self.mean).to(self.dtype), dy.to(self.dtype), valid

    def x(self, trial: Trial) -> Tensor:
        """This rank's input, on its device; NaN where a mask hides it."""
        x, _, valid = (self.split(whole)[trial.rank] for whole in self.drawn)
        if self.masked:
            x = x.masked_fill(~valid.unsqueeze(1), torch.nan)
        return x.to(trial.device, copy=True)

    def dy(self, trial: Trial) -> Tensor:
        """The gradient of this rank's output, on its device."""
        return self.split(self.drawn[1])[trial.rank].to(trial.device, copy=True)

    def mask(self, trial: Trial) -> Tensor:
        """(rows, *spatial), True where a position counts."""
        return self.split(self.drawn[2])[trial.rank].to(trial.device)

    def split(self, whole: Tensor) -> list[Tensor]:
        """What has a row for each of all ranks' rows, by rank."""
        return list(torch.split(whole, list(self.rows)))

    def layer(self, trial: Trial) -> nn.Module:
        """The layer under test, over the group under test, with random weights."""
        layer = syncnorm.SyncBatchNorm(
            self.channels, momentum=MOMENTUM, process_group=trial.group, dtype=self.statistics_dtype
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return layer.to(trial.device)

    def reference(self, layer: nn.Module) -> BatchNormReference:
        """``F.batch_norm`` in fp64 on the rows of all ranks, of which a mask leaves those that count."""
        x, dy, valid = self.drawn
        inputs, grads = self.split(x), self.split(dy)
        if self.masked:
            masks = self.split(valid)
            inputs, grads = (
                [part.movedim(1, -1)[mask] for part, mask in zip(parts, masks, strict=True)]
                for parts in (inputs, grads)
            )
        weight, bias = (parameter.detach().cpu() for parameter in layer.parameters())
        return batch_norm_oracle(
            inputs, grads, weight, bias, torch.zeros(self.channels), torch.ones(self.channels), MOMENTUM
        )

    def compare(self, trial: Trial, y: Tensor, dx: Tensor | None, layer: nn.Module, weights: bool = True) -> None:
        """Output, gradients and running statistics with the reference; the last also between ranks."""
        want = self.reference(layer)
        got = {"output": y, "gradient of the input": dx}
        expected = {"output": want.outputs, "gradient of the input": want.grad_inputs}
        for what, tensor in got.items():
            if self.masked and tensor is not None:
                valid = self.mask(trial)
                trial.exact(f"zero {what} in the padding", not tensor.movedim(1, -1)[~valid].any())
                tensor = tensor.movedim(1, -1)[valid]
            trial.close(what, tensor, expected[what][trial.rank], self.dtype)
        state = dict(layer.named_buffers())
        if weights:
            for name, wanted in (("weight", want.grad_weight), ("bias", want.grad_bias)):
                gradient = layer.get_parameter(name).grad
                trial.close(f"gradient of the {name}", gradient, wanted[trial.rank], self.statistics_dtype)
        trial.close("running mean", state["running_mean"], want.running_mean, self.statistics_dtype)
        trial.close("running variance", state["running_var"], want.running_var, self.statistics_dtype)
        trial.exact("number of batches tracked", int(state["num_batches_tracked"]) == 1)
        for name in ("running_mean", "running_var"):
            trial.same_on_all_ranks(name, state[name])
