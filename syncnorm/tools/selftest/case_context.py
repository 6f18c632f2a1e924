"""One case of the self-test on one rank: what it may use, and what it writes down."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import SyncNormError
from syncnorm.monitor.divergence import bit_digest
from syncnorm.testing.oracle import TOLERANCES
from syncnorm.tools.selftest.records import Measured, Verdict


@dataclass
class Trial:
    """A rank in a case, with the group under test and a gloo group to talk in."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    verdict: Verdict = field(default_factory=Verdict)

    def close(self, what: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype, scale: float = 1) -> None:
        """Compares ``got`` with the fp64 ``want``, as near as ``TOLERANCES[dtype]`` says.

        ``scale`` widens it, where rounding adds up over steps or sums.

        Raises:
            SyncNormError: one of them is missing, or of another shape.
        """
        if got is None or want is None or got.shape != want.shape:
            shapes = [None if x is None else tuple(x.shape) for x in (got, want)]
            raise SyncNormError(f"{what} has shape {shapes[0]}, expected {shapes[1]}")
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
        error = (got - want).abs() / (1 + want.abs())
        # A NaN is as wrong as can be, and would win no comparison.
        largest = float(error.nan_to_num(torch.inf, torch.inf).max()) if error.numel() else 0.0
        self.verdict.measured.append(Measured(what, largest, TOLERANCES[dtype][0] * scale))

    def exact(self, what: str, holds: bool) -> None:
        """Something that is right or wrong, without a measure."""
        self.verdict.measured.append(Measured(what, 0.0 if holds else float("inf"), 0.0))

    def same_on_all_ranks(self, what: str, tensor: Tensor) -> None:
        """To be compared bit for bit with the other ranks', when the case is over."""
        self.verdict.bits[what] = bit_digest(tensor)
