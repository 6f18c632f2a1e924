"""What a case of the self-test works with: one rank and its checks, and a batch with its fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncnorm
from syncnorm.errors import SyncNormError
from syncnorm.monitor.divergence import bit_digest
from syncnorm.testing.oracle import TOLERANCES, BatchNormReference, batch_norm_oracle
from syncnorm.tools.selftest.records import Measured, Verdict

MOMENTUM = 0.3


@dataclass
class CaseContext:
    """One case on one rank.

    Attributes:
        backend: of ``group``.
        group: the process group under test.
        control: a gloo group for the self-test's own communication.
        verdict: what the checks of this rank found.
    """

    rank: int
    world_size: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    verdict: Verdict = field(default_factory=Verdict)

    def check_close(
        self, what: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype, scale: float = 1
    ) -> None:
        """Compares ``got`` with the fp64 reference ``want``, within ``scale`` times the tolerance of ``dtype``.

        ``scale`` is more than 1 where rounding errors accumulate over steps or sums.

        Raises:
            SyncNormError: one of the tensors is missing, or their shapes differ.
        """
        if got is None or want is None or got.shape != want.shape:
            shapes = [None if x is None else tuple(x.shape) for x in (got, want)]
            raise SyncNormError(f"{what} has shape {shapes[0]}, expected {shapes[1]}")
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        error = (got - want).abs() / (1 + want.abs())
        # NaN must fail, and compares as neither larger nor smaller.
        largest = float(error.nan_to_num(torch.inf, torch.inf).max()) if error.numel() else 0.0
        self.verdict.measured.append(Measured(what, largest, TOLERANCES[dtype][0] * scale))

    def check(self, what: str, holds: bool) -> None:
        """Records something that is either right or wrong."""
        self.verdict.measured.append(Measured(what, 0.0 if holds else float("inf"), 0.0))

    def check_same_on_all_ranks(self, what: str, tensor: Tensor) -> None:
        """Records a digest of ``tensor``, which is compared between the ranks when the case is over."""
        self.verdict.bits[what] = bit_digest(tensor)


@dataclass(frozen=True)
class Batch:
    """The batch of all ranks, which every rank draws from the same seed, and the layer and reference for it.

    The gradients of the output are random: with those of a sum, all ones, the gradient of the input of a batch norm
    is zero and hides every error of the backward.

    Attributes:
        rows: number of samples on each rank.
        masked: whether the layer gets a mask.
    """

    rows: tuple[int, ...]
    channels: int = 5
    spatial: tuple[int, ...] = (6, 7)
    dtype: torch.dtype = torch.float32
    mean: float = 3.0
    std: float = 2.0
    masked: bool = False

    @classmethod
    def even(cls, context: CaseContext, rows: int = 4, **rest: object) -> Batch:
        """A batch with the same number of rows on every rank."""
        return cls((rows,) * context.world_size, **rest)  # type: ignore[arg-type]  # checked where it is called

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of parameters, their gradients and running statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, gradient of the output, and mask, of all ranks; on the CPU."""
        generator = torch.Generator().manual_seed(0)
        shape = (sum(self.rows), self.channels, *self.spatial)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        valid = torch.rand(shape[0], *self.spatial, generator=generator) < 0.6
        return (x * self.std + self.mean).to(self.dtype), dy.to(self.dtype), valid

    def x(self, context: CaseContext) -> Tensor:
        """This rank's input, on its device; NaN where the mask is False."""
        x, _, valid = (self.split(whole)[context.rank] for whole in self.drawn)
        if self.masked:
            x = x.masked_fill(~valid.unsqueeze(1), torch.nan)
        return x.to(context.device, copy=True)

    def dy(self, context: CaseContext) -> Tensor:
        """The gradient of this rank's output, on its device."""
        return self.split(self.drawn[1])[context.rank].to(context.device, copy=True)

    def mask(self, context: CaseContext) -> Tensor:
        """This rank's mask, (rows, *spatial), True where a position counts."""
        return self.split(self.drawn[2])[context.rank].to(context.device)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Splits a tensor with the rows of all ranks into those of each rank."""
        return list(torch.split(whole, list(self.rows)))

    def layer(self, context: CaseContext) -> nn.Module:
        """The layer under test, over the group under test, with random parameters."""
        layer = syncnorm.SyncBatchNorm(
            self.channels, momentum=MOMENTUM, process_group=context.group, dtype=self.statistics_dtype
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return layer.to(context.device)

    def reference(self, layer: nn.Module) -> BatchNormReference:
        """``F.batch_norm`` in fp64 on the rows of all ranks, or on the positions of them where the mask is True."""
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

    def check(
        self, context: CaseContext, y: Tensor, dx: Tensor | None, layer: nn.Module, parameters: bool = True
    ) -> None:
        """Compares the results of a step with the reference, and the running statistics also between ranks.

        Args:
            context: of this rank.
            y: the output of the layer.
            dx: the gradient of its input.
            layer: the layer after the step.
            parameters: whether to compare the gradients of weight and bias as well.
        """
        want = self.reference(layer)
        got = {"output": y, "gradient of the input": dx}
        expected = {"output": want.outputs, "gradient of the input": want.grad_inputs}
        for what, tensor in got.items():
            if self.masked and tensor is not None:
                valid = self.mask(context)
                context.check(f"zero {what} in the padding", not tensor.movedim(1, -1)[~valid].any())
                tensor = tensor.movedim(1, -1)[valid]
            context.check_close(what, tensor, expected[what][context.rank], self.dtype)
        if parameters:
            # A world of one runs torch's own batch norm, which on a GPU rounds each value that it sums.
            dtype = self.dtype if context.world_size == 1 else self.statistics_dtype
            for name, grads in (("weight", want.grad_weight), ("bias", want.grad_bias)):
                gradient = layer.get_parameter(name).grad
                context.check_close(f"gradient of the {name}", gradient, grads[context.rank], dtype)
        state = dict(layer.named_buffers())
        context.check_close("running mean", state["running_mean"], want.running_mean, self.statistics_dtype)
        context.check_close("running variance", state["running_var"], want.running_var, self.statistics_dtype)
        context.check("number of batches tracked", int(state["num_batches_tracked"]) == 1)
        for name in ("running_mean", "running_var"):
            context.check_same_on_all_ranks(name, state[name])
